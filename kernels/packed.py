"""Attention over packed tokens on a GPU: no padding, no mask, no scores in memory. Torch's own
flash kernels twice, and what lies before, between and behind them in one pass each.

Every prompt and every completion attends to itself (one causal call), and a group's completions to
their prompt (one call more). The two softmaxes of a completion's token are one:

    lse = log(e^lse_a + e^lse_b),   o = e^(lse_a - lse) o_a + e^(lse_b - lse) o_b

The backward asks for each part's gradient with the joint o and lse, for which p = e^(s - lse) is
the joint softmax. The second call takes the whole packing, as three sequences a group: the prompt,
that asks nothing; the completions among the prompt; the completions' keys, that nobody asks for.
So nothing is gathered or scattered; rows that a call has nothing for are never read (`role`).
Legend: L tokens, H query and K key heads of size d.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonrl.kernels.common import available, log_of
from reasonrl.kernels.layers import SHARES

__all__ = ["attend", "attend_grad", "available", "head_norm_grad_", "turn_", "turned"]

COMPLETION, PROMPT = tl.constexpr(1), tl.constexpr(2)  # of a group that has both; 0: neither


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


@triton.jit
def merge_kernel(
    out_ptr, lse_ptr, more_ptr, above_ptr, role_ptr, tokens, heads, size, HEADS: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    row, h, c = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS), tl.arange(0, SIZE)
    if tl.load(role_ptr + row) == COMPLETION:
        h += tl.program_id(1) * HEADS
        own = tl.load(lse_ptr + h.to(tl.int64) * tokens + row, mask=h < heads, other=0.0)
        above = tl.load(above_ptr + h.to(tl.int64) * tokens + row, mask=h < heads, other=0.0)
        top = tl.maximum(own, above)
        joint = top + log_of(tl.exp(own - top) + tl.exp(above - top))
        at = (row * heads + h)[:, None] * size + c[None, :]
        real = (h < heads)[:, None] & (c < size)[None, :]
        a = tl.load(out_ptr + at, mask=real, other=0.0).to(tl.float32)
        b = tl.load(more_ptr + at, mask=real, other=0.0).to(tl.float32)
        mixed = tl.exp(own - joint)[:, None] * a + tl.exp(above - joint)[:, None] * b
        tl.store(out_ptr + at, mixed.to(out_ptr.dtype.element_ty), mask=real)
        tl.store(lse_ptr + h.to(tl.int64) * tokens + row, joint, mask=h < heads)


@triton.jit
def part_of(one_ptr, more_ptr, at, real, shared):
    """A gradient, and where it is shared that of the second call with it."""
    x = tl.load(one_ptr + at, mask=real, other=0.0).to(tl.float32)
    return x + tl.load(more_ptr + at, mask=real & shared, other=0.0).to(tl.float32)


@triton.jit
def back_kernel(
    q_ptr, k_ptr, v_ptr, q_more_ptr, k_more_ptr, v_more_ptr, cos_ptr, sin_ptr, role_ptr, out_ptr,
    heads, key_heads, half, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row, h, c = tl.program_id(0).to(tl.int64), tl.arange(0, HEADS), tl.arange(0, HALF)
    role = tl.load(role_ptr + row).to(tl.int32) + tl.zeros([1, 1], tl.int32)
    size = 2 * half
    kind = out_ptr.dtype.element_ty
    h += tl.program_id(1) * HEADS
    out_ptr += row * (heads + 2 * key_heads) * size
    is_q, is_k = h < heads, (h >= heads) & (h < heads + key_heads)
    is_v = (h >= heads + key_heads) & (h < heads + 2 * key_heads)
    inside, place = (c < half)[None, :], h[:, None] * size + c[None, :]

    at = row * heads * size + place
    real = is_q[:, None] & inside
    a = part_of(q_ptr, q_more_ptr, at, real, role == COMPLETION)
    b = part_of(q_ptr, q_more_ptr, at + half, real, role == COMPLETION)
    at = row * key_heads * size + place - heads * size
    real = is_k[:, None] & inside
    a += part_of(k_ptr, k_more_ptr, at, real, role == PROMPT)
    b += part_of(k_ptr, k_more_ptr, at + half, real, role == PROMPT)
    real = (is_q | is_k)[:, None] & inside
    cos_a, cos_b, sin_a, sin_b = angles(cos_ptr, sin_ptr, row, c, half)
    tl.store(out_ptr + place, (a * cos_a + b * sin_b).to(kind), mask=real)
    tl.store(out_ptr + place + half, (b * cos_b - a * sin_a).to(kind), mask=real)

    at = row * key_heads * size + place - (heads + key_heads) * size
    real = is_v[:, None] & inside
    a = part_of(v_ptr, v_more_ptr, at, real, role == PROMPT)
    b = part_of(v_ptr, v_more_ptr, at + half, real, role == PROMPT)
    tl.store(out_ptr + place, a.to(kind), mask=real)
    tl.store(out_ptr + place + half, b.to(kind), mask=real)


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
    many, half, shape = _block(heads - key_heads, size)
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


def attend(
    q: Tensor,  # (L, H, d), tokens any way apart
    k: Tensor,  # (L, K, d), the same
    v: Tensor,  # (L, K, d), the same
    calls: Any,  # calls.Calls
    scaling: float,
) -> tuple[Tensor, Tensor, list]:  # (L, H, d), log-sum-exp (H, L) fp32, states of random numbers
    out, lse, *state = _forward(q, k, v, calls.alone, True, scaling)
    states = [state]
    if calls.shared is not None:
        more, above, *state = _forward(q, k, v, calls.shared, False, scaling)
        states.append(state)
        tokens, heads, size = out.shape
        many, _, shape = _block(heads, size)
        merge_kernel[(tokens, many)](
            out, lse, more, above, calls.role, tokens, heads, size, HEADS=shape["HEADS"],
            SIZE=2 * shape["HALF"], num_warps=4,
        )  # fmt: skip
    return out, lse, states


def attend_grad(
    grad: Tensor,  # (L, H, d), contiguous
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    states: list,
    turn: tuple[Tensor, Tensor],  # cos and sin (L, d) that q and k were turned by
    calls: Any,
    scaling: float,
) -> Tensor:  # (L, H + 2 K, d), by q, k and v as they were before
    (tokens, heads, size), key_heads = grad.shape, k.shape[1]
    given = grad, q, k, v, out, lse
    one = more = _backward(*given, calls.alone, True, states[0], scaling)
    if calls.shared is not None:
        more = _backward(*given, calls.shared, False, states[1], scaling)
    by_qkv = grad.new_empty((tokens, heads + 2 * key_heads, size))
    many, half, shape = _block(by_qkv.shape[1], size)
    back_kernel[(tokens, many)](
        *(x.contiguous() for x in (*one, *more)), *turn, calls.role, by_qkv,
        heads, key_heads, half, **shape, num_warps=4,
    )  # fmt: skip
    return by_qkv


def _block(heads: int, size: int) -> tuple[int, int, dict[str, int]]:
    """Programs a token, half a head, and a program's share: some 4096 numbers at most."""
    wide = max(16, triton.next_power_of_2(size // 2))
    some = min(triton.next_power_of_2(heads), max(1, 2048 // wide))
    return triton.cdiv(heads, some), size // 2, {"HEADS": some, "HALF": wide}


def _forward(q, k, v, part, causal: bool, scaling: float):
    """(out, log-sum-exp (H, tokens) fp32, what the backward wants of random numbers)."""
    lengths = part.asks, part.asked, *part.most
    out, lse, *rng, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, causal, False, scale=scaling
    )
    return out, lse, *rng


def _backward(grad, q, k, v, out, lse, part, causal: bool, rng, scaling: float):
    lengths = part.asks, part.asked, *part.most
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, 0.0, causal, *rng, scale=scaling
    )
