"""AdamW behind a limit on the CPU: float64's numbers, the bits of any number of threads, what is
not finite, and an update that steps the same by torch."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from accelerate import Accelerator
from test_native import isa, native  # noqa: F401, fixtures
from test_packing import made_up, policy  # noqa: F401, fixture

from reasonrl import update
from reasonrl.config import Config, Optim
from reasonrl.kernels.native_adamw import adamw
from reasonrl.loss import LossSpec

SHAPES = [(3,), (70, 91), (0, 4), (5000,), (1,), (4096,)]
HOW = (1e-2, (0.9, 0.99), 1e-3, 0.1)  # rate, betas, eps, decay


def drawn(scale=1.0):
    return [torch.randn(shape) * scale for shape in SHAPES]


def fresh(weights):
    return [(torch.zeros_like(w), torch.zeros_like(w), torch.zeros(())) for w in weights]


def stepped(weights, grads, states, limit, usable=True):
    parts = [(w, g, *s) for w, g, s in zip(weights, grads, states, strict=True)]
    return adamw(parts, *HOW, limit, usable)


@pytest.mark.parametrize("limit", [0.5, 1e6, math.inf])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_weights_and_moments_are_those_of_float64(isa, scale, limit):  # noqa: F811
    weights, kept = drawn(), None
    exact = [w.double().requires_grad_() for w in weights]
    rate, betas, eps, decay = HOW
    torch_own = torch.optim.AdamW(exact, lr=rate, betas=betas, eps=eps, weight_decay=decay)
    states = fresh(weights)
    for _ in range(4):
        grads = drawn(scale)
        kept = [g.clone() for g in grads]
        for w, g in zip(exact, grads, strict=True):
            w.grad = g.double()
        norm = torch.nn.utils.clip_grad_norm_(exact, limit)
        torch_own.step()
        assert stepped(weights, grads, states, limit) == pytest.approx(float(norm), rel=1e-6)
        assert all(map(torch.equal, grads, kept))
    for got, right, state in zip(weights, exact, states, strict=True):
        theirs = torch_own.state[right]
        torch.testing.assert_close(got.double(), right.detach(), rtol=1e-6, atol=1e-6)
        for mine, name in zip(state, ("exp_avg", "exp_avg_sq", "step"), strict=True):
            size = float(theirs[name].abs().max()) if mine.numel() else 0.0
            want = theirs[name].double()
            torch.testing.assert_close(mine.double(), want, rtol=1e-5, atol=1e-6 * size)


def test_by_hand(native):  # noqa: F811
    """One step of one weight: m = g / 10, v = g^2 / 100, and both whole after their correction."""
    weight, grad, (state,) = torch.tensor([2.0]), torch.tensor([4.0]), fresh([torch.zeros(1)])
    assert stepped([weight], [grad], [state], 1.0) == 4.0
    torch.testing.assert_close(torch.cat(state[:2]), torch.tensor([0.1, 0.01]))
    assert float(state[2]) == 1.0
    torch.testing.assert_close(weight, torch.tensor([2.0 * (1 - 1e-3) - 1e-2 / (1 + 1e-3)]))
    assert adamw([], *HOW, 1.0, True) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, None], ids=str)
def test_what_is_not_finite_or_usable_changes_nothing(isa, bad):  # noqa: F811
    weights, grads, states = drawn(), drawn(), fresh(drawn())
    if bad is not None:
        grads[1][2, 3] = bad
    before = copy.deepcopy((weights, states))
    norm = stepped(weights, grads, states, 1.0, usable=bad is not None)
    assert math.isfinite(norm) == (bad is None)
    after = [*weights, *sum(states, ())]
    assert all(map(torch.equal, after, [*before[0], *sum(before[1], ())]))


def test_the_same_bits_for_any_threads(native):  # noqa: F811
    weights, grads, seen = drawn(), drawn(), []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        mine, states = [w.clone() for w in weights], fresh(weights)
        norms = torch.tensor([stepped(mine, grads, states, 1.0) for _ in range(2)])
        seen.append([norms, *mine, *sum(states, ())])
    for one, two, again in zip(*seen, strict=True):
        assert torch.equal(one, two) and torch.equal(one, again)


@pytest.mark.parametrize("limit", [0.0, 1e-3, 1e3])
def test_an_update_steps_the_same_by_either(native, policy, limit, monkeypatch):  # noqa: F811
    """By the kernel, and by accelerate and torch: norms, weights and moments behind two steps; and
    moments of one are the other's."""
    rollout = made_up([(4, 3), (6, 2)])
    advantage = torch.randn(15, generator=torch.Generator().manual_seed(2))
    found = []
    for order in ((True, True), (False, False), (False, True), (True, False)):
        mine = copy.copy(policy)
        mine.model = copy.deepcopy(policy.model)
        optim = Optim(grad_clip=limit, weight_decay=0.1, eps=1e-6)
        config = Config(model="tiny", learning_rate=1e-3, optim=optim)
        learner = update.Learner(mine, config, Accelerator(cpu=True))
        assert learner.plain
        norms = []
        for by_kernel in order:
            monkeypatch.setattr(update, "NATIVE", by_kernel)
            out = learner.step(rollout, advantage, LossSpec.named("grpo"), 1e-3)
            norms.append(out["grad_norm"])
        found.append((norms, list(mine.model.parameters())))
    for norms, parameters in found[1:]:
        assert norms == pytest.approx(found[0][0], rel=1e-4) and norms[0] > 1e-3
        for x, y in zip(parameters, found[0][1], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
