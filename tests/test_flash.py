"""The two flash calls of a packing and their merge, with the kernels' contract restated in float64.

Whether torch's kernels keep that contract is shown on a GPU (test_gpu.py).
"""

from __future__ import annotations

import pytest
import torch

from reasonrl import attention, flash
from reasonrl.attention import Packed
from reasonrl.records import InputError

LAYOUTS = [
    [(0, 5, [3, 1, 0, 7]), (16, 2, [4, 4])],
    [(0, 4, []), (4, 1, [2]), (7, 3, [0, 0])],
    [(0, 6, [])],
]


def cut(x, offsets):
    return [x[a:b] for a, b in zip(offsets, offsets[1:], strict=False)]


def probabilities(q, k, causal, scaling, lse=None):
    """Softmax over keys (H, R, S), by their own log-sum-exp or by one given from outside."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    s = torch.einsum("rhd,shd->hrs", q, k) * scaling
    if causal:
        s = s.masked_fill(~torch.ones_like(s[0], dtype=torch.bool).tril(), -torch.inf)
    own = s.logsumexp(-1) if lse is None else lse
    return (s - own[..., None]).exp(), own


def forward(q, k, v, lengths, causal, scaling):
    cu_q, cu_k, most_q, most_k = lengths
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert int(cu_q.diff().max()) == most_q and int(cu_k.diff().max()) == most_k
    assert int(cu_q[-1]) == len(q) and int(cu_k[-1]) == len(k) == len(v)
    outs, sums = [], []
    for a, b, c in zip(cut(q, cu_q), cut(k, cu_k), cut(v, cu_k), strict=True):
        p, lse = probabilities(a, b, causal, scaling)
        outs.append(
            torch.einsum("hrs,shd->rhd", p, c.repeat_interleave(q.shape[1] // k.shape[1], 1))
        )
        sums.append(lse)
    return torch.cat(outs), torch.cat(sums, 1), "state", "unused"


def backward(grad, q, k, v, out, lse, lengths, causal, rng, scaling):
    """As a flash kernel does it: p from the log-sum-exp it is given, D from the output."""
    assert rng == ["state", "unused"] and grad.is_contiguous() and lse.is_contiguous()
    cu_q, cu_k, *_ = lengths
    times = q.shape[1] // k.shape[1]
    made = [torch.zeros_like(x) for x in (q, k, v)]
    parts = zip(*(cut(x, cu_q) for x in (grad, q, out, lse.T, made[0])), strict=True)
    keys = zip(*(cut(x, cu_k) for x in (k, v, made[1], made[2])), strict=True)
    for (g, a, o, own, dq), (b, c, dk, dv) in zip(parts, keys, strict=True):
        p, _ = probabilities(a, b, causal, scaling, own.T)
        dp = torch.einsum("rhd,shd->hrs", g, c.repeat_interleave(times, 1))
        ds = p * (dp - (g * o).sum(-1).T[..., None]) * scaling
        dq += torch.einsum("hrs,shd->rhd", ds, b.repeat_interleave(times, 1))
        dk += torch.einsum("hrs,rhd->shd", ds, a).unflatten(1, (-1, times)).sum(2)
        dv += torch.einsum("hrs,rhd->shd", p, g).unflatten(1, (-1, times)).sum(2)
    return made


def inputs(layout, seed=0):
    g = torch.Generator().manual_seed(seed)
    tokens = max(start + n + sum(rows) for start, n, rows in layout)
    return [torch.randn(h, tokens, 8, generator=g, dtype=torch.float64) for h in (4, 2, 2)]


def results(plan, layout):
    leaves = [x.requires_grad_() for x in inputs(layout)]
    out = plan.attend(0, *leaves, 0.3)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out, *torch.autograd.grad((up * out).sum(), leaves)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_calls_equal_one_masked_attention(layout, monkeypatch):
    monkeypatch.setattr(attention, "SMALL", -1)  # the plain path takes scores to fp32
    truth = results(Packed(layout, "cpu", attn="sdpa"), layout)
    monkeypatch.setattr(flash, "missing", lambda q: None)
    monkeypatch.setattr(flash, "_forward", forward)
    monkeypatch.setattr(flash, "_backward", backward)
    plan = Packed(layout, "cpu")
    for ours, theirs in zip(results(plan, layout), truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    assert "blocks" not in vars(plan)  # nothing was padded


def test_gradients_of_the_merge_are_exact(monkeypatch):
    monkeypatch.setattr(flash, "_forward", forward)
    monkeypatch.setattr(flash, "_backward", backward)
    layout = [(0, 3, [2, 0, 3]), (8, 2, [1])]
    at = flash.spans(layout, "cpu")
    leaves = [x.transpose(0, 1).contiguous().requires_grad_() for x in inputs(layout)]
    assert torch.autograd.gradcheck(lambda q, k, v: flash.attend(q, k, v, at, 0.4), leaves)


def test_what_the_kernels_need_is_said():
    layout = LAYOUTS[0]
    q, k, v = (x.float() for x in inputs(layout))
    with pytest.raises(InputError, match="attn: flash needs tensors on CUDA, got cpu"):
        Packed(layout, "cpu", attn="flash").attend(0, q, k, v, 0.3)
    assert flash.missing(q) == "tensors on CUDA, got cpu"
