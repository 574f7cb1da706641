"""Gradients clipped by their norm over all of them, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reasonrl.kernels.native import core, pointer, threads


def clip(grads: Sequence[Tensor], limit: float) -> float:  # fp32, contiguous
    """Their norm; where it is finite and above the limit they are scaled down to it, in place."""
    pieces = torch.tensor([(pointer(g), g.numel()) for g in grads], dtype=torch.long)
    return core().clip(pointer(pieces), len(grads), limit, threads())
