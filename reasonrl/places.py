"""Where packed tokens stand, for attention on a CPU (kernels/native_decoder.py): a prompt is a
block of tokens that see their own, a completion one that sees its prompt and its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def packing(layout: Sequence[tuple[int, int, Sequence[int]]]) -> Tensor:
    """The blocks (N, 3) int64 of a packed batch, (start, prompt tokens, tokens of each completion)
    a group: prompts first; a block's first token, its tokens, its prompt's block or -1."""
    blocks = [(start, count, -1) for start, count, _ in layout]
    for group, (start, count, sizes) in enumerate(layout):
        at = start + count
        for size in sizes:
            blocks.append((at, size, group))
            at += size
    return torch.tensor(blocks, dtype=torch.long).view(-1, 3)
