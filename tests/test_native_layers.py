"""RMSNorm and SwiGLU on the CPU: every instruction set against float64 by the rule of
test_parity.py, transformers' rounding, bits over threads, rows that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from test_native import isa, native  # noqa: F401, fixtures
from test_parity import within
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from reasonrl.cpu_layers import add_rms_norm, rms_norm, rotary, swiglu
from reasonrl.kernels import native_layers

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


def pair(call, leaves, ups):
    """Two results and the gradients of both by the leaves."""
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    outs = call(*leaves)
    total = sum((up.to(out.dtype) * out).double().sum() for up, out in zip(ups, outs, strict=True))
    return *(out.detach() for out in outs), *torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("kinds", [*((k, k, k) for k in KINDS), (FULL, KINDS[1], KINDS[1]),
    (KINDS[1], FULL, FULL)], ids=str)  # fmt: skip
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_with_a_residual(isa, shape, kinds):  # noqa: F811
    """Of rows, what is added and the result; a gradient comes by the sum and by its norm."""
    kind, other, dtype = kinds
    x, w, up = drawn(shape, kind, FULL)
    delta, by_sum = torch.randn(shape).to(other), torch.randn(shape).to(kind)
    wide, results = torch.float64, []
    for impl, to in (("reference", wide), ("reference", dtype), ("native", dtype)):
        leaves = (x, delta, w) if to == dtype else (x.to(wide), delta.to(wide), w.to(wide))
        call = lambda a, b, c, i=impl, t=to: add_rms_norm(a, b, c, EPS, t, impl=i)  # noqa: E731
        results.append(pair(call, leaves, (by_sum, up.to(dtype))))
    lost = max(torch.finfo(k).eps for k in {kind, other, dtype} | {FULL})
    for k, (truth, yard, got) in zip((2, 2, 3, 3, 3), zip(*results, strict=True), strict=True):
        assert got.dtype == yard.dtype
        size = float(truth.abs().max()) if truth.numel() else 0.0
        within(got, truth, yard, k, rounding=0.0 if lost == torch.finfo(FULL).eps else lost * size)
    if x.numel():
        assert torch.equal(results[2][0], (x + delta).to(kind))
        of_sum = rms_norm(results[2][0], w, EPS, dtype, impl="native")  # as it is kept, rounded
        assert torch.equal(results[2][1], of_sum)
        here = x.clone()
        alone = native_layers.add_rms_norm_(here, delta, w, EPS, dtype)
        assert torch.equal(here, results[2][0]) and torch.equal(alone, results[2][1])


def test_a_sum_or_a_norm_alone_has_its_gradient(native):  # noqa: F811
    x, w, up = drawn((5, 24), FULL, FULL)
    for part in (0, 1):
        grads = []
        for impl in ("native", "reference"):
            leaves = [v.clone().requires_grad_() for v in (x, up, w)]
            out = add_rms_norm(*leaves, EPS, FULL, impl=impl)[part]
            grads.append(torch.autograd.grad(out.square().sum(), leaves, allow_unused=True))
        for mine, theirs in zip(*grads, strict=True):
            want = torch.zeros_like(mine) if theirs is None else theirs
            torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-6)


def angles(tokens, size):
    turn = torch.rand(tokens, size // 2) * 9
    return torch.cat([turn, turn], -1).cos(), torch.cat([turn, turn], -1).sin()


@pytest.mark.parametrize("kinds", [*((k, FULL, k) for k in KINDS), (FULL, FULL, KINDS[1]),
    (KINDS[1], KINDS[1], KINDS[1]), (KINDS[1], FULL, FULL)], ids=str)  # fmt: skip
@pytest.mark.parametrize("sizes", [(3, 9, 3, 64), (70, 4, 4, 40), (5, 2, 1, 6), (1, 1, 1, 2),
    (0, 2, 1, 8)], ids=str)  # fmt: skip
def test_rotary_and_its_gradients(isa, sizes, kinds):  # noqa: F811
    """Rows may stand any way apart; q and k of one product do."""
    (tokens, heads, groups, size), (kind, angle, dtype) = sizes, kinds
    both = torch.randn(tokens, heads + groups, size).to(kind)
    cos, sin = (x.to(angle) for x in angles(tokens, size))
    ups = [torch.randn(tokens, n, size).to(dtype) for n in (heads, groups)]
    wide, results = torch.float64, []
    for impl, to in (("reference", wide), ("reference", dtype), ("native", dtype)):
        own = (x.double() if to == wide else x for x in (both, cos, sin))

        def call(x, cos, sin, impl=impl, to=to):
            ways = (
                [native_layers.rotary] if impl == "native" else [lambda *a: rotary(*a, impl=impl)]
            )
            return ways[0](x[:, :heads], x[:, heads:], cos, sin, to)

        x, c, s = own
        results.append(pair(lambda x, c=c, s=s, f=call: f(x, c, s), (x,), ups))
    rounding = torch.finfo(dtype).eps if torch.finfo(dtype).eps > torch.finfo(FULL).eps else 0.0
    back = max(rounding, torch.finfo(kind).eps if kind != FULL else 0.0)
    for k, extra, truth, yard, got in zip(
        (2, 2, 3), (rounding, rounding, back), *results, strict=True
    ):
        assert got.dtype == yard.dtype
        top = float(truth.abs().max()) if truth.numel() else 0.0
        within(got, truth, yard, k, rounding=extra * top)


def test_rotary_by_hand(isa):  # noqa: F811
    """A right angle for the first pair, none for the second."""
    cos, sin = torch.tensor([[0.0, 1.0, 0.0, 1.0]]), torch.tensor([[1.0, 0.0, 1.0, 0.0]])
    q, k = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]), torch.tensor([[[5.0, 6.0, 7.0, 8.0]]])
    found = rotary(q, k, cos, sin, FULL, impl="native")
    assert found[0].tolist() == [[[-3.0, 2.0, 1.0, 4.0]]]
    assert found[1].tolist() == [[[-7.0, 6.0, 5.0, 8.0]]]


def test_gate_and_up_of_one_product(isa):  # noqa: F811
    for kind in KINDS:
        both = torch.randn(7, 2 * 1500).to(kind)
        want = swiglu(*(x.contiguous() for x in both.chunk(2, -1)), impl="native")
        assert torch.equal(native_layers.joined_swiglu(both), want)
        assert torch.equal(native_layers.swiglu(*both.chunk(2, -1)), want)


def test_what_layers_refuse_is_named():
    q, k, cos = torch.zeros(3, 4, 8), torch.zeros(3, 2, 8), torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"q must be \(N, H, d\) with an even d, got \(3, 4, 7\)"):
        rotary(q[..., :7], k, cos, cos, FULL)
    with pytest.raises(ValueError, match=r"k must be \(N, K, d\) = \(3, 2, 8\), got \(3, 2, 6\)"):
        rotary(q, k[..., :6], cos, cos, FULL)
    with pytest.raises(ValueError, match=r"sin must be \(N, d\) = \(3, 8\), got \(2, 8\)"):
        rotary(q, k, cos, cos[:2], FULL)
    with pytest.raises(ValueError, match=r"delta must be the shape of x = \(3, 8\), got \(3, 4\)"):
        add_rms_norm(cos, cos[:, :4], cos[0], EPS, FULL)


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


def test_a_product_rounds_to_nearest_even(isa):  # noqa: F811
    """Every pair of bf16 significands, where sigmoid is 1: half of all ties go either way."""
    step = torch.arange(128) / 128
    gate, up = (x.flatten() for x in torch.meshgrid(64 + 64 * step, 1 + step, indexing="ij"))
    for count in (len(up), len(up) - 5):
        g, u = gate[:count], up[:count]
        got = swiglu(g.bfloat16(), u.bfloat16(), impl="native")
        assert torch.equal(got, (g * u).bfloat16())
    bad = torch.full((17,), -math.nan).bfloat16()
    assert swiglu(bad, bad, impl="native").isnan().all()


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
