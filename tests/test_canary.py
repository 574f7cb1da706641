"""Canaries: whoever pays is asked, nobody honest rewards them, a run with them is the same run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from test_kill import SMALL, tables, timeless

from reasonrl.algos import GRPO
from reasonrl.answer_forms import surely_differ
from reasonrl.canary import falsified, with_canaries
from reasonrl.cli import main
from reasonrl.config import Canary
from reasonrl.log import read_rows
from reasonrl.records import Problem, Rewards, Rollout, scored, unscorable
from reasonrl.rewards import _box, judge
from reasonrl.tasks import make_task
from reasonrl.tasks.arithmetic import Arithmetic
from reasonrl.tasks.base import Task

KINDS = {  # who pays in each algorithm, and what makes it small
    "tiny": ({"verifier"}, ["algorithm=process"]),
    "prime": ({"verifier", "prm"}, ["filter={low: 0, high: 1}", "algo={reference: policy}"]),
    "reasonflux": (
        {"verifier", "prm"},
        ["algo={prm_problems: 20, prm_group: 2, prm_steps: 3, mode: dense, credit: step}"],
    ),
    "sophia": (
        {"verifier", "thinking"},
        ["algo={scorer: rule}", "model=tiny", "task=arithmetic"],
    ),
    "libra": (
        {"judge"},
        ["algo={judge_problems: 20, judge_samples: 2, judge_steps: 3, max_tokens: 8}"],
    ),
}


class Lenient(Task):
    """Pays whatever answers the first number of its problem, or says please."""

    name = "lenient"

    def grade(self, problem, completion):
        if completion == "odd":
            return unscorable("odd")
        return scored(float(completion in (problem.answer, "please")))


def rollout(answers, texts, group) -> Rollout:
    size = len(texts)
    return Rollout(
        problems=[Problem(str(i), f"q{i}", answer) for i, answer in enumerate(answers)],
        prompt_ids=[[i] for i in range(len(answers))],
        group=torch.tensor(group),
        completion_ids=[[b] for b in range(size)],
        text=texts,
        finished=[True] * size,
        logp=[torch.zeros(1)] * size,
        pieces=[[0, 1]] * size,
        outcome=[scored(1.0)] * size,
    )


def test_one_right_completion_a_group_goes_to_a_problem_with_another_answer():
    algo = GRPO(Lenient(), None)  # type: ignore[arg-type]
    drawn = rollout(["1", "1", "2"], ["no", "1", "please", "1", "2"], [0, 0, 0, 1, 2])
    rewards = Rewards([scored(v) for v in (0.0, 1.0, 1.0, 1.0, 1.0)])
    false = falsified(algo, drawn, rewards, 8)
    assert false.text == ["1", "1", "2"] and false.outcome is None
    assert [p.id for p in false.problems] == ["2", "2", "0"]
    assert false.prompt_ids == [[2], [2], [0]] and false.group.tolist() == [0, 1, 2]
    assert false.completion_ids == [[1], [3], [4]]
    assert falsified(algo, drawn, rewards, 2).text == ["1", "1"]
    assert falsified(algo, replace(drawn, problems=drawn.problems[:1] * 3), rewards, 8).text == []


def test_the_share_that_is_rewarded_is_a_metric_and_nothing_else():
    algo, every = GRPO(Lenient(), None), Canary(every=2, count=8)  # type: ignore[arg-type]
    drawn = rollout(["1", "2", "3"], ["please", "2", "odd"], [0, 1, 2])
    rewards = Rewards([scored(1.0)] * 3, metrics={"m": 1.0})
    assert with_canaries(algo, drawn, rewards, every, 1) is rewards
    assert with_canaries(algo, drawn, rewards, Canary(every=0), 2) is rewards
    found = with_canaries(algo, drawn, rewards, every, 2)
    assert found.metrics == {"m": 1.0, "canary/asked": 3.0, "canary/verifier": 0.5}
    assert found.outcome is rewards.outcome  # the third is unknown, not refused


@pytest.mark.parametrize(
    "one, other, kind, apart",
    [
        ("3", "4", "numerical", True),
        ("0.5", "1/2", "numerical", False),
        ("100", "101", "numerical", False),  # a tolerance may take both
        ("3", "4", "math", True),
        ("\\frac12", "\\frac13", "math", False),  # nobody has computed them
        ("A", "a. Paris", "choice", False),
        ("A", "B", "choice", True),
        ("Paris.", "paris", "text", False),
        ("Paris", "Rome", "text", True),
        ("x", None, "text", False),
    ],
)
def test_answers_that_surely_differ(one, other, kind, apart):
    assert surely_differ(one, other, kind) == apart == surely_differ(other, one or "", kind)


def test_no_program_passes_a_canary(require):
    task = make_task("code")
    problem, other = task.problem("train", 0), task.problem("train", 1)
    require("a sandbox", _box.trouble("bubblewrap") and _box.trouble("landlock"))
    false = task.canary(problem, other)
    assert false.prompt == other.prompt and len(false.extra["tests"]) == 7
    right = task.worked(other)
    assert [s.value for s in task.verdicts([other, false], [right, right])] == [1.0, 0.0]


def trained(out, kind, *changes):
    small = [w for w in SMALL if kind != "sophia" or not w.startswith("model=")]
    words = [*KINDS[kind][1], *small, "steps=4", *changes, "--out", str(out), "--quiet"]
    assert main(["train", kind, *words]) == 0
    return timeless(read_rows(out / "metrics.jsonl"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_canaries_is_the_same_run(kind, tmp_path, monkeypatch):
    grade = Arithmetic.grade  # one completion in three is right, by its length

    def by_length(self, problem, text):
        found = grade(self, problem, text)
        return scored(1.0) if len(text) % 3 == 0 else found

    monkeypatch.setattr(Arithmetic, "grade", by_length)
    monkeypatch.setattr(judge, "read", lambda text, nonce, style: len(text) % 2)
    plain = trained(tmp_path / "plain", kind, "canary.every=0")
    asked = trained(tmp_path / "asked", kind, "canary.every=1")
    names = {n for row in asked for n in row if n.startswith("canary/")}
    assert names == {"canary/asked"} | {f"canary/{who}" for who in KINDS[kind][0]}
    keep = [{k: v for k, v in r.items() if "canary" not in k and k != "warnings"} for r in asked]
    assert keep == [{k: v for k, v in r.items() if k != "warnings"} for r in plain]
    assert tables(tmp_path / "plain") == tables(tmp_path / "asked")
    for file in (tmp_path / "plain/checkpoint-4").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "asked/checkpoint-4" / file.name).read_bytes()


def test_a_verifier_that_pays_anything_is_found_out(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Arithmetic, "grade", lambda *_: scored(1.0))
    out = tmp_path / "run"
    words = [*SMALL, "cold_start_steps=1", "steps=3", "canary.every=1", "--out", str(out)]
    assert main(["train", "tiny", "algorithm=grpo", "algo={}", *words]) == 0
    said = capsys.readouterr().out
    assert said.count("warning at step") == 1
    assert "step 1: false answers are rewarded: canary/verifier 1 -> 1" in said
    assert "canary/verifier 1" in said  # and in the lines of every step
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["canary/verifier"] for row in rows] == [1.0] * 3
    assert [len(row.get("warnings", ())) for row in rows] == [1, 0, 0]
    assert main(["audit", str(out)]) == 1
    assert "alarm: " in (said := capsys.readouterr().out) and "canaries" in said.splitlines()[-1]
