"""log p of the taken token from hidden states, Triton: logits live in registers, a tile at a time.

    u = x W^T + b, then `logp`'s formulae. Forward: 2 N D V FLOP, each program walks its part of the
    vocabulary for a block of rows and leaves (max, S, Q, s_y); the parts are merged in fixed order.
    Backward: the tile is made again, dL/du goes to a scratch of at most SCRATCH bytes, and dX = dU
    W, dW += dU^T X are matrix products; dW is summed in fp32. 8 N D V FLOP together. Rows whose
    gradients are both 0 are left out of the backward products exactly.
Legend: N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonrl.kernels.common import absorb, available, flag, merged, scores

__all__ = ["available", "linear_logp"]

SCRATCH = 1 << 28  # bytes of dU alive at one time
PARTS = 64  # programs that share the vocabulary of a block of rows, at most


@triton.jit
def _tile(
    x_ptr, w_ptr, b_ptr, rows, v, n, hidden, vocab, BIAS: tl.constexpr, ROWS: tl.constexpr,
    COLS: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """u (ROWS, COLS) of rows x columns, in fp32."""
    acc = tl.zeros([ROWS, COLS], tl.float32)
    for start in range(0, hidden, DEPTH):
        k = start + tl.arange(0, DEPTH)
        inside = k < hidden
        x = tl.load(
            x_ptr + rows[:, None] * hidden + k[None, :],
            mask=(rows < n)[:, None] & inside[None, :],
            other=0.0,
        )
        w = tl.load(
            w_ptr + v[None, :] * hidden + k[:, None],
            mask=(v < vocab)[None, :] & inside[:, None],
            other=0.0,
        )
        if EXACT:
            acc = tl.dot(x, w, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, w, acc)
    if BIAS:
        acc += tl.load(b_ptr + v, mask=v < vocab, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["n"])
def stats_kernel(
    x_ptr, w_ptr, b_ptr, target_ptr, out_ptr, n, hidden, vocab, part, temperature, softcap,
    BIAS: tl.constexpr, CAPPED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    y = tl.load(target_ptr + rows, mask=rows < n, other=-1)
    m = tl.full([ROWS], float("-inf"), tl.float32)
    total, moment = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS], tl.float32)
    taken = tl.zeros([ROWS], tl.float32)
    first = tl.program_id(1) * part
    for start in range(first, tl.minimum(first + part, vocab), COLS):
        v = (start + tl.arange(0, COLS)).to(tl.int64)
        u = _tile(x_ptr, w_ptr, b_ptr, rows, v, n, hidden, vocab, BIAS, ROWS, COLS, DEPTH, EXACT)
        s, _ = scores(u, temperature, softcap, CAPPED)
        s = tl.where((v < vocab)[None, :], s, float("-inf"))
        taken += tl.sum(tl.where(v[None, :] == y[:, None], s, 0.0), 1)
        m, total, moment = absorb(m, total, moment, s, 1)
    out_ptr += tl.program_id(1).to(tl.int64) * 4 * n + rows
    tl.store(out_ptr, m, mask=rows < n)
    tl.store(out_ptr + n, total, mask=rows < n)
    tl.store(out_ptr + 2 * n, moment, mask=rows < n)
    tl.store(out_ptr + 3 * n, taken, mask=rows < n)


@triton.jit(do_not_specialize=["n"])
def grad_kernel(
    x_ptr, w_ptr, b_ptr, target_ptr, stats_ptr, g_ptr, h_ptr, du_ptr, n, hidden, vocab,
    temperature, softcap, BIAS: tl.constexpr, CAPPED: tl.constexpr, ENTROPY: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, DEPTH: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    v = (tl.program_id(1) * COLS + tl.arange(0, COLS)).to(tl.int64)
    u = _tile(x_ptr, w_ptr, b_ptr, rows, v, n, hidden, vocab, BIAS, ROWS, COLS, DEPTH, EXACT)
    s, ds = scores(u, temperature, softcap, CAPPED)
    stats_ptr += 3 * rows
    log_p = s - tl.load(stats_ptr, mask=rows < n, other=0.0)[:, None]
    log_p -= tl.load(stats_ptr + 1, mask=rows < n, other=0.0)[:, None]
    p = tl.exp(log_p)
    y = tl.load(target_ptr + rows, mask=rows < n, other=-1)
    g = tl.load(g_ptr + rows, mask=rows < n, other=0.0)
    du = g[:, None] * (tl.where(v[None, :] == y[:, None], 1.0, 0.0) - p)
    if ENTROPY:
        h = tl.load(h_ptr + rows, mask=rows < n, other=0.0)
        ent = tl.load(stats_ptr + 2, mask=rows < n, other=0.0)
        du -= h[:, None] * (tl.where(p > 0, p * log_p, p * 0.0) + p * ent[:, None])
    at = rows[:, None] * vocab + v[None, :]
    here = (rows < n)[:, None] & (v < vocab)[None, :]
    tl.store(du_ptr + at, (du * ds).to(du_ptr.dtype.element_ty), mask=here)


class LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, bias, target, scale, entropy):
        taken, stats = head_stats(x, w, bias, target, scale)
        ctx.save_for_backward(x, w, bias, target, stats)
        ctx.known = (scale, entropy)
        return taken, stats[:, 2].clone()

    @staticmethod
    def backward(ctx, g, h):  # type: ignore[override]
        x, w, bias, target, stats = ctx.saved_tensors
        scale, entropy = ctx.known
        h = h if entropy else None
        live = (g != 0 if h is None else (g != 0) | (h != 0)).nonzero()[:, 0]
        dx, dw = torch.zeros_like(x), torch.zeros_like(w, dtype=torch.float32)
        db = torch.zeros(w.shape[0], dtype=torch.float32, device=w.device)
        size = max(1, SCRATCH // max(1, w.shape[0] * x.element_size()))
        for rows in live.split(size):
            part = x[rows]
            given = (stats[rows], g[rows], None if h is None else h[rows])
            du = head_grad(part, w, bias, target[rows], *given, scale)
            dx.index_copy_(0, rows, (du @ w).to(dx.dtype))
            dw += du.t() @ part
            db += du.sum(0, dtype=torch.float32)
        db = None if bias is None else db.to(bias.dtype)
        return dx, dw.to(w.dtype), db, None, None, None


def linear_logp(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    dtype = torch.promote_types(hidden.dtype, weight.dtype)
    x, w = hidden.to(dtype).contiguous(), weight.to(dtype).contiguous()
    taken, ent = LinearLogp.apply(x, w, bias, target, (temperature, softcap), entropy)
    return taken, ent if entropy else None


def head_stats(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, scale: tuple[float, float | None]
) -> tuple[Tensor, Tensor]:  # logp (N,) and (max, log sum above it, entropy) (N, 3), fp32
    n, (vocab, hidden) = x.shape[0], w.shape
    if n == 0:
        empty = torch.zeros((0, 3), dtype=torch.float32, device=x.device)
        return empty[:, 0], empty
    known = config(x)
    part = triton.cdiv(triton.cdiv(vocab, known["COLS"]), PARTS) * known["COLS"]
    parts = triton.cdiv(vocab, part)
    out = torch.empty((parts, 4, n), dtype=torch.float32, device=x.device)
    stats_kernel[(triton.cdiv(n, known["ROWS"]), parts)](
        x, w, flag(bias, w), target, out, n, hidden, vocab, part, scale[0], scale[1] or 1.0,
        BIAS=bias is not None, CAPPED=scale[1] is not None, **known,
    )  # fmt: skip
    m, total, moment, taken = out.unbind(1)
    stats = merged(m, total, moment)
    return (taken.sum(0) - stats[:, 0]) - stats[:, 1], stats


def head_grad(
    x: Tensor, w: Tensor, bias: Tensor | None, target: Tensor, stats: Tensor, g: Tensor,
    h: Tensor | None, scale: tuple[float, float | None],
) -> Tensor:  # dL/du (N, V) in the dtype of x  # fmt: skip
    n, (vocab, hidden) = x.shape[0], w.shape
    du = torch.empty((n, vocab), dtype=x.dtype, device=x.device)
    known = config(x)
    if du.numel():
        grad_kernel[(triton.cdiv(n, known["ROWS"]), triton.cdiv(vocab, known["COLS"]))](
            x, w, flag(bias, w), target, stats, g, flag(h, g), du, n, hidden, vocab, scale[0],
            scale[1] or 1.0, BIAS=bias is not None, CAPPED=scale[1] is not None,
            ENTROPY=h is not None, **known,
        )  # fmt: skip
    return du


def config(x: Tensor) -> dict:
    """Tile sizes that build without spills (tests/test_triton.py): half types, or fp32 done
    exactly."""
    if x.dtype == torch.float32:
        return {"ROWS": 32, "COLS": 64, "DEPTH": 32, "EXACT": True, "num_warps": 4, "num_stages": 2}
    return {"ROWS": 128, "COLS": 64, "DEPTH": 64, "EXACT": False, "num_warps": 8, "num_stages": 3}
