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

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonrl.kernels.common import available, log_of
from reasonrl.kernels.turn import angles, block_of

__all__ = ["attend", "attend_grad", "available"]

COMPLETION, PROMPT = tl.constexpr(1), tl.constexpr(2)  # of a group that has both; 0: neither


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
        many, _, shape = block_of(heads, size)
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
    many, half, shape = block_of(by_qkv.shape[1], size)
    back_kernel[(tokens, many)](
        *(x.contiguous() for x in (*one, *more)), *turn, calls.role, by_qkv,
        heads, key_heads, half, **shape, num_warps=4,
    )  # fmt: skip
    return by_qkv


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
