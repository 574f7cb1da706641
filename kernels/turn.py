"""Heads of packed tokens on a GPU before attention reads them: turned by the rotary embedding, and
normed before it where a model has norms of heads.

    q, k = turn(w n),  n = x / sqrt(mean(x^2) + eps) in x's dtype
    dx = r (w g - n mean(w g n)),  dw = sum over tokens and heads of g n,  r = 1 / rms

Legend: L tokens, H query and K key heads of size d, q k v of a token side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonrl.kernels.common import available
from reasonrl.kernels.layers import SHARES

__all__ = ["angles", "available", "block_of", "head_norm_grad_", "turn_", "turned"]


@triton.jit
def angles(cos_ptr, sin_ptr, row, c, half):
    """(1, half) each: cos and sin of the first halves, then of the second."""
    at, real = row * 2 * half + c, c < half
    cos_a = tl.load(cos_ptr + at, mask=real, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos_ptr + at + half, mask=real, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin_ptr + at, mask=real, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin_ptr + at + half, mask=real, other=0.0).to(tl.float32)[None, :]
    return cos_a, cos_b, sin_a, sin_b


@triton.jit
def of_either(q_ptr, k_ptr, at, real, is_q):
    """(HEADS, half), the weights of q's heads or of k's."""
    q = tl.load(q_ptr + at, mask=real, other=0.0).to(tl.float32)[None, :]
    k = tl.load(k_ptr + at, mask=real, other=0.0).to(tl.float32)[None, :]
    return tl.where(is_q, q, k)


@triton.jit
def turn_kernel(
    qkv_ptr, out_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, heads, turned, all_heads,
    out_heads, half, eps, NORMED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row, h, c = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS), tl.arange(0, HALF)
    cos_a, cos_b, sin_a, sin_b = angles(cos_ptr, sin_ptr, row, c, half)
    h += tl.program_id(1) * HEADS
    at = (row * all_heads + h)[:, None] * (2 * half) + c[None, :]
    real = (h < turned)[:, None] & (c < half)[None, :]
    kind = qkv_ptr.dtype.element_ty
    a = tl.load(qkv_ptr + at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(qkv_ptr + at + half, mask=real, other=0.0).to(tl.float32)
    if NORMED:
        is_q = (h < heads)[:, None]
        square = (tl.sum(a * a, 1) + tl.sum(b * b, 1))[:, None]
        scale = 1.0 / tl.sqrt_rn(square / (2 * half) + eps)
        a, b = (a * scale).to(kind).to(tl.float32), (b * scale).to(kind).to(tl.float32)
        a *= of_either(q_norm_ptr, k_norm_ptr, c, c < half, is_q)
        b *= of_either(q_norm_ptr, k_norm_ptr, half + c, c < half, is_q)
    at = (row * out_heads + h)[:, None] * (2 * half) + c[None, :]
    tl.store(out_ptr + at, (a * cos_a - b * sin_a).to(kind), mask=real)
    tl.store(out_ptr + at + half, (b * cos_b + a * sin_b).to(kind), mask=real)


@triton.jit
def head_norm_grad_kernel(
    qkv_ptr, grad_ptr, q_norm_ptr, k_norm_ptr, part_ptr, rows, heads, turned, all_heads, size, eps,
    LEARNT: tl.constexpr, HEADS: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    first, c = tl.program_id(0), tl.arange(0, SIZE)
    kind = qkv_ptr.dtype.element_ty
    inside = c < size
    by_q, by_k = tl.zeros([SIZE], tl.float32), tl.zeros([SIZE], tl.float32)
    token = first.to(tl.int64) * all_heads * size
    for _ in range(first, rows, tl.num_programs(0)):
        for start in range(0, turned, HEADS):
            h = start + tl.arange(0, HEADS)
            at = token + h[:, None] * size + c[None, :]
            real, is_q = (h < turned)[:, None] & inside[None, :], (h < heads)[:, None]
            x = tl.load(qkv_ptr + at, mask=real, other=0.0).to(tl.float32)
            g = tl.load(grad_ptr + at, mask=real, other=0.0).to(tl.float32)
            scale = 1.0 / tl.sqrt_rn(tl.sum(x * x, 1)[:, None] / size + eps)
            n = (x * scale).to(kind).to(tl.float32)
            by_q += tl.sum(tl.where(is_q, g * n, 0.0), 0)
            by_k += tl.sum(tl.where(is_q, 0.0, g * n), 0)
            g *= of_either(q_norm_ptr, k_norm_ptr, c, inside, is_q)
            d = scale * (g - n * (tl.sum(g * n, 1)[:, None] / size))
            tl.store(grad_ptr + at, d.to(kind), mask=real)
        token += tl.num_programs(0).to(tl.int64) * all_heads * size
    if LEARNT:
        at = first.to(tl.int64) * 2 * size + c
        tl.store(part_ptr + at, by_q, mask=inside)
        tl.store(part_ptr + at + size, by_k, mask=inside)


def turn_(
    qkv: Tensor,  # (L, H + 2 K, d), contiguous
    cos: Tensor,  # (L, d)
    sin: Tensor,  # (L, d)
    key_heads: int,
    norms: Sequence[Tensor] = (),  # weights (d,) of the norms of q's heads and of k's
    eps: float = 0.0,
) -> None:
    """The rotary embedding of q and k, normed before it where there are norms, in place."""
    _turn(qkv, cos, sin, key_heads, norms, eps, qkv)


def turned(
    qkv: Tensor, cos: Tensor, sin: Tensor, key_heads: int, norms: Sequence[Tensor], eps: float
) -> Tensor:  # (L, H + K, d)
    """The same beside what came in."""
    tokens, heads, size = qkv.shape
    out = qkv.new_empty((tokens, heads - key_heads, size))
    _turn(qkv, cos, sin, key_heads, norms, eps, out)
    return out


def _turn(qkv, cos, sin, key_heads: int, norms: Sequence[Tensor], eps: float, out: Tensor) -> None:
    tokens, heads, size = qkv.shape
    many, half, shape = block_of(heads - key_heads, size)
    assert qkv.is_contiguous() and cos.is_contiguous() and sin.is_contiguous()
    turn_kernel[(tokens, many)](
        qkv, out, cos, sin, *(norms or (qkv, qkv)), heads - 2 * key_heads, heads - key_heads, heads,
        out.shape[1], half, eps, NORMED=bool(norms), **shape, num_warps=4,
    )  # fmt: skip


def head_norm_grad_(
    grad: Tensor,  # (L, H + 2 K, d), by q and k as they were normed, contiguous; by v
    qkv: Tensor,  # (L, H + 2 K, d), as it was before
    key_heads: int,
    norms: Sequence[Tensor],
    eps: float,
    learnt: bool,  # whether the weights want their gradients
) -> Tensor | None:  # (2, d) fp32, by the weights
    """grad becomes that by q and k before their norms."""
    tokens, heads, size = qkv.shape
    wide = triton.next_power_of_2(size)
    some = min(triton.next_power_of_2(heads - key_heads), max(1, 2048 // wide))
    shares = min(tokens, SHARES)
    part = qkv.new_empty((shares if learnt else 0, 2, size), dtype=torch.float32)
    assert qkv.is_contiguous() and grad.is_contiguous()
    head_norm_grad_kernel[(shares,)](
        qkv, grad, *norms, part, tokens, heads - 2 * key_heads, heads - key_heads, heads, size,
        eps, LEARNT=learnt, HEADS=some, SIZE=wide, num_warps=8,
    )  # fmt: skip
    return part.sum(0) if learnt else None


def block_of(heads: int, size: int) -> tuple[int, int, dict[str, int]]:
    """Programs a token, half a head, and a program's share: some 4096 numbers at most."""
    wide = max(16, triton.next_power_of_2(size // 2))
    some = min(triton.next_power_of_2(heads), max(1, 2048 // wide))
    return triton.cdiv(heads, some), size // 2, {"HEADS": some, "HALF": wide}
