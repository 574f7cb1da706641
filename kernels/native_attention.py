"""Attention on the CPU: the softmax of scores that torch multiplies, and one new token a row over
the slots of a static cache."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonrl.kernels.native import DTYPES, core, pointer, threads


def masked_softmax(
    scores: Tensor,  # (B, K, N, W), overwritten
    sees: Tensor,  # (B or 1, 1, R, W) bool; N is a multiple of R
    scaling: float,
) -> Tensor:  # (B, K, N, W)
    """softmax(scaling * scores where seen), in place; the gradient needs its result alone."""
    return _MaskedSoftmax.apply(scores, sees, scaling)


class _MaskedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, sees, scaling):
        batch, heads, rows, width = scores.shape
        queries, shared = sees.shape[2], sees.shape[0] != batch
        ctx.known = (
            batch, heads * rows // queries, queries, width, DTYPES[scores.dtype], shared, scaling,
        )  # fmt: skip
        task = core().SoftmaxTask(pointer(scores), pointer(sees), *ctx.known)
        core().masked_softmax(task, threads())
        ctx.mark_dirty(scores)
        ctx.save_for_backward(scores)
        return scores

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        grad, out = grad.contiguous(), torch.empty_like(weight)
        task = core().SoftmaxTask(pointer(weight), 0, *ctx.known)
        core().masked_softmax_grad(task, pointer(grad), pointer(out), threads())
        return out, None, None


def slot_attention(
    q: Tensor,  # (B, H, d), rows any way apart
    k: Tensor,  # (B, K, d), the same
    v: Tensor,  # (B, K, d), the same
    keys: Tensor,  # (B, K, W, d), written in place
    values: Tensor,  # (B, K, W, d), written in place
    length: Tensor,  # (B,) int64
    scaling: float,
) -> Tensor:  # (B, H, d)
    """Places k and v behind a row's `length` tokens; attention over all it then holds."""
    q, k, v = (whole_rows(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=keys.dtype)
    sizes = *q.shape[:2], *keys.shape[1:], q.stride(0), k.stride(0), v.stride(0)
    kinds = (DTYPES[x.dtype] for x in (q, k, v, keys))
    given = (pointer(x) for x in (q, k, v, keys, values, length, out))
    core().attend_slots(*given, *sizes, *kinds, scaling, 0, 0, 0, threads())
    return out


def whole_rows(x: Tensor) -> Tensor:
    """x (N, heads, d) as it is where the heads of a row stand together, else a copy."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()


def turned_slot_attention(
    qkv: Tensor,  # (B, (H + 2 K) d), contiguous
    cos: Tensor,  # (B, d)
    sin: Tensor,  # (B, d)
    keys: Tensor,  # (B, K, W, d), written in place
    values: Tensor,  # (B, K, W, d), written in place
    length: Tensor,  # (B,) int64
    scaling: float,
) -> Tensor:  # (B, H d)
    """The rotary embedding of q and k, then `slot_attention`, of what one product gave."""
    (rows, width), (_, heads, room, size) = qkv.shape, keys.shape
    queries = width // size - 2 * heads
    out = torch.empty((rows, queries * size), dtype=keys.dtype)
    start, step = qkv.data_ptr(), size * qkv.element_size()
    given = start, start + queries * step, start + (queries + heads) * step
    given += tuple(map(pointer, (keys, values, length, out)))
    own, kept = DTYPES[qkv.dtype], DTYPES[keys.dtype]
    core().attend_slots(
        *given, rows, queries, heads, room, size, width, width, width, own, own, own, kept, scaling,
        pointer(cos), pointer(sin), DTYPES[cos.dtype], threads(),
    )  # fmt: skip
    return out
