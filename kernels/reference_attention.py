"""The specification of the attention ops, in plain torch (see `reference`).

    p = softmax(scaling s where seen)

    keys[b, :, n] = k_b,  values[b, :, n] = v_b,  n = length[b]
    o = softmax(scaling q K^T) V over places 0 .. n

Legend: B rows, H query heads, K key/value heads, R queries, W places, d head width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_softmax(
    scores: Tensor,  # (B, K, N, W), may be overwritten
    sees: Tensor,  # (B or 1, 1, R, W) bool, something in every row; N is a multiple of R
    scaling: float,
) -> Tensor:  # (B, K, N, W), in the scores' dtype
    """Places that are not seen may hold anything and get weight 0; made in fp32 at least."""
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    batch, heads, rows, _ = scores.shape
    wide = wide.reshape(batch, heads * rows // sees.shape[2], *sees.shape[2:])
    weight = wide.masked_fill(~sees, -torch.inf).softmax(-1)
    return weight.to(scores.dtype).reshape(scores.shape)


def slot_attention(
    q: Tensor,  # (B, H, d)
    k: Tensor,  # (B, K, d)
    v: Tensor,  # (B, K, d)
    keys: Tensor,  # (B, K, W, d), written in place
    values: Tensor,  # (B, K, W, d), written in place
    length: Tensor,  # (B,) int64
    scaling: float,
) -> Tensor:  # (B, H, d), in the slots' dtype
    """Places behind a row's own length may hold anything."""
    rows = torch.arange(len(length), device=length.device)
    for cache, new in ((keys, k), (values, v)):
        cache[rows, :, length] = new.to(cache.dtype)
    unseen = torch.arange(keys.shape[2], device=length.device) > length[:, None]  # (B, W)
    grouped = q.to(keys.dtype).unflatten(1, (keys.shape[1], -1))  # (B, K, H / K, d)
    scores = grouped @ keys.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    weight = scores.masked_fill(unseen[:, None, None], -torch.inf).softmax(-1)
    seen = values.masked_fill(unseen[:, None, :, None], 0)
    return (weight.to(values.dtype) @ seen).flatten(1, 2)
