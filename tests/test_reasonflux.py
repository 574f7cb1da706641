"""ReasonFlux in RL: what is paid, where, and that a run with its own reward model resumes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from reasonrl import InputError, Rewards, config, scored, unscorable
from reasonrl.algos import ALGOS, ReasonFlux
from reasonrl.algos.base import make
from reasonrl.prm import Scored
from reasonrl.records import Problem, Rollout, Step
from reasonrl.rewards.prm import PRMScorer
from reasonrl.tasks import make_task
from reasonrl.train import train


class Judge:
    """Stands for the model: fixed scores for every completion."""

    def __init__(self, scores):
        self.scores = scores
        self.reading = type("R", (), {"delimiter": ";", "alpha": 1.0})

    def score(self, traces, tokens=0):
        return self.scores


def rollout(texts, outcomes):
    """One group; every character is a token."""
    return Rollout(
        problems=[Problem("p", "q")],
        prompt_ids=[[1]],
        group=torch.zeros(len(texts), dtype=torch.long),
        completion_ids=[list(range(len(t))) for t in texts],
        text=texts,
        finished=[True] * len(texts),
        logp=[torch.zeros(len(t)) for t in texts],
        pieces=[list(range(len(t) + 1)) for t in texts],
        outcome=outcomes,
    )


def algo(scores, **knobs):
    task = make_task("arithmetic", style="compact")
    out = make(ALGOS["reasonflux"], task, None, {"kind": "dr_grpo", **knobs})
    assert isinstance(out, ReasonFlux)
    out.held.scorer = PRMScorer(Judge(scores), alpha=out.alpha)
    return out


TEXTS = ["a;b", "c;d"]
SCORES = [Scored([0.9, 0.5], 0.8), Scored([0.3, 0.1], 0.2)]
OUTCOMES = [scored(1.0), scored(0.0)]


def test_scalar_is_equation_12():
    it = algo(SCORES, mode="scalar", beta=0.75, alpha=0.5)
    rewards = it.score(rollout(TEXTS, OUTCOMES))
    # rhat = mean + alpha * final = .7 + .4, .2 + .1
    assert [s.value for s in rewards.outcome] == pytest.approx([0.25 + 0.75 * 1.1, 0.75 * 0.3])
    gap = (0.25 + 0.75 * 1.1) - 0.75 * 0.3
    advantage = it.advantage(rewards, rollout(TEXTS, OUTCOMES))
    assert advantage.tolist() == pytest.approx([gap / 2] * 3 + [-gap / 2] * 3)
    assert rewards.metrics["process/outcome_mean"] == 0.5
    assert rewards.metrics["process/prm_score_right"] == pytest.approx(1.1)
    assert rewards.metrics["process/prm_score_wrong"] == pytest.approx(0.3)


def test_dense_pays_the_same_total_piece_by_piece():
    it = algo(SCORES, mode="dense", beta=0.75, alpha=0.5, credit="return")
    got = rollout(TEXTS, OUTCOMES)
    rewards = it.score(got)
    assert [s.value for s in rewards.outcome] == pytest.approx([0.25 + 0.3, 0.75 * 0.1])
    # scores are centred over the group's steps (mean .45), ends over the group
    centred = [0.75 * (v - 0.45) / 2 for v in (0.9, 0.5, 0.3, 0.1)]
    end = (rewards.outcome[0].value - rewards.outcome[1].value) / 2
    expected = [end + centred[0] + centred[1]] * 2 + [end + centred[1]]
    expected += [-end + centred[2] + centred[3]] * 2 + [-end + centred[3]]
    advantage = it.advantage(rewards, got)
    assert advantage.tolist() == pytest.approx(expected)
    # a completion's first token has earned what the scalar mode pays for the whole
    scalar = algo(SCORES, mode="scalar", beta=0.75, alpha=0.5)
    whole = scalar.advantage(scalar.score(got), got)
    assert advantage[[0, 3]].tolist() == pytest.approx(whole[[0, 3]].tolist())
    own = algo(SCORES, mode="dense", beta=0.75, alpha=0.5, credit="step")
    parts = [0.75 * (v - 0.45) for v in (0.9, 0.5, 0.3, 0.1)]
    expected = [end + parts[0]] * 2 + [end + parts[1], -end + parts[2], -end + parts[2]]
    assert own.advantage(own.score(got), got).tolist() == pytest.approx(
        [*expected, -end + parts[3]]
    )


def test_few_steps_earn_no_more_than_many():
    """One step of .8 against four of .8: no reason to stop early."""
    scores = [Scored([0.8], 0.5), Scored([0.8] * 4, 0.5)]
    got = rollout(["a", "b;c;d;e"], [scored(0.0), scored(0.0)])
    for credit in ("step", "return"):
        it = algo(scores, credit=credit)
        assert it.advantage(it.score(got), got).abs().max() < 1e-6


def test_beta_0_is_the_outcome_and_what_is_unread_is_outside():
    got = rollout(TEXTS, OUTCOMES)
    plain = algo(SCORES, mode="scalar", beta=0.0)
    assert plain.advantage(plain.score(got), got).tolist() == [0.5] * 3 + [-0.5] * 3
    texts, outcomes = [*TEXTS, "e"], [*OUTCOMES, scored(1.0)]
    more = rollout(texts, outcomes)
    it = algo([*SCORES, Scored([], None, "too long")], mode="dense")
    rewards = it.score(more)
    assert rewards.outcome[2] == unscorable("too long")
    advantage = it.advantage(rewards, more)
    two = algo(SCORES, mode="dense")
    assert advantage[:6].tolist() == two.advantage(two.score(got), got).tolist()
    assert advantage[6] == 0
    down = rollout(TEXTS, [unscorable("no gold"), scored(0.0)])
    assert algo(SCORES).score(down).outcome[0] == unscorable("no gold")


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"beta": 1.5}, "algo.beta: expected 0 to 1, got 1.5"),
        ({"alpha": float("inf")}, "algo.alpha: expected a finite number"),
        ({"prm_steps": 0}, "algo.prm_steps: expected >= 1"),
        ({"prm": "/nowhere"}, "prm /nowhere: no such folder"),
        ({"mode": "both"}, "algo.mode"),
    ],
)
def test_bad_knobs(knobs, says):
    with pytest.raises(InputError, match=says):
        make(ALGOS["reasonflux"], make_task("arithmetic"), None, knobs)


KEYS = ["cold_start_steps=4", "prompts_per_step=4", "group=4", "eval_problems=8", "threads=1"]
KEYS += ["max_completion_length=12", "model_options={layers: 1, width: 32, heads: 2}"]
KEYS += ["algo.prm_problems=8", "algo.prm_steps=4", "algo.alpha=1.0"]


def test_a_run_with_a_model_of_its_own_resumes_bit_for_bit(tmp_path: Path):
    whole = config.load("reasonflux", [*KEYS, "steps=4"])
    assert train(whole, tmp_path / "a", quiet=True)
    assert train(config.load("reasonflux", [*KEYS, "steps=2"]), tmp_path / "b", quiet=True)
    assert train(whole, tmp_path / "b", resume=True, quiet=True)
    a, b = (tmp_path / x / "checkpoint-4/model.safetensors" for x in "ab")
    assert a.read_bytes() == b.read_bytes()
    rows = [json.loads(s) for s in (tmp_path / "b/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2, 3, 4] and "process/prm_step_mean" in rows[-1]
    kept = (tmp_path / "b/checkpoint-4/prm/prm.json").read_text()
    assert json.loads(kept)["delimiter"] == ";"


def test_the_reward_model_stands_still():
    scores = Rewards(outcome=OUTCOMES, steps=[[Step(0, 1, 0.5)], [Step(0, 1, 0.5)]])
    assert algo(SCORES).update(rollout(TEXTS, OUTCOMES), scores) == {}
