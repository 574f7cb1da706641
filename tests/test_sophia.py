"""Trust-GRPO in the loop: the paper's numbers, who is asked, what is logged; its stages."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from reasonrl import config as configs
from reasonrl import models
from reasonrl.algos import ALGOS
from reasonrl.algos.base import make
from reasonrl.checkpoint import checkpoints
from reasonrl.cli import main
from reasonrl.commands.stages import Pipeline
from reasonrl.records import InputError, Rollout, Score, infra, scored, unscorable
from reasonrl.tasks import make_task
from reasonrl.train import train

OUTCOME = [1.0, 1, 1, 0, 0, 0, 0, 1]
TASK = make_task("arithmetic", style="compact")
THINKING = [0.2, 0.3, 0.1, 0.9, 0.8, 0.9, 0.7, 0.2]


@pytest.fixture(scope="module")
def policy():
    return models.load("tiny", dtype="fp32", width=32, layers=1)


def rollout(outcome, groups: int = 1) -> Rollout:
    """Completions of one token whose outcomes are known."""
    count = len(outcome)
    graded = [v if isinstance(v, Score) else scored(v) for v in outcome]
    return Rollout(
        problems=TASK.problems("train", 0, groups),
        prompt_ids=[[5]] * groups,
        group=torch.arange(count) // (count // groups),
        completion_ids=[[9]] * count,
        text=[str(b) for b in range(count)],
        finished=[True] * count,
        logp=[torch.zeros(1)] * count,
        pieces=[[0, 1]] * count,
        outcome=graded,
    )


def sophia(policy, thinking, step=0, steps=1500, **knobs):
    """The algorithm with a scorer that knows the thinking of completion "b"."""
    algo = make(
        ALGOS["sophia"],
        TASK,
        policy,
        {"scorer": "rule", **knobs},
    )
    asked = []

    def scorer(given):
        asked.extend(int(text) for text in given.text)
        values = [thinking[int(text)] for text in given.text]
        return [v if isinstance(v, Score) else scored(v) for v in values]

    algo.held.scorer = scorer
    algo.clock.step, algo.clock.steps = step, steps
    return algo, asked


@pytest.mark.parametrize(
    "step, reward, advantage",
    [
        (
            750,
            [1.019479, 1.029219, 1.009740, 0.087656, 0.077917, 0.087656, 0.068177, 1.019479],
            [0.935293, 0.954693, 0.915893, -0.920743, -0.940143, -0.920743, -0.959543, 0.935293],
        ),
        (
            1500,
            [1.011815, 1.017722, 1.005907, 0.053166, 0.047259, 0.053166, 0.041351, 1.011815],
            [0.935371, 0.946846, 0.923896, -0.926765, -0.938239, -0.926765, -0.949714, 0.935371],
        ),
    ],
)
def test_the_papers_example(policy, step, reward, advantage):
    algo, _ = sophia(policy, THINKING, step)
    ro = rollout(OUTCOME)
    rewards = algo.score(ro)
    assert [s.value for s in rewards.outcome] == pytest.approx(reward, abs=6e-7)
    assert algo.advantage(rewards, ro).tolist() == pytest.approx(advantage, rel=1e-5)
    assert [s.value for s in rewards.verdict] == OUTCOME
    shown = rewards.metrics
    assert shown["process/gamma"] == pytest.approx(0.535261, rel=1e-5)
    assert shown["process/thinking_right"] == pytest.approx(0.2)
    assert shown["process/thinking_wrong"] == pytest.approx(0.825)
    assert shown["process/no_contrast"] == 0.0 and shown["process/outcome_mean"] == 0.5


def test_without_trust_and_without_annealing(policy):
    algo, _ = sophia(policy, THINKING, 1500, trust=False)
    first = algo.score(rollout(OUTCOME)).outcome[0].value
    assert first == pytest.approx(1 + 0.3 * 0.36787944 * 0.2, rel=1e-6)
    algo, _ = sophia(policy, THINKING, 1500, trust=False, anneal=False)
    assert algo.score(rollout(OUTCOME)).outcome[0].value == pytest.approx(1.06, rel=1e-6)
    algo, _ = sophia(policy, THINKING, 500, trust=False, total_steps=12000.0, alpha=1.0)
    first = algo.score(rollout(OUTCOME)).outcome[0].value
    assert first == pytest.approx(1 + 0.2 * 0.959189, rel=1e-6)


def test_the_released_code_does_not_ask_about_wrong_answers(policy):
    algo, asked = sophia(policy, THINKING, 0, score_wrong=False)
    values = [s.value for s in algo.score(rollout(OUTCOME)).outcome]
    assert asked == [0, 1, 2, 7]
    assert values == pytest.approx([1.06, 1.09, 1.03, 0, 0, 0, 0, 1.06], rel=1e-6)


def test_inverted_scores_like_wrong_thinking(policy):
    algo, _ = sophia(policy, [0.9, 0.2], 0, inverted=True)
    rewards = algo.score(rollout([1.0, 0.0]))
    gamma = 2.718281828 ** (0.1 - 0.8)
    wanted = [1 + gamma * 0.3 * 0.1, gamma * 0.3 * 0.8]
    assert [s.value for s in rewards.outcome] == pytest.approx(wanted, rel=1e-6)


def test_what_is_unknown_stays_out(policy):
    """An unknown outcome is in no statistic and is not asked about; unknown thinking takes the
    mean of its group."""
    algo, asked = sophia(policy, [0.4, unscorable("x"), 0.8, 0.1, infra("down"), 0.6], 0)
    ro = rollout([1.0, 0.0, unscorable("gold"), 0.0, 1.0, 0.0], groups=2)
    rewards = algo.score(ro)
    assert asked == [0, 1, 3, 4, 5]
    assert rewards.outcome[2].kind == "unscorable"
    values = [s.value for s in rewards.outcome]
    # group 0 knows 0.4 alone; group 1 knows 0.1 and 0.6, both of wrong ones
    wanted = [1.12, 0.12, None, 0.03, 1 + 0.3 * 0.35, 0.18]
    assert values[:2] == pytest.approx(wanted[:2], rel=1e-6)
    assert values[3:] == pytest.approx(wanted[3:], rel=1e-6)
    advantage = algo.advantage(rewards, ro)
    assert advantage[2] == 0 and bool((advantage[[0, 1, 3, 4, 5]] != 0).all())
    shown = rewards.metrics
    assert shown["process/thinking_unscorable"] == 1 and shown["process/thinking_infra"] == 1
    assert shown["process/no_contrast"] == 1.0 and shown["process/gamma"] == 1.0


def test_bad_knobs(policy):
    for knobs, message in (
        ({}, "algo.scorer: expected a folder"),
        ({"scorer": "rule", "alpha": -1.0}, "algo.alpha"),
        ({"scorer": "rule", "total_steps": 0.0}, "algo.total_steps"),
        ({"scorer": "rule", "whole_response": True}, "whole_response: a rule looks"),
        ({"scorer": "rule", "scorer_model": "x"}, "scorer_model: only for a server"),
        ({"scorer": "http://127.0.0.1:1/v1"}, "scorer_model: a model behind a server"),
        ({"scorer": "/nowhere"}, "no such folder"),
    ):
        with pytest.raises(InputError, match=message):
            make(ALGOS["sophia"], TASK, policy, knobs)


SMALL = [
    "steps=3", "cold_start_steps=2", "prompts_per_step=2", "group=4", "eval_problems=3",
    "cold_start.batch=4", "max_completion_length=12", "threads=1",
    "model_options={width: 64, layers: 1, vision_width: 32, vision_layers: 1}",
]  # fmt: skip


@dataclass
class Said:
    lines: list[str]

    def __call__(self, text: str) -> None:
        self.lines.append(text)


def test_all_stages_from_one_command_and_again(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "sophia", *SMALL, "--out", str(out), "--quiet"]) == 0
    for folder, steps in ((out / "trm-data", 1), (out / "trm", 15), (out, 3)):
        assert checkpoints(folder)[0][0] == steps
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert {"process/gamma", "process/thinking_weight", "process/no_contrast"} <= set(rows[0])
    run = configs.read(out / "config.yaml")
    assert run.algo["scorer"].startswith(str(out / "trm")) and run.cold_start_steps == 0
    models.load(str(out / "checkpoint-3"))  # a vision-language model again
    # a second time: nothing is left to do, and nothing is done twice
    assert main(["train", "sophia", *SMALL, "--out", str(out), "--quiet", "--resume"]) == 0
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    assert main(["train", "sophia", *SMALL, "--out", str(out), "--quiet"]) == 2
    assert "holds a run already" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        ["tiny"],
        ["sophia", "algo.scorer=rule"],
        ["sophia", "--stage", "trm"],
        ["sophia", "--stage", "rl"],
    ],
)
def test_an_annotator_that_nobody_would_ask_is_refused(words, tmp_path, capsys):
    words = ["train", *words, "--annotator", "http://127.0.0.1:1/v1", "--out", str(tmp_path / "r")]
    assert main(words) == 2
    assert "--annotator: only stage trm-data scores thinking" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_reward_model_computes_as_the_policy_does(policy, tmp_path):
    """In the recipe's dtype, not in the machine's favourite one."""
    policy.save(tmp_path)
    wide = models.Policy(policy.model, policy.tokenizer, torch.bfloat16)
    for beside in (policy, wide):
        algo = make(ALGOS["sophia"], TASK, beside, {"scorer": str(tmp_path)})
        assert algo.held.scorer.backend.compute == beside.compute


def test_one_stage_at_a_time(tmp_path):
    config = configs.load("sophia", SMALL)
    say = Said([])
    pipeline = Pipeline(config, tmp_path, quiet=True, say=say)
    with pytest.raises(InputError, match="--stage trm-data makes it"):
        pipeline.run("trm", resume=False)
    with pytest.raises(InputError, match="--stage trm makes it"):
        pipeline.run("rl", resume=False)
    with pytest.raises(InputError, match="expected one of trm-data, trm, rl, got 'sft'"):
        pipeline.run("sft", resume=False)
    assert pipeline.run("trm-data", resume=False)
    assert any("pairs.jsonl" in line for line in say.lines)
    own = Pipeline(config, tmp_path, overrides=["steps=2"], quiet=True, say=say)
    assert own.run("trm", resume=False)
    assert checkpoints(tmp_path / "trm")[0][0] == 2
    assert not checkpoints(tmp_path)


def test_a_killed_run_goes_on_exactly(tmp_path):
    """The filter lets groups wait, with their pictures; a resumed run equals an unbroken one."""
    wait = ["filter={low: 0.0, high: 0.99, rounds: 2}", "algo={scorer: rule}", "save.every=1"]
    whole = configs.load("sophia", [*SMALL, *wait])
    assert train(whole, tmp_path / "whole", quiet=True)
    part = configs.load("sophia", [*SMALL, *wait, "steps=2"])
    assert train(part, tmp_path / "part", quiet=True)
    assert train(whole, tmp_path / "part", resume=True, quiet=True)
    one, two = (
        models.load(str(tmp_path / name / "checkpoint-3")).model.state_dict()
        for name in ("whole", "part")
    )
    assert all(torch.equal(one[key], two[key]) for key in one)
