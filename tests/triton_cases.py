"""Numerics of the Triton kernels: in the interpreter, run by test_triton.py in a process of its
own, and on a GPU, by test_gpu.py.

Against float64 truth by the rule of test_parity.py; fp32 only (the interpreter's bf16 products are
wrong). The interpreter runs programs one after another on numpy: no races, no memory model. Outputs
start as NaN.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from reasonrl import LossSpec, linear_policy_loss, ops, policy_loss
from reasonrl.kernels import linear_logp, tiles
from reasonrl.kernels import linear_policy_loss as head_loss
from reasonrl.kernels import logp as logp_kernels
from reasonrl.loss import NAMED

DEVICE = "cuda" if os.environ.get("REASONRL_PARITY") == "triton" else "cpu"
RUN_HERE = DEVICE == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = [
    pytest.mark.skipif(not RUN_HERE, reason="run by test_triton.py and test_gpu.py"),
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
ULP = torch.finfo(torch.float32).eps
PATHS = ((torch.float64, "reference"), (torch.float32, "reference"), (torch.float32, "triton"))


@pytest.fixture(autouse=True)
def device():
    with torch.device(DEVICE):
        yield


def within(truth, yard, got, k, scale=0.0):
    ulp = max(ULP, torch.finfo(got.dtype).eps)
    t, y, g = (x.detach().double() for x in (truth, yard, got))
    assert not g.isnan().any()
    if t.numel():
        floor = 4 * ulp * max(float(t.abs().max()), scale, 1e-30)
        allowed = k * float((y - t).abs().max()) + floor
        assert float((g - t).abs().max()) <= allowed


@pytest.mark.parametrize("width", [1, 2, 15, 63, 64, 65, 300])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logp(width, softcap, monkeypatch):
    monkeypatch.setattr(logp_kernels, "block", lambda n, most: 64)
    for rows in (0, 1, 7):
        u = torch.randn(rows, width) * 4
        if rows > 2 and width > 2 and softcap is None:
            u[1, 1], u[2, 0] = -math.inf, 1e4
        target = torch.randint(0, width, (rows,))
        target[1:3] = 0
        up, results = torch.randn(2, rows), []
        for dtype, impl in PATHS:
            leaf = u.to(dtype).requires_grad_()
            known = {"temperature": 0.8, "softcap": softcap, "entropy": True, "impl": impl}
            out = ops.logp(leaf, target, **known)
            total = sum((w * o).sum() for w, o in zip(up, out, strict=True))
            results.append((*out, *torch.autograd.grad(total, leaf)))
        for i, case in enumerate(zip(*results, strict=True)):
            within(*case, k=3 if i == 2 else 2, scale=4.0 if i < 2 else 1.0)


def test_logp_keeps_nan_in_its_row():
    u = torch.zeros(4, 5)
    u[1, 2], u[2] = math.nan, -math.inf
    u.requires_grad_()
    logp, ent = ops.logp(u, torch.zeros(4).long(), entropy=True, impl="triton")
    assert logp.isnan().tolist() == ent.isnan().tolist() == [False, True, True, False]
    (grad,) = torch.autograd.grad(logp[[0, 3]].sum(), u)
    assert grad[[1, 2]].eq(0).all() and grad[0].isfinite().all()


def tokens(n, seed, spread=0.3):
    g = torch.Generator(DEVICE).manual_seed(seed)
    names = ("logp", "old", "ref", "advantage", "weight", "entropy")
    x = {name: torch.randn(n, generator=g) * spread for name in names}
    x["logp"] = x["logp"] - 2
    x["old"], x["ref"] = x["logp"] + x["old"], x["logp"] + x["ref"]
    x["advantage"] = x["advantage"] / spread
    x["advantage"][: n // 9] = 0.0
    mask = torch.rand(n, generator=g) > 0.3
    for value in x.values():
        value[(torch.rand(n, generator=g) > 0.99) | (~mask & (torch.rand(n) > 0.5))] = math.nan
        value[torch.rand(n, generator=g) > 0.995] = math.inf
    return x, mask


CHANGES = [
    {},
    {"kl_coef": 0.2, "kl": "k1", "reduce": "fixed"},
    {"kl_coef": 0.2, "kl": "k2", "entropy_coef": 0.1, "reduce": "token_mean"},
    {"kl_coef": 0.2, "entropy_coef": 0.1, "entropy_reduce": "token_mean", "reduce": "seq_mean"},
]
NARROW = {"cispo": [{"clip_high": 0.1}], "gmpo": [{"clip_low": 0.1, "clip_high": 0.3}]}
CAPPED = [{"delta": 1.5}, {"dual_clip": 1.1}, {"delta": 1.4, "dual_clip": 1.2}]
CUTS = ([0, 0], [0, 1, 1, 400, 933])


@pytest.mark.parametrize("name", NAMED)
def test_policy_loss(name):
    capped = CAPPED if LossSpec.named(name).surrogate == "clip" else NARROW.get(name, [])
    for case, change in enumerate([*CHANGES, *capped]):
        spec = LossSpec.named(name, **({"max_length": 40} | change))
        for cut in CUTS[bool(case) :]:
            x, mask = tokens(cut[-1], case)
            known = {"cu_seqlens": torch.tensor(cut), "mask": mask if case else None}
            results = []
            for dtype, impl in PATHS:
                v = {key: value.to(dtype) for key, value in x.items()}
                leaf, ent = v["logp"].requires_grad_(), v["entropy"].requires_grad_()
                out = policy_loss(
                    leaf, v["old"] if case != 2 else None, v["advantage"], spec, ref_logp=v["ref"],
                    entropy=ent if spec.entropy_coef else None, impl=impl,
                    is_weight=v["weight"] if case != 1 else None, **known,
                )  # fmt: skip
                grads = torch.autograd.grad(out.loss, (leaf, ent), allow_unused=True)
                grads = [torch.zeros_like(leaf) if g is None else g for g in grads]
                results.append((out.loss, *grads, *out.metrics.values()))
            for i, values in enumerate(zip(*results, strict=True)):
                within(*values, k=3 if i else 2, scale=0.5 if i == 0 else 0.0)
            assert results[2][1][~mask].eq(0).all() or known["mask"] is None


@pytest.mark.parametrize("softcap", [None, 6.0])
@pytest.mark.parametrize(
    ("n", "depth", "width"), [(0, 4, 5), (1, 3, 1), (33, 31, 64), (70, 40, 131)]
)
def test_linear_logp(n, depth, width, softcap, monkeypatch):
    monkeypatch.setattr(linear_logp, "SCRATCH", 13 * width * 4)
    x, w, b = torch.randn(n, depth), torch.randn(width, depth), torch.randn(width)
    target, up, results = torch.randint(0, width, (n,)), torch.randn(2, n), []
    up[:, ::5] = 0
    for dtype, impl in PATHS:
        leaves = [v.to(dtype).requires_grad_() for v in (x, w, b)]
        known = {"temperature": 0.8, "softcap": softcap, "entropy": True, "impl": impl}
        out = ops.linear_logp(leaves[0], leaves[1], target, bias=leaves[2], **known)
        total = sum((g * o).sum() for g, o in zip(up, out, strict=True))
        results.append((*out, *torch.autograd.grad(total, leaves)))
    for i, values in enumerate(zip(*results, strict=True)):
        within(*values, k=3 if i > 1 else 2, scale=8.0 if i < 2 else 1.0)
    assert results[2][2][::5].eq(0).all()


@pytest.mark.parametrize("worth", [0.85, 0.0], ids=["dead rows left out", "dead rows zeroed"])
@pytest.mark.parametrize("name", ["grpo", "cispo", "gspo", "gspo_token", "gmpo"])
def test_linear_policy_loss(name, worth, monkeypatch):
    n, depth, width = 70, 40, 53
    monkeypatch.setattr(linear_logp, "SCRATCH", 30 * width * 4)
    monkeypatch.setattr(head_loss, "WORTH", worth)
    for case, change in enumerate(({}, {"kl_coef": 0.1, "entropy_coef": 0.05}, {})):
        spec = LossSpec.named(name, **({"max_length": 40} | change))
        x, mask = tokens(n, case)
        hidden, w, b = torch.randn(n, depth), torch.randn(width, depth) * 0.2, torch.randn(width)
        hidden[9] = math.nan
        if case == 2:  # no mask: runs of rows, not their numbers
            mask = torch.ones_like(mask)
        target = torch.where(mask, torch.randint(0, width, (n,)), -7)
        truth = hidden.double() @ w.double().T + b
        base = torch.log_softmax(6 * torch.tanh(truth / 6) / 0.8, -1)
        base = base.gather(-1, target.clamp(min=0)[:, None])[:, 0].float()
        results = []
        for dtype, impl in PATHS:
            leaves = [v.to(dtype).requires_grad_() for v in (hidden, w, b)]
            v = {key: value.to(dtype) for key, value in x.items()}
            shift = base.to(dtype) - v["logp"]
            out = linear_policy_loss(
                *leaves[:2], target, v["old"] + shift, v["advantage"], spec,
                mask=None if case == 2 else mask,
                cu_seqlens=torch.tensor([0, 3, 3, 41, 70]), ref_logp=v["ref"] + shift,
                bias=leaves[2], temperature=0.8, softcap=6.0, is_weight=v["weight"], impl=impl,
            )  # fmt: skip
            results.append(
                (out.loss, *torch.autograd.grad(1.7 * out.loss, leaves), *out.metrics.values())
            )
        for i, values in enumerate(zip(*results, strict=True)):
            within(*values, k=3 if i else 2, scale=0.5 if i == 0 else 2e-1)
        assert results[2][1][~mask].eq(0).all() and results[2][1][9].eq(0).all()


# the interpreter's bf16 products are wrong
TILED = (torch.bfloat16, torch.float16) if DEVICE == "cuda" else (torch.float16,)
TILES = [(1, 8, 8), (130, 72, 264), (300, 136, 520), (128, 64, 512)]


@pytest.mark.parametrize("warm", [1.0, 0.7])
@pytest.mark.parametrize("tiled", TILED)
@pytest.mark.parametrize("size", TILES)
def test_linear_tiles_are_the_statistics_of_their_logits(size, warm, tiled, monkeypatch):
    """To fp32 accuracy, of the logits that were rounded; kept or not, the same bits."""
    monkeypatch.setitem(tiles.JOINED, "TILES", 2)  # a vocabulary of many tiles
    n, depth, width = size
    x, w, b = torch.randn(n, depth), torch.randn(width, depth) * 0.3, torch.randn(width)
    x, w, b = (v.to(tiled) for v in (x, w, b))
    target = torch.randint(0, width, (n,))
    target[:2] = torch.tensor([width - 1, 0])[:n]
    for bias in (None, b):
        u, taken, stats = tiles.score_rows(x, w, bias, target, warm, True, True)
        exact = x.double() @ w.double().T + (0 if bias is None else bias.double())
        gap = (u.double() - exact).abs() / exact.abs().clamp(min=1.0)
        assert float(gap.max()) <= 1.01 * torch.finfo(tiled).eps / 2
        log_p = torch.log_softmax(u.double() / warm, -1)
        want = log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
        for found, true in zip((taken, stats[:, 2]), want, strict=True):
            torch.testing.assert_close(found.double(), true, rtol=4 * ULP, atol=8 * ULP)
        for entropy, keep in ((False, True), (True, False), (False, False))[: 3 - 2 * (bias is b)]:
            _, again, others = tiles.score_rows(x, w, bias, target, warm, entropy, keep)
            assert torch.equal(again, taken)
            assert torch.equal(others[:, : 2 + entropy], stats[:, : 2 + entropy])


def tile_paths(kind, monkeypatch):
    """The truth, the library's product and a pass over its result, and tiles."""
    yield torch.float64, "reference"
    for by_tiles in (False, True):
        monkeypatch.setattr(tiles, "worth", lambda n, *_, yes=by_tiles: yes and n > 0)
        yield kind, "triton"


