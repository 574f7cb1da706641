"""RMSNorm and SwiGLU on the CPU: every instruction set against float64 by the rule of
test_parity.py, transformers' rounding, bits over threads, rows that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from test_native import isa, native  # noqa: F401, fixtures
from test_parity import within
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from reasonrl.cpu_layers import rms_norm, swiglu

KINDS = (torch.float32, torch.bfloat16, torch.float16)
FULL = torch.float32
SHAPES = [(3, 576), (130, 40), (2, 5, 17), (200, 1), (0, 8)]
COUNTS = [1, 17, 1024, 5000]
EPS = 1e-3  # large enough to be seen


def graded(call, leaves, up):
    """The result and the gradients by the leaves."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    out = call(*leaves)
    return out.detach(), *torch.autograd.grad(out, leaves, up.to(out.dtype))


def drawn(shape, kind, weight):
    """Rows of sizes from 1e-2 to 1e2, a weight, and an upstream gradient."""
    size = torch.logspace(-2, 2, max(shape[0], 1))[: shape[0]]
    x = torch.randn(shape) * size.reshape(-1, *[1] * (len(shape) - 1))
    return x.to(kind), torch.randn(shape[-1]).to(weight), torch.randn(shape)


@pytest.mark.parametrize("kinds", [*((k, FULL, k) for k in KINDS), (FULL, FULL, KINDS[1]),
    (KINDS[1], FULL, FULL), (KINDS[1], KINDS[1], KINDS[1])], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_its_gradients(isa, shape, kinds):  # noqa: F811
    kind, weight, dtype = kinds
    x, w, up = drawn(shape, kind, weight)
    up = up.to(dtype)
    wide = torch.float64

    def through(impl, dtype):
        return lambda x, w: rms_norm(x, w, EPS, dtype, impl=impl)

    truths = graded(through("reference", wide), (x.to(wide), w.to(wide)), up)
    yards = graded(through("reference", dtype), (x, w), up)
    found = graded(through("native", dtype), (x, w), up)
    # a number of each: the normalised row, the result, its gradient, once each in their types
    lost = max(torch.finfo(k).eps for k in {kind, dtype, weight} | {FULL})
    for k, (truth, yard, got) in zip(
        (2, 3, 3), zip(truths, yards, found, strict=True), strict=True
    ):
        assert got.dtype == yard.dtype
        size = float(truth.abs().max()) if truth.numel() else 0.0
        within(got, truth, yard, k, rounding=0.0 if lost == torch.finfo(FULL).eps else lost * size)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_norm_rounds_as_transformers(isa, kind):  # noqa: F811
    """The same bits but where torch's fp32 sum ends on the other side of a rounding."""
    x, w, _ = drawn((200, 576), kind, FULL)
    for weight in {FULL, kind}:
        theirs = LlamaRMSNorm(576, eps=EPS)
        theirs.weight.data = w.to(weight)
        want = theirs(x).detach()
        got = rms_norm(x, theirs.weight.detach(), EPS, weight, impl="native")
        torch.testing.assert_close(got, want, rtol=4 * torch.finfo(kind).eps, atol=0)
        if kind != FULL:
            assert (got == want).double().mean() > 0.99


def test_norm_by_hand(isa):  # noqa: F811
    """(3, 4) over sqrt(12.5 + 12.5): 0.6 and 0.8, times the weight."""
    x, w = torch.tensor([[3.0, 4.0]]), torch.tensor([10.0, 100.0])
    y, dx, dw = graded(
        lambda x, w: rms_norm(x, w, 12.5, FULL, impl="native"), (x, w), torch.ones(1, 2)
    )
    torch.testing.assert_close(y, torch.tensor([[6.0, 80.0]]))
    # dx = (w - n mean(w n)) / 5, mean(w n) = (6 + 80) / 2
    torch.testing.assert_close(dx, torch.tensor([[(10 - 0.6 * 43) / 5, (100 - 0.8 * 43) / 5]]))
    torch.testing.assert_close(dw, torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("count", COUNTS)
def test_swiglu_and_its_gradients(isa, count, kind):  # noqa: F811
    gate, up, upstream = ((4 * torch.randn(count)).to(kind) for _ in range(3))
    gate[::7] *= 4
    wide = torch.float64
    truths = graded(
        lambda g, u: swiglu(g, u, impl="reference"), (gate.to(wide), up.to(wide)), upstream
    )
    yards = graded(lambda g, u: swiglu(g, u, impl="reference"), (gate, up), upstream)
    found = graded(lambda g, u: swiglu(g, u, impl="native"), (gate, up), upstream)
    for k, truth, yard, got in zip((2, 3, 3), truths, yards, found, strict=True):
        assert got.dtype == kind
        rounding = 0.0 if kind == FULL else torch.finfo(kind).eps * float(truth.abs().max())
        within(got, truth, yard, k, [gate < -15, gate.abs() <= 15, gate > 15], rounding=rounding)


def test_swiglu_by_hand(isa):  # noqa: F811
    """sigmoid(log 3) = 3/4."""
    g, u = torch.tensor([math.log(3), 0.0]), torch.tensor([2.0, 5.0])
    out, dg, du = graded(lambda g, u: swiglu(g, u, impl="native"), (g, u), torch.ones(2))
    torch.testing.assert_close(out, torch.tensor([1.5 * math.log(3), 0.0]))
    torch.testing.assert_close(dg, torch.tensor([1.5 * (1 + math.log(3) / 4), 2.5]))
    torch.testing.assert_close(du, torch.tensor([0.75 * math.log(3), 0.0]))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_same_bits_for_any_threads(native, kind):  # noqa: F811
    x, w, up = drawn((333, 50), kind, FULL)
    seen = []
    for threads in (1, 2, 2):
        torch.set_num_threads(threads)
        norm = graded(lambda x, w: rms_norm(x, w, EPS, FULL, impl="native"), (x, w), up)
        gate = graded(lambda x, y: swiglu(x, y, impl="native"), (x, up.to(kind)), up)
        seen.append([*norm, *gate])
    for one, two, again in zip(*seen, strict=True):
        assert torch.equal(one, two) and torch.equal(one, again)


def test_a_rows_bits_are_its_own(isa):  # noqa: F811
    """Whatever rows stand beside it."""
    x, w, up = drawn((70, 33), FULL, FULL)
    call = lambda x, w: rms_norm(x, w, EPS, FULL, impl="native")  # noqa: E731
    together = graded(call, (x, w), up)
    for i in (0, 1, 63, 64, 69):
        alone = graded(call, (x[i : i + 1], w), up[i : i + 1])
        assert torch.equal(alone[0][0], together[0][i]) and torch.equal(alone[1][0], together[1][i])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_row(isa, bad):  # noqa: F811
    x, w, up = drawn((6, 40), FULL, FULL)
    call = lambda x, w: rms_norm(x, w, EPS, FULL, impl="native")  # noqa: E731
    clean = graded(call, (x, w), up)
    x[2, 39] = bad
    y, dx, dw = graded(call, (x, w), up)
    assert not y[2, 39].isfinite() and not dx[2].isfinite().any() and not dw[39].isfinite()
    rest = [0, 1, 3, 4, 5]
    assert torch.equal(y[rest], clean[0][rest]) and torch.equal(dx[rest], clean[1][rest])
    gate, other = torch.full((3,), -1.0), torch.ones(3)
    gate[1] = bad
    found = graded(lambda g, u: swiglu(g, u, impl="native"), (gate, other), torch.ones(3))
    for got in found:
        assert not got[1].isfinite() and got[[0, 2]].isfinite().all()


def test_no_gradient_of_a_frozen_weight(isa):  # noqa: F811
    x, w, up = drawn((5, 16), FULL, FULL)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(rms_norm(x, w, EPS, FULL, impl="native"), x, up)
    both = graded(lambda x, w: rms_norm(x, w, EPS, FULL, impl="native"), (x, w), up)
    assert torch.equal(dx, both[1])


def test_what_does_not_fit_is_named():
    x, w = torch.zeros(2, 4), torch.ones(4)
    with pytest.raises(ValueError, match=r"weight must be \(D,\) = \(4,\), got \(3,\)"):
        rms_norm(x, w[:3], EPS, FULL)
    with pytest.raises(ValueError, match="x must be floating point, got int64"):
        rms_norm(x.long(), w, EPS, FULL)
    with pytest.raises(ValueError, match="dtype"):
        rms_norm(x, w, EPS, torch.int64)
    with pytest.raises(ValueError, match=r"up must be gate's shape = \(2, 4\), got \(4,\)"):
        swiglu(x, w)
    with pytest.raises(ValueError, match="up must be float32, got float16"):
        swiglu(x, x.half())


def test_float64_is_the_references():
    x, w, _ = drawn((3, 8), torch.float64, torch.float64)
    want = rms_norm(x, w, EPS, torch.float64, impl="reference")
    assert torch.equal(rms_norm(x, w, EPS, torch.float64), want)
