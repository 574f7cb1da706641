"""A token a row from its logits on the CPU, nothing of the vocabulary's size written."""

from __future__ import annotations

import torch
from torch import Tensor

from reasonrl.kernels.native import DTYPES, core, pointer, threads


def draw(
    logits: Tensor,  # (B, V), contiguous
    uniform: Tensor,  # (B,) float64 in [0, 1)
    temperature: float,  # above 0
) -> tuple[Tensor, Tensor]:  # (B,) int64 and (B,) fp32
    """The inverse transform of softmax(logits / temperature), and log p of what it gave: NaN, of
    token 0, where a row has no distribution."""
    rows, vocab = logits.shape
    token, logp = torch.empty(rows, dtype=torch.long), torch.empty(rows)
    given = (pointer(x) for x in (logits, uniform, token, logp))
    core().draw(*given, rows, vocab, DTYPES[logits.dtype], temperature, threads())
    return token, logp