@pytest.mark.parametrize("tiled", TILED)
@pytest.mark.parametrize("size", TILES)
def test_linear_logp_by_tiles(size, tiled, monkeypatch):
    n, depth, width = size
    x, w, b = torch.randn(n, depth), torch.randn(width, depth) * 0.3, torch.randn(width)
    x, w, b = (v.to(tiled).double() for v in (x, w, b))
    target, up, results = torch.randint(0, width, (n,)), torch.randn(2, n), []
    for dtype, impl in tile_paths(tiled, monkeypatch):
        leaves = [v.to(dtype).requires_grad_() for v in (x, w, b)]
        known = {"temperature": 0.8, "entropy": True, "impl": impl}
        out = ops.linear_logp(*leaves[:2], target, bias=leaves[2], **known)
        total = sum((g * o).sum() for g, o in zip(up, out, strict=True))
        results.append((*out, *torch.autograd.grad(total, leaves)))
    for i, values in enumerate(zip(*results, strict=True)):
        within(*values, k=3 if i > 1 else 2, scale=8.0 if i < 2 else 1.0)


@pytest.mark.parametrize("tiled", TILED)
@pytest.mark.parametrize("name", ["grpo", "gspo"])
def test_linear_policy_loss_by_tiles(name, tiled, monkeypatch):
    """One pass, which keeps the logits, and two, whose first keeps none."""
    n, depth, width = 290, 72, 264
    monkeypatch.setattr(linear_logp, "SCRATCH", 256 * width * 4)
    x, mask = tokens(n, 0)
    hidden, w = torch.randn(n, depth), torch.randn(width, depth) * 0.2
    hidden, w = (v.to(tiled).double() for v in (hidden, w))
    target = torch.where(mask, torch.randint(0, width, (n,)), -7)
    truth = torch.log_softmax(hidden @ w.T, -1)
    base = truth.gather(-1, target.clamp(min=0)[:, None])[:, 0].float()
    shift = base - x["logp"]
    for entropy in (0.0, 0.05):
        spec = LossSpec.named(name, kl_coef=0.1, entropy_coef=entropy)
        results = []
        for dtype, impl in tile_paths(tiled, monkeypatch):
            leaves = [v.to(dtype).requires_grad_() for v in (hidden, w)]
            out = linear_policy_loss(
                *leaves, target, x["old"] + shift, x["advantage"], spec, mask=mask,
                cu_seqlens=torch.tensor([0, 3, 3, 141, n]), ref_logp=x["ref"] + shift, impl=impl,
            )  # fmt: skip
            grads = torch.autograd.grad(out.loss, leaves)
            results.append((out.loss, *grads, *out.metrics.values()))
        for i, values in enumerate(zip(*results, strict=True)):
            within(*values, k=3 if i else 2, scale=0.5 if i == 0 else 2e-1)


@pytest.mark.parametrize("tiled", TILED)
def test_linear_tiles_keep_what_is_not_finite_in_its_row(tiled):
    x, w = torch.zeros(200, 16), torch.zeros(520, 16)
    x[:, 0], w[:, 0] = 1.0, torch.linspace(-1, 1, 520)
    x[7] = math.nan
    x[9, 0] = -1.0
    bias = torch.zeros(520)
    bias[:256] = -math.inf  # a tile of words that nobody may take
    target = torch.full((200,), 400)
    x, w = x.to(tiled), w.to(tiled)
    for b in (None, bias.to(tiled)):
        args = x, w, b, target, 1.0, True
        _, taken, stats = tiles.score_rows(*args, b is not None)
        s = x.double() @ w.double().T + (0 if b is None else b.double())
        want = torch.log_softmax(s.to(tiled).double(), -1)
        p = want.exp()
        entropy = -torch.where(p > 0, p * want, 0.0).sum(-1)
        rows = torch.arange(200) != 7
        torch.testing.assert_close(taken[rows].double(), want[rows, 400], rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(stats[rows, 2].double(), entropy[rows], rtol=1e-3, atol=1e-3)
        assert taken[7].isnan() and stats[7, 2].isnan()
