"""Where packed tokens stand among the blocks of batched products, for attention on a CPU.

Prompts are blocks of their own tokens; completions are blocks that see their prompt and themselves.
Legend: L packed tokens, N blocks of W queries among S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Back = tuple[Tensor, Tensor]  # (L + 1,) int64, where each token's places begin, and the places


@dataclass(frozen=True)
class Part:
    """Blocks of queries with the keys that they look among; -1 where there is no token."""

    queries: Tensor  # (N, W) int64
    keys: Tensor  # (N, S) int64
    sees: Tensor  # (N or 1, 1, W, S) bool, something in every row

    @property
    def scores(self) -> int:
        """Of one head."""
        return len(self.queries) * self.block

    @property
    def block(self) -> int:
        """Scores of a block, of one head."""
        return self.queries.shape[1] * self.keys.shape[1]


@dataclass(frozen=True)
class Packing:
    """One part or two; every token is a query once, and a key at least once. A place is
    2 (n S + s) + the number of its part."""

    parts: Sequence[Part]
    queries: Back
    keys: Back


def packing(layout: Sequence[tuple[int, int, Sequence[int]]]) -> Packing:
    """Of a packed batch: (start, prompt tokens, tokens of each completion) a group, on the CPU."""
    prompts, rows, owner, length = [], [], [], 0
    for group, (start, count, sizes) in enumerate(layout):
        prompts.append((start, count))
        length = start + count
        for size in sizes:
            rows.append((length, size))
            owner.append(group)
            length += size
    first = _placed(prompts)
    parts = [Part(first, first, _causal(first.shape[1]))]
    if rows:
        own = _placed(rows)
        keys = torch.cat([first[owner], own], 1)
        known = (first[owner] >= 0)[:, None, None, :].expand(-1, 1, own.shape[1], -1)
        itself = _causal(own.shape[1]).expand(len(rows), -1, -1, -1)
        parts.append(Part(own, keys, torch.cat([known, itself], -1)))
    queries, keys = ([getattr(part, name) for part in parts] for name in ("queries", "keys"))
    return Packing(parts, _back(queries, length), _back(keys, length))


def _placed(spans: Sequence[tuple[int, int]]) -> Tensor:
    start, count = torch.tensor(spans, dtype=torch.long).view(-1, 2).T[:, :, None]
    step = torch.arange(int(count.max()) if len(spans) else 0)
    return torch.where(step < count, start + step, -1)


def _causal(width: int) -> Tensor:
    return torch.ones(width, width, dtype=torch.bool).tril()[None, None]


def _back(places: Sequence[Tensor], length: int) -> Back:
    entry = torch.cat([2 * torch.arange(p.numel()) + part for part, p in enumerate(places)])
    token, order = torch.cat([p.flatten() for p in places]).sort(stable=True)
    first = torch.searchsorted(token, torch.arange(length + 1))
    return first - first[0], entry[order[int(first[0]) :]]
