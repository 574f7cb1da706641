"""Where the sequences of a packing stand, for the two calls of a flash kernel (kernels/packed.py)
that make its attention. Legend: L tokens, S sequences, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

COMPLETION, PROMPT = 1, 2  # roles of a token in a group that has both; 0: neither


@dataclass(frozen=True)
class Call:
    """Sequences of queries, each with the keys that it asks: int32 offsets on the device."""

    asks: Tensor  # (S + 1,)
    asked: Tensor  # (S + 1,)
    most: tuple[int, int]  # the longest of each


@dataclass(frozen=True)
class Calls:
    """Where the sequences of a packing stand, for both calls."""

    alone: Call  # every prompt and completion with itself
    shared: Call | None  # three a group: its prompt asks nothing, its completions the prompt, and
    # nobody asks the completions; None where there is no completion
    role: Tensor  # (L,) int8


def calls(layout: Sequence[tuple[int, int, Sequence[int]]], device) -> Calls:
    """Of a packing [prompt | completion | completion ...]: (start, prompt length, lengths)."""
    sizes = [n for _, prompt, rows in layout for n in (prompt, *rows)]
    groups = [(prompt, sum(rows)) for _, prompt, rows in layout]

    def offsets(lengths: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    own, longest, shared = offsets(sizes), max(sizes, default=0), None
    if any(rows for _, rows in groups):
        most = max(max(group) for group in groups)
        shared = Call(
            offsets([n for prompt, rows in groups for n in (prompt, rows, 0)]),
            offsets([n for prompt, rows in groups for n in (0, prompt, rows)]),
            (most, most),
        )
    kinds = [k if rows else 0 for _, rows in groups for k in (PROMPT, COMPLETION)]
    count = torch.tensor([n for group in groups for n in group])
    role = torch.tensor(kinds, dtype=torch.int8).repeat_interleave(count)
    return Calls(Call(own, own, (longest, longest)), shared, role.to(device))
