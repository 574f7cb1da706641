"""Libra's use of a judge: its mean verdict is the reward, and what it cannot say is no zero."""

import json
import math

import pytest
import torch
from fault_server import MODEL, FaultServer, verdict
from safetensors.torch import load_file

from reasonrl import InputError, models
from reasonrl import config as configs
from reasonrl.algos import Libra
from reasonrl.algos.base import Start, make
from reasonrl.algos.libra import agreement
from reasonrl.cli import main
from reasonrl.judge_data import make_cases
from reasonrl.judge_train import taught
from reasonrl.records import Problem, Rollout, infra, scored, unscorable
from reasonrl.rewards import judge as judge_module
from reasonrl.rollout import Sampling
from reasonrl.tasks import make_task
from reasonrl.train import train


@pytest.fixture(scope="module")
def policy():
    return models.load("tiny", dtype="fp32", layers=1, width=32, heads=2)


@pytest.fixture(scope="module")
def folder(policy, tmp_path_factory):
    out = tmp_path_factory.mktemp("judge")
    policy.model.save_pretrained(out)
    policy.tokenizer.save_pretrained(out)
    return str(out)


def rollout(problem, texts, **more):
    return Rollout(
        problems=[problem],
        prompt_ids=[[5]],
        group=torch.zeros(len(texts), dtype=torch.long),
        completion_ids=[[9]] * len(texts),
        text=texts,
        finished=[True] * len(texts),
        logp=[],
        pieces=[],
        **more,
    )


def says(share):
    """In place of `sample`: of four verdicts on a response, `share[response]` are 1."""

    def run(policy, problems, prompts, votes, sampling, seed):
        out = []
        for p in problems:
            ones = share.get(p.prompt[1:-2].split("|")[1])
            out += ["?" if ones is None else f"!{int(v < ones)}" for v in range(votes)]
        many = [p for p in problems for _ in range(votes)]
        return Rollout(problems, [], torch.arange(len(many)), [], out, [True] * len(out), [], [])

    return run


def test_the_mean_verdict_is_the_reward(policy, folder, monkeypatch):
    task = make_task("arithmetic", style="compact")
    (problem,) = task.problems("train", 0, 1)
    worked = task.worked(problem)
    monkeypatch.setattr(judge_module, "sample", says({worked: 4, "b": 1, "c": 3}))
    knobs = {"judge": folder, "style": "compact", "max_tokens": 8, "votes": 4}
    algo = make(Libra, task, policy, knobs)
    group = rollout(problem, [worked, "b", "c", "d"])
    rewards = algo.score(group)
    assert [s.value for s in rewards.outcome] == [1.0, 0.25, 0.75, None]
    assert rewards.outcome[3] == unscorable("no verdict (4)")
    assert [s.value for s in rewards.verdict] == [1.0, 0.0, 0.0, 0.0]  # shown, not learned from
    assert algo.outcomes(group) == rewards.outcome
    m = rewards.metrics
    assert m["judge/unparsable"] == 0.25 and m["process/outcome_mean"] == pytest.approx(1 / 3)
    assert m["process/judge_right"] == 1.0 and m["process/judge_wrong"] == 0.5
    assert m["process/judge_agreement"] == pytest.approx(2 / 3)
    # 1, 1/4, 3/4: mean 2/3, unbiased std .3818813; the fourth is outside
    expected = [(v - 2 / 3) / (0.3818813 + 1e-6) for v in (1, 0.25, 0.75)] + [0.0]
    assert algo.advantage(rewards, group).tolist() == pytest.approx(expected, rel=1e-5)
    kept = [scored(0.5), infra("down")]
    again = algo.score(rollout(problem, ["b", "c"], outcome=kept))  # judged when it was drawn
    assert again.outcome == kept and algo.advantage(again, rollout(problem, "bc")).tolist() == [
        0,
        0,
    ]


def test_what_cannot_be_graded_has_no_agreement():
    found = agreement([unscorable("no answer")] * 2, [scored(1.0), scored(0.0)])
    assert all(math.isnan(v) for v in found.values()) and len(found) == 4


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"votes": 0}, "algo.votes: expected >= 1, got 0"),
        ({"temperature": 0.0}, "algo.temperature: expected a number > 0, got 0.0"),
        ({"judge": "http://127.0.0.1:1/v1"}, "algo.judge_model: expected a name"),
        ({"judge_model": "x"}, "algo.judge_model: expected .* none for another"),
        ({"style": "compact", "checklist": ["a"]}, "algo.checklist: expected none"),
        ({"judge": "/nowhere/at all"}, "no such folder"),
        ({"judge_steps": 0}, "algo.judge_steps: expected >= 1"),
        ({"outage": "wait"}, "algo.outage"),
    ],
)
def test_bad_knobs(policy, knobs, says):
    with pytest.raises(InputError, match=says):
        make(Libra, make_task("arithmetic"), policy, knobs)


def test_one_greedy_judgement_is_allowed(policy, folder):
    knobs = {"judge": folder, "temperature": 0.0, "votes": 1}
    judge = make(Libra, make_task("arithmetic"), policy, knobs).held.judge
    assert judge.sampling == Sampling(512, 0.0)


# the judge that a run makes


