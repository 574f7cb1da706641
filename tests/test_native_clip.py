"""Gradients clipped on the CPU: torch's numbers, the bits of any number of threads, what is not
finite, and an update that clips the same either way."""

from __future__ import annotations

import math

import pytest
import torch
from test_native import isa, native  # noqa: F401, fixtures
from test_packing import made_up, policy  # noqa: F401, fixture

from reasonrl.kernels import native_clip

SHAPES = [(3,), (70, 91), (0, 4), (5000,), (1,), (4096,)]


def drawn(scale=1.0):
    return [torch.randn(shape) * scale for shape in SHAPES]


def truth(grads, limit):
    """In float64: the norm, and the gradients at that limit."""
    norm = math.sqrt(sum(float(g.double().square().sum()) for g in grads))
    return norm, [g.double() * min(1.0, limit / (norm + 1e-6)) for g in grads]


@pytest.mark.parametrize("limit", [0.5, 1e6, math.inf])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_gradients_have_the_norm_they_may_have(isa, scale, limit):  # noqa: F811
    grads = drawn(scale)
    norm, want = truth(grads, limit)
    before = [g.clone() for g in grads]
    assert native_clip.clip(grads, limit) == pytest.approx(norm, rel=1e-6)
    for got, right, was in zip(grads, want, before, strict=True):
        torch.testing.assert_close(got.double(), right, rtol=1e-6, atol=0)
        assert norm > limit or torch.equal(got, was)


def test_by_hand(native):  # noqa: F811
    grads = [torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])]
    assert native_clip.clip(grads, 2.5) == 5.0
    torch.testing.assert_close(torch.cat([g.flatten() for g in grads]), torch.tensor([1.5, 0, 2]))
    assert native_clip.clip([], 1.0) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_changes_nothing(isa, bad):  # noqa: F811
    grads = drawn()
    grads[1][2, 3] = bad
    before = [g.clone() for g in grads]
    assert not math.isfinite(native_clip.clip(grads, 1.0))
    for got, was in zip(grads, before, strict=True):
        torch.testing.assert_close(got, was, rtol=0, atol=0, equal_nan=True)


def test_the_same_bits_for_any_threads(native):  # noqa: F811
    grads, seen = drawn(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        mine = [g.clone() for g in grads]
        seen.append([torch.tensor(native_clip.clip(mine, 1.0)), *mine])
    for one, two, again in zip(*seen, strict=True):
        assert torch.equal(one, two) and torch.equal(one, again)


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e3])
def test_an_update_clips_the_same_by_either(native, policy, limit, monkeypatch):  # noqa: F811
    """By the kernel and by accelerate: the norm, and the weights behind a step."""
    import copy

    from accelerate import Accelerator

    from reasonrl import update
    from reasonrl.config import Config, Optim
    from reasonrl.loss import LossSpec

    rollout = made_up([(4, 3), (6, 2)])
    advantage = torch.randn(15, generator=torch.Generator().manual_seed(2))
    found = []
    for by_kernel in (True, False):
        monkeypatch.setattr(update, "NATIVE", by_kernel)
        mine = copy.copy(policy)
        mine.model = copy.deepcopy(policy.model)
        config = Config(model="tiny", learning_rate=1e-3, optim=Optim(grad_clip=limit))
        learner = update.Learner(mine, config, Accelerator(cpu=True))
        assert learner.plain
        out = learner.step(rollout, advantage, LossSpec.named("grpo"), 1e-3)
        found.append((out["grad_norm"], list(mine.model.parameters())))
    (norm, one), (other, two) = found
    assert norm == pytest.approx(other, rel=1e-6) and norm > 1e-3
    for x, y in zip(one, two, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)
