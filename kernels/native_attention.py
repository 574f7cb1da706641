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
    q: Tensor,  # (B, H, d)
    k: Tensor,  # (B, K, d)
    v: Tensor,  # (B, K, d)
    keys: Tensor,  # (B, K, W, d), written in place
    values: Tensor,  # (B, K, W, d), written in place
    length: Tensor,  # (B,) int64
    scaling: float,
) -> Tensor:  # (B, H, d)
    """Places k and v behind a row's `length` tokens; attention over all it then holds."""
    out = torch.empty(q.shape, dtype=keys.dtype)
    sizes = q.shape[0], q.shape[1], *keys.shape[1:]
    kinds = (DTYPES[x.dtype] for x in (q, k, v, keys))
    given = (pointer(x) for x in (q, k, v, keys, values, length, out))
    core().attend_slots(*given, *sizes, *kinds, scaling, threads())
    return out