def test_worked_answers_stand_in_for_right_ones(policy):
    """An untrained policy is never right: without them no data, with them it is balanced."""
    task = make_task("arithmetic", style="compact", terms=2)
    args = ({"policy": policy}, task, Sampling(8), ("sft", 0, 6), 2, 0)
    assert list(make_cases(*args)) == []
    rows = list(make_cases(*args, True))
    assert [row["label"] for row in rows].count(1) == 6 == len(rows) / 2
    assert all(row["check"].startswith(row["response"]) for row in rows if row["label"])
    assert all(not row["check"].startswith(row["response"]) for row in rows if not row["label"])


def test_a_task_without_worked_answers_needs_a_judge(policy, monkeypatch):
    task = make_task("arithmetic", style="compact", terms=2)
    monkeypatch.setattr(type(task), "worked", lambda self, problem: None)
    algo = make(Libra, task, policy, {"style": "compact", "judge_problems": 4})
    start = Start(None, False, None, 512, sampling=Sampling(4), note=lambda text: None)
    with pytest.raises(InputError, match="algo.judge: task arithmetic has no worked answers"):
        algo.begin(start)


def test_taught_learns_what_it_is_given():
    own = models.load("tiny", dtype="fp32", layers=1, width=32, heads=2, seed=3)
    problems = [Problem(str(i), f"{i}:") for i in range(4)]
    said = []
    more = {"steps": 60, "batch": 4, "learning_rate": 1e-2, "tokens": 32, "note": said.append}
    taught(own, problems, [f"{9 - i}" for i in range(4)], **more)
    losses = [float(line.rpartition(" ")[2]) for line in said]
    assert losses[0] > 0.5 and losses[-1] < 0.05 and not own.model.training
    from reasonrl.prompts import render
    from reasonrl.rollout import sample

    prompts = [render(own.tokenizer, p.prompt) for p in problems]
    assert sample(own, problems, prompts, 1, Sampling(4, 0.0), 0).text == ["9", "8", "7", "6"]


KEYS = ["cold_start_steps=3", "prompts_per_step=3", "group=4", "eval_problems=4", "threads=1"]
KEYS += ["max_completion_length=12", "model_options={layers: 1, width: 32, heads: 2}"]
KEYS += ["cold_start.batch=8", "optim.schedule=constant"]
OWN = ["algo.judge_problems=4", "algo.judge_steps=3", "algo.max_tokens=16", "algo.votes=2"]


def small(*more):
    return configs.load("libra", [*KEYS, *more])


def weights(out, step=4):
    return load_file(out / f"checkpoint-{step}" / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_with_a_judge_of_its_own_resumes_bit_for_bit(tmp_path):
    assert train(small(*OWN, "steps=4"), tmp_path / "a", quiet=True)
    assert train(small(*OWN, "steps=2"), tmp_path / "b", quiet=True)
    assert train(small(*OWN, "steps=4"), tmp_path / "b", resume=True, quiet=True)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    first, last = (
        load_file(tmp_path / "b" / f"checkpoint-{s}/judge/model.safetensors") for s in (2, 4)
    )
    assert same(first, last)  # it stands still
    row = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[-1])
    # such a judge says nothing clean: counted, and no gradient came of it
    assert row["rewards/unscorable"] == 12 and row["grad_norm"] == 0


# a judge behind a server


async def likes_short(message, number):
    inside = message.split("[response ")[1].split("\n", 1)[1].split("\n[end")[0]
    return verdict(message, int(len(inside) % 2))


SERVED = ["algo.style=full", "algo.votes=1", "algo.max_tokens=16", "algo.outage=fail"]


def test_a_server_that_stays_down_leaves_a_checkpoint_to_go_on_from(tmp_path, capsys):
    with FaultServer(likes_short) as server:
        served = [*SERVED, f"algo.judge={server.url}", f"algo.judge_model={MODEL}"]
        assert train(small(*served, "steps=4"), tmp_path / "a", quiet=True)
        rows = [json.loads(r) for r in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
        assert all(r["judge/infra"] == 0 and 0 <= r["reward"] <= 1 for r in rows)
        assert any(r["grad_norm"] > 0 for r in rows)
        assert train(small(*served, "steps=1"), tmp_path / "b", quiet=True)
        words = ["train", "libra", *KEYS, *served, "steps=4", "--quiet", "--out"]
        asked, ask = [], Libra._judged

        def then_down(self, rollout):
            asked.append(1)
            server.down = len(asked) == 2
            return ask(self, rollout)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Libra, "_judged", then_down)
            assert main([*words, str(tmp_path / "b"), "--resume"]) == 4
        assert "judge" in capsys.readouterr().err
        assert (tmp_path / "b" / "checkpoint-2").is_dir()  # the step before the one that failed
        server.down = False
        assert main([*words, str(tmp_path / "b"), "--resume"]) == 0
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))


def test_prompts_need_no_answers(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{i}+1:"}) + "\n" for i in range(30)))
    with FaultServer(likes_short) as server:
        more = [f"task={path}", "cold_start_steps=0", "steps=2", *SERVED]
        more += [f"algo.judge={server.url}", f"algo.judge_model={MODEL}"]
        assert train(small(*more), tmp_path / "r", quiet=True)
    rows = [json.loads(r) for r in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    assert all(0 <= r["reward"] <= 1 and r["process/outcome_mean"] is None for r in rows)
    assert all(r["rewards/unscorable"] == 0 for r in rows)
