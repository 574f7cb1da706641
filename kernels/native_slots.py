"""Attention of one new token a row over the slots of a static cache, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonrl.kernels.native import DTYPES, core, pointer, threads


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
