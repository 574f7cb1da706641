"""MeRF: what the policy is told, to whom, and that the text is the grade's."""

import json

import pytest

from reasonrl import config as configs
from reasonrl import models
from reasonrl.algos import Merf
from reasonrl.algos.base import make
from reasonrl.records import InputError
from reasonrl.tasks import make_task
from reasonrl.tasks.base import Task
from reasonrl.train import train


@pytest.fixture(scope="module")
def policy():
    return models.load("tiny", dtype="fp32", width=32, layers=1)


def merf(policy, task=None, **knobs):
    return make(Merf, task or make_task("knights", people=2, reward="gated"), policy, knobs)


def told(algo, problems):
    plain = algo.plain_prompt(problems)
    return [a != b for a, b in zip(algo.prompt(problems), plain, strict=True)]


def test_everyone_is_told_and_the_text_is_the_spec(policy):
    algo = merf(policy)
    problems = algo.task.problems("train", 0, 6)
    assert told(algo, problems) == [True] * 6
    text = policy.tokenizer.decode(algo.prompt(problems)[0])
    assert algo.task.reward_spec().render("full") in text
    assert "Possible totals: 3, -0.5, -1, -3." in text
    adverse = merf(policy, variant="adverse").motivation()
    assert "Possible totals: -3, 0.5, 1, 3." in adverse


def test_the_share_moves_with_the_steps_and_a_problem_keeps_its_mind(policy):
    algo = merf(policy, motivated=1.0, motivated_end=0.0)
    problems = algo.task.problems("train", 0, 40)
    counts, before = [], [True] * 40
    for step in (1, 6, 11):
        algo.clock.step, algo.clock.steps = step, 11
        now = told(algo, problems)
        assert not any(n and not b for n, b in zip(now, before, strict=True))
        counts.append(sum(now))
        before = now
    assert counts[0] == 40 and counts[2] == 0 and 8 < counts[1] < 32


@pytest.mark.parametrize("reward", ["binary", "gated", "sum"])
def test_the_stated_reward_is_the_graded_one(reward):
    task = make_task("knights", people=2, reward=reward)
    spec = task.reward_spec()
    for problem in task.problems("train", 0, 5):
        worked = task.worked(problem)
        for text in (worked, worked.replace("</think>", ""), worked[:-30], "", "a knight"):
            assert spec.grade(text, problem) == task.grade(problem, text).value


def test_evaluation_counts_right_answers_whatever_the_reward():
    task = make_task("knights", people=2, reward="gated")
    problem = task.problem("test", 0)
    worked = task.worked(problem)
    assert task.grade(problem, worked).value == 3.0
    assert [s.value for s in task.verdicts([problem] * 2, [worked, ""])] == [1.0, 0.0]


def test_arithmetic_states_its_reward_too():
    task = make_task("arithmetic")
    problem = task.problem("train", 0)
    spec = task.reward_spec()
    assert spec.totals() == (1.0, 0.0)
    for text in (task.worked(problem), "Answer: 99", ""):
        assert spec.grade(text, problem) == task.grade(problem, text).value


def test_a_task_without_words_for_its_reward_is_refused(policy):
    with pytest.raises(InputError, match="cannot state its reward"):
        merf(policy, task=Task())
    with pytest.raises(InputError, match="algo.motivated: expected a share"):
        merf(policy, motivated=1.5)


def test_the_short_text_is_a_line_that_lessons_have_too(policy):
    algo = merf(policy, task=make_task("marks"), text="short")
    problem = algo.task.problem("train", 0)
    asked = policy.tokenizer.decode(algo.prompt([problem])[0])
    assert asked == f"p+1 -1>!+2 ?-1.5 -2\n{problem.prompt}\n"
    lesson = next(p for p in algo.task.problems("sft", 0, 99) if p.prompt[0]["content"][1] == "+")
    taught = policy.tokenizer.decode(algo.plain_prompt([lesson])[0])
    text, _, rest = taught.partition("\n")
    assert text[1:] == "+1 -1>!+2 ?-1.5 -2" and rest == f"{lesson.prompt[1]['content']}\n"
    with pytest.raises(InputError, match="has no short form"):
        merf(policy, text="short")


def test_a_run_reports_both_prompts(tmp_path):
    small = ["model_options={width: 32, layers: 1, heads: 2}", "threads=1", "eval_problems=6"]
    small += ["steps=2", "cold_start_steps=1", "prompts_per_step=2", "group=2"]
    config = configs.load("merf", [*small, "model=tiny", "max_completion_length=6"])
    assert train(config, tmp_path / "run", quiet=True)
    rows = [json.loads(r) for r in (tmp_path / "run" / "evals.jsonl").read_text().splitlines()]
    assert all("eval/accuracy" in r and "eval/trained_prompt/accuracy" in r for r in rows)
    assert all(-3 <= r[f"eval/{at}reward"] <= 3 for r in rows for at in ("", "trained_prompt/"))
