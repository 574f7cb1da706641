"""log p of the taken token and entropy from given logits, Triton.

    s = softcap tanh(u / softcap) / temperature,  logp = s_y - lse(s),  H = lse(s) - sum p s
    du = (g (1[v = y] - p) - h p (log p + H)) ds/du,  g = dL/dlogp, h = dL/dH

One program a row; the statistics are online and centred (max m, S = sum e^(s-m), Q = sum e^(s-m)
(s-m)), so entropy does not cancel. Traffic: V reads forward; V reads and V writes backward. Rows
with g = h = 0 get exact zeros. Legend: N rows, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonrl.kernels.common import absorb, available, block, log_of, scores

__all__ = ["available", "logp", "row_grad", "row_stats"]

# both kernels must round a score alike: fused into s - m, it would differ from m, which is itself
ROUNDED = {"enable_fp_fusion": False}


@triton.jit
def stats_kernel(
    u_ptr, target_ptr, logp_ptr, stats_ptr, stride, vocab, heat, cold, softcap, per_softcap,
    CAPPED: tl.constexpr, WARM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    u_ptr += row * stride
    m = tl.full([1], float("-inf"), tl.float32)
    total, moment = tl.zeros([1], tl.float32), tl.zeros([1], tl.float32)
    for start in range(0, vocab, BLOCK):
        v = start + tl.arange(0, BLOCK)
        u = tl.load(u_ptr + v, mask=v < vocab, other=0.0).to(tl.float32)
        s, _ = scores(u, heat, cold, softcap, per_softcap, CAPPED, WARM)
        s = tl.where(v < vocab, s, float("-inf"))
        m, total, moment = absorb(m, total, moment, s)
    y = tl.load(target_ptr + row) + tl.arange(0, 1)
    u = tl.load(u_ptr + y).to(tl.float32)
    taken, _ = scores(u, heat, cold, softcap, per_softcap, CAPPED, WARM)
    one, log_sum = row + tl.arange(0, 1), log_of(total)
    tl.store(logp_ptr + one, (taken - m) - log_sum)
    tl.store(stats_ptr + 3 * one, m)
    tl.store(stats_ptr + 3 * one + 1, log_sum)
    tl.store(stats_ptr + 3 * one + 2, log_sum - moment / total)


@triton.jit
def grad_kernel(
    u_ptr, target_ptr, stats_ptr, g_ptr, h_ptr, du_ptr, stride, vocab, heat, cold, softcap,
    per_softcap, CAPPED: tl.constexpr, WARM: tl.constexpr, ENTROPY: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    v = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = row * stride + v
    u = tl.load(u_ptr + at, mask=v < vocab, other=0.0).to(tl.float32)
    s, ds = scores(u, heat, cold, softcap, per_softcap, CAPPED, WARM)
    stats_ptr += 3 * row
    log_p = (s - tl.load(stats_ptr)) - tl.load(stats_ptr + 1)
    p = tl.exp(log_p)
    g = tl.load(g_ptr + row)
    du = g * (tl.where(v == tl.load(target_ptr + row), 1.0, 0.0) - p)
    live = g != 0
    if ENTROPY:
        h = tl.load(h_ptr + row)
        plogp = tl.where(p > 0, p * log_p, p * 0.0)
        du -= h * (plogp + p * tl.load(stats_ptr + 2))
        live |= h != 0
    du = tl.where(live, du * ds, 0.0)
    tl.store(du_ptr + at, du.to(du_ptr.dtype.element_ty), mask=v < vocab)


class Logp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, target, temperature, softcap, entropy):
        taken, stats = row_stats(u, target, temperature, softcap)
        ctx.save_for_backward(u, target, stats)
        ctx.known = (temperature, softcap, entropy)
        return taken, stats[:, 2].clone()

    @staticmethod
    def backward(ctx, g, h):  # type: ignore[override]
        u, target, stats = ctx.saved_tensors
        temperature, softcap, entropy = ctx.known
        du = torch.empty_like(u)
        row_grad(u, target, stats, g, h if entropy else None, du, temperature, softcap)
        return du, None, None, None, None


def logp(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,) int64
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    taken, ent = Logp.apply(logits, target, temperature, softcap, entropy)
    return taken, ent if entropy else None


def row_stats(
    u: Tensor, target: Tensor, temperature: float, softcap: float | None
) -> tuple[Tensor, Tensor]:  # logp (N,) and (max, log sum above it, entropy) (N, 3), fp32
    assert u.is_contiguous() and target.is_contiguous()
    rows, vocab = u.shape
    taken = torch.empty(rows, dtype=torch.float32, device=u.device)
    stats = torch.empty((rows, 3), dtype=torch.float32, device=u.device)
    if rows:
        stats_kernel[(rows,)](
            u, target, taken, stats, u.stride(0), vocab, *_factors(temperature, softcap),
            **_flags(temperature, softcap), BLOCK=block(vocab, 4096), num_warps=4, **ROUNDED,
        )  # fmt: skip
    return taken, stats


def row_grad(
    u: Tensor, target: Tensor, stats: Tensor, g: Tensor, h: Tensor | None, du: Tensor,
    temperature: float, softcap: float | None,
) -> None:  # fmt: skip
    """Write dL/du; du may be u itself."""
    assert u.is_contiguous() and du.is_contiguous()
    rows, vocab = u.shape
    if u.numel() == 0:
        return
    size = block(vocab, 2048)
    g = g.contiguous()
    grad_kernel[(rows, triton.cdiv(vocab, size))](
        u, target, stats, g, g if h is None else h.contiguous(), du, u.stride(0), vocab,
        *_factors(temperature, softcap), **_flags(temperature, softcap), ENTROPY=h is not None,
        BLOCK=size, num_warps=8, **ROUNDED,
    )  # fmt: skip


def _factors(temperature: float, softcap: float | None) -> tuple[float, float, float, float]:
    return temperature, 1.0 / temperature, softcap or 1.0, 1.0 / (softcap or 1.0)


def _flags(temperature: float, softcap: float | None) -> dict[str, bool]:
    return {"CAPPED": softcap is not None, "WARM": temperature != 1.0}
