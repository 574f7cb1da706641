"""Not one number that is not finite reaches a weight: 200 injections by place, value and loss.

A token whose hidden state, log-probability or credit is not finite is dropped and counted, and the
step is what it would be without that token's credit, whatever the value was. A gradient that is not
finite on any rank leaves parameters and moments bit-equal on all of them.
"""

from __future__ import annotations

import math
import sys
from itertools import product
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent))

from nan_cases import ALONE, PLACES, RANKS, TOKENS, VALUES, Bad, step
from test_distributed import launch, results
from test_prime import begun, graded, made_up, tiny

from reasonrl import ops
from reasonrl.loss import NAMED
from reasonrl.records import NonFiniteStop

BY_TOKEN = ("bnpo", "dapo", "cispo", "sapo", "reinforce")  # no token's weight depends on another's


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def finite(weights: dict) -> bool:
    return all(bool(w.isfinite().all()) for w in weights.values())


@pytest.mark.parametrize("loss", NAMED)
@pytest.mark.parametrize("place", PLACES)
def test_every_value_in_every_place(loss, place, accelerator):
    found = [step(Bad(loss, place, value), loss, accelerator) for value in VALUES]
    for done in found:
        assert finite(done.after) and math.isfinite(done.metrics["loss"])
    if place == "gradient":
        for done in found:
            assert same(done.before, done.after) and done.skipped == 1
            assert not math.isfinite(done.metrics["grad_norm"])
        return
    for done in found:  # the rest of the step is trained on, whichever value it was
        assert done.metrics["nonfinite"] == 1.0 and done.skipped == 0
        assert not same(done.before, done.after)
        assert same(done.after, found[0].after)
    if place in ("logit", "old", "reward") and loss in BY_TOKEN:
        wanted = step(None, loss, accelerator, quiet_token=True)
        for name, weight in wanted.after.items():
            torch.testing.assert_close(found[0].after[name], weight, atol=1e-6, rtol=0)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    out = tmp_path_factory.mktemp("nan")
    return results(out, "nan", launch(out, "nan"))


@pytest.mark.parametrize("place", PLACES)
def test_one_rank_of_two(place, two_ranks):
    for at, bad in enumerate(RANKS):
        if bad.place != place:
            continue
        left, right = (rank[at] for rank in two_ranks)
        assert same(left["after"], right["after"]) and finite(left["after"])
        for rank in (left, right):
            assert rank["metrics"]["nonfinite"] == float(place in TOKENS)
            assert same(rank["before"], rank["after"]) == (place == "gradient")
            assert rank["skipped"] == int(place == "gradient")


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
def test_a_scored_reward_is_finite_or_an_error(kind, value):
    reward, group = torch.tensor([1.0, value, 0.0, 1.0]), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="reward"):
        ops.group_advantage(reward, group, kind=kind)
    known = torch.tensor([True, False, True, True])  # unknown: it may hold anything
    found = ops.group_advantage(reward, group, kind=kind, scored=known)
    assert bool(found.isfinite().all()) and found[1] == 0.0


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("place", ["weight", "gradient"])
def test_the_learned_reward_skips_and_stops(place, value):
    """PRIME's own model: its scores of a step are unknown or its update is left out."""
    algo = begun(tiny(0))
    learning, rollout = algo.held.learning, graded(made_up())
    parameter = learning.parameters[0]
    if place == "gradient":
        parameter.register_hook(lambda grad: torch.full_like(grad, value))
    else:
        with torch.no_grad():
            parameter.view(-1)[0:4096] = value
    before = [p.detach().clone() for p in learning.parameters]
    with pytest.raises(NonFiniteStop, match="reward model's gradient"):
        for _ in range(3):
            rewards = algo.score(rollout)
            advantage = algo.advantage(rewards, rollout)
            assert bool(advantage.isfinite().all())
            assert (rewards.metrics["process/nonfinite"] > 0) == (place == "weight")
            assert algo.update(rollout, rewards)["process/prm_skipped"] == 1.0
    pairs = zip(before, learning.parameters, strict=True)
    assert all(torch.equal(a.nan_to_num(7.0), b.detach().nan_to_num(7.0)) for a, b in pairs)


def test_the_table_has_200_rows():
    rewards, learned = 3 * len(VALUES), 2 * len(VALUES)
    assert len(ALONE) + len(RANKS) + rewards + learned >= 200
    assert len(set(product(NAMED, PLACES, VALUES))) == len(ALONE)
