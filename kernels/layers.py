"""RMSNorm, with the residual before it, and SwiGLU on a GPU, forward and backward: one pass each.

    s = x + delta,  y = w n,  n = s / sqrt(mean(s^2) + eps) in s's dtype
    ds = r (w g - n mean(w g n)) + beside,  dw = sum over rows of g n,  r = 1 / rms
    h = silu(a) b,  da = g b sigma(a) (1 + a (1 - sigma(a))),  db = g silu(a)

Rows are fp32 inside. A backward also gives again what the forward gave, so that nobody keeps it. A
weight's gradient is summed by `SHARES` programs over rows of their own and then once over them: the
order is fixed. Legend: N rows, D width, F width of SwiGLU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonrl.kernels.common import available, block, flag

__all__ = ["add_rms_norm_", "available", "gate", "gate_grad", "norm", "norm_grad"]

WIDEST = 16384  # of a norm: a row stays in registers
SHARES = 264  # programs over which the rows of a weight's gradient are spread
WARPS = 4


@triton.jit
def norm_kernel(
    x_ptr, delta_ptr, weight_ptr, sum_ptr, y_ptr, scale_ptr, width, eps,
    ADDED: tl.constexpr, KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at, real = row * width + c, c < width
    x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(delta_ptr + at, mask=real, other=0.0).to(tl.float32)
        narrow = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, narrow, mask=real)
        x = narrow.to(tl.float32)
    scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, 0) / width + eps)
    n = (x * scale).to(x_ptr.dtype.element_ty).to(tl.float32)
    w = tl.load(weight_ptr + c, mask=real, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (w * n).to(y_ptr.dtype.element_ty), mask=real)
    if KEPT:
        tl.store(scale_ptr + row, scale)


@triton.jit
def norm_grad_kernel(
    x_ptr, weight_ptr, scale_ptr, grad_ptr, beside_ptr, out_ptr, narrow_ptr, again_ptr, part_ptr,
    rows, width, LEARNT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    first, c = tl.program_id(0), tl.arange(0, BLOCK)
    real = c < width
    w = tl.load(weight_ptr + c, mask=real, other=0.0).to(tl.float32)
    part = tl.zeros([BLOCK], tl.float32)
    at = first.to(tl.int64) * width + c
    for row in range(first, rows, tl.num_programs(0)):
        x = tl.load(x_ptr + at, mask=real, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptr + row)
        n = (x * scale).to(x_ptr.dtype.element_ty).to(tl.float32)
        g = tl.load(grad_ptr + at, mask=real, other=0.0).to(tl.float32)
        part += g * n
        again = again_ptr.dtype.element_ty
        tl.store(again_ptr + at, (w * n).to(again), mask=real)
        g *= w
        d = scale * (g - n * (tl.sum(g * n, 0) / width))
        d += tl.load(beside_ptr + at, mask=real, other=0.0).to(tl.float32)
        tl.store(out_ptr + at, d.to(out_ptr.dtype.element_ty), mask=real)
        tl.store(narrow_ptr + at, d.to(narrow_ptr.dtype.element_ty), mask=real)
        at += tl.num_programs(0).to(tl.int64) * width
    if LEARNT:
        tl.store(part_ptr + first.to(tl.int64) * width + c, part, mask=real)


@triton.jit
def gate_kernel(both_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = c < width
    a = tl.load(both_ptr + row * 2 * width + c, mask=real, other=0.0).to(tl.float32)
    b = tl.load(both_ptr + row * 2 * width + width + c, mask=real, other=0.0).to(tl.float32)
    h = a / (1.0 + tl.exp(-a)) * b
    tl.store(out_ptr + row * width + c, h.to(out_ptr.dtype.element_ty), mask=real)


@triton.jit
def gate_grad_kernel(both_ptr, grad_ptr, out_ptr, again_ptr, width, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real, at = c < width, row * 2 * width + c
    kind = out_ptr.dtype.element_ty
    a = tl.load(both_ptr + at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(both_ptr + at + width, mask=real, other=0.0).to(tl.float32)
    g = tl.load(grad_ptr + row * width + c, mask=real, other=0.0).to(tl.float32)
    share = 1.0 / (1.0 + tl.exp(-a))
    silu = a * share
    tl.store(again_ptr + row * width + c, (silu * b).to(kind), mask=real)
    tl.store(out_ptr + at, (g * b * (share + silu * (1.0 - share))).to(kind), mask=real)
    tl.store(out_ptr + at + width, (g * silu).to(kind), mask=real)


def norm(
    x: Tensor,  # (N, D)
    delta: Tensor | None,  # (N, D)
    weight: Tensor,  # (D,)
    eps: float,
    dtype: torch.dtype,  # of the norm
) -> tuple[Tensor, Tensor, Tensor]:  # (N, D) in `dtype`, (N, D) in x's, (N,) fp32
    """The norm of x + delta, the sum, and 1 / rms of its rows."""
    y, total = x.new_empty(x.shape, dtype=dtype), x if delta is None else torch.empty_like(x)
    scale = x.new_empty(len(x), dtype=torch.float32)
    _norm(x, delta, weight, eps, y, total, scale)
    return y, total, scale


def add_rms_norm_(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """The norm alone; the sum takes the place of x."""
    y = x.new_empty(x.shape, dtype=dtype)
    _norm(x, delta, weight, eps, y, x, None)
    return y


def _norm(x, delta, weight, eps: float, y: Tensor, total: Tensor, scale: Tensor | None) -> None:
    rows, width = x.shape
    assert x.is_contiguous() and width <= WIDEST and (delta is None or delta.is_contiguous())
    if rows:
        norm_kernel[(rows,)](
            x, flag(delta, x), weight, total, y, flag(scale, y), width, eps,
            ADDED=delta is not None, KEPT=scale is not None, BLOCK=block(width, WIDEST),
            num_warps=WARPS if width <= 4096 else 4 * WARPS,
        )  # fmt: skip


def norm_grad(
    x: Tensor,  # (N, D), what was normalised
    weight: Tensor,  # (D,)
    scale: Tensor,  # (N,), from `norm`
    grad: Tensor,  # (N, D), by the norm
    beside: Tensor,  # (N, D), by the sum itself
    learnt: bool,  # whether the weight wants its gradient
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """By the rows: in x's dtype and in grad's; the norm again, in grad's; by the weight (D,)."""
    rows, width = x.shape
    assert all(t.is_contiguous() for t in (x, grad, beside))
    out, narrow, again = torch.empty_like(x), torch.empty_like(grad), torch.empty_like(grad)
    shares = min(rows, SHARES)
    part = x.new_empty((shares if learnt else 0, width), dtype=torch.float32)
    if rows:
        norm_grad_kernel[(shares,)](
            x, weight, scale, grad, beside, out, narrow, again, part, rows, width, LEARNT=learnt,
            BLOCK=block(width, WIDEST), num_warps=WARPS if width <= 2048 else 4 * WARPS,
        )  # fmt: skip
    return out, narrow, again, part.sum(0).to(weight.dtype) if learnt else None


def gate(both: Tensor) -> Tensor:  # (N, 2 F), gate and up, contiguous -> (N, F)
    rows, width = both.shape[0], both.shape[1] // 2
    out = both.new_empty((rows, width))
    size = block(width, 1024)
    if rows:
        gate_kernel[(rows, triton.cdiv(width, size))](both, out, width, BLOCK=size, num_warps=WARPS)
    return out


def gate_grad(both: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """By gate and up, (N, 2 F), and what they gave, (N, F)."""
    rows, width = grad.shape
    assert both.is_contiguous() and grad.is_contiguous()
    out, again = torch.empty_like(both), torch.empty_like(grad)
    size = block(width, 1024)
    if rows:
        gate_grad_kernel[(rows, triton.cdiv(width, size))](
            both, grad, out, again, width, BLOCK=size, num_warps=WARPS
        )
    return out, again
