"""Attention over packed tokens on the CPU: heads are spread over blocks and turned on the way,
torch multiplies, our softmax between, and blocks are summed back into the tokens' rows.

Products are made in runs whose scores stay in a cache. Kept for the gradient: what came in, and the
weights of the softmax where they are few. `packing` (places.Packing) says where each token stands.
Legend: L tokens, H query and K key heads of size d, N blocks of W queries
among S keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonrl.kernels.native import DTYPES, core, pointer, threads

KEPT = 1 << 24  # scores of a layer up to which their weights are kept: 32 MiB in bf16
TOGETHER = 1 << 22  # scores of a run


class Heads(NamedTuple):
    """Heads of every token, and the angles (L, d) by which they are turned."""

    x: Tensor  # (L, heads, d), tokens any way apart
    cos: Tensor | None = None
    sin: Tensor | None = None

    def known(self, width: Sequence[int]):
        kind = 0 if self.cos is None else DTYPES[self.cos.dtype]
        return *width, *self.x.shape[1:], self.x.stride(0), DTYPES[self.x.dtype], kind

    def spread(self, place: Tensor) -> Tensor:  # (N, W) -> (N, heads, W, d)
        _, heads, size = self.x.shape
        out = torch.empty((len(place), heads, place.shape[1], size), dtype=self.x.dtype)
        given = (pointer(t) for t in (*self, place, out))
        core().spread(core().SpreadTask(*given, *self.known(place.shape)), threads())
        return out

    def gather(self, blocks: Sequence[Tensor], back: tuple[Tensor, Tensor]) -> None:
        """x becomes the sums of blocks (N, heads, W, d), turned back."""
        one, other = (*blocks, None)[:2]
        widths = one.shape[2], 1 if other is None else other.shape[2]
        given = (pointer(t) for t in (one, other, self.cos, self.sin, *back, self.x))
        known = self.known((*widths, len(self.x)))
        core().gather(core().GatherTask(*given, *known), threads())


def attend(
    q: Heads, k: Heads, v: Heads, packing: Any, scaling: float
) -> tuple[Tensor, list[Tensor]]:  # (L, H, d) and the weights of every run, where they are kept
    """softmax(scaling q k^T where seen) v."""
    outs, weights = [], []
    keep = sum(part.scores for part in packing.parts) * q.x.shape[1] <= KEPT
    for part in packing.parts:
        qb, kb, vb = q.spread(part.queries), k.spread(part.keys), v.spread(part.keys)
        rows, keys, values = _rows(qb, kb), kb.flatten(0, 1), vb.flatten(0, 1)
        out = torch.empty_like(rows)
        for run in _runs(qb, kb, part):
            p = run.soften(rows, keys, scaling)
            torch.bmm(p, values[run.at], out=out[run.at])
            if keep:
                weights.append(p)
        outs.append(out.view(qb.shape))
    out = torch.empty(q.x.shape, dtype=q.x.dtype)
    Heads(out).gather(outs, packing.queries)
    return out, weights


def attend_grad(
    grad: Tensor,  # (L, H, d)
    q: Heads,
    k: Heads,
    v: Heads,
    weights: Sequence[Tensor],
    packing: Any,
    scaling: float,
    into: Sequence[Tensor],  # of the shapes of q, k and v, tokens any way apart
) -> None:
    """The gradients by q, k and v as they came in, from what `attend` gave; weights that it did not
    keep are made again."""
    by_q, by_k, by_v, kept = [], [], [], iter(weights)
    for part in packing.parts:
        qb, kb, vb = q.spread(part.queries), k.spread(part.keys), v.spread(part.keys)
        rows, keys, values = _rows(qb, kb), kb.flatten(0, 1), vb.flatten(0, 1)
        above = _rows(Heads(grad).spread(part.queries), kb)
        parts = [torch.empty_like(x) for x in (rows, keys, values)]
        for run in _runs(qb, kb, part):
            p, up = next(kept, None), above[run.at]
            p = run.soften(rows, keys, scaling) if p is None else p
            by_rows, by_keys, by_values = (x[run.at] for x in parts)
            torch.bmm(p.transpose(1, 2), up, out=by_values)
            ds = torch.bmm(up, values[run.at].transpose(1, 2))
            task = core().SoftmaxTask(pointer(p), 0, *run.known, scaling)
            core().masked_softmax_grad(task, pointer(ds), pointer(ds), threads())
            torch.bmm(ds, keys[run.at], out=by_rows)
            torch.bmm(ds.transpose(1, 2), rows[run.at], out=by_keys)
        for found, x, blocks in zip((by_q, by_k, by_v), parts, (qb, kb, vb), strict=True):
            found.append(x.view(blocks.shape))
    for x, source, blocks, back in (
        (into[0], q, by_q, packing.queries),
        (into[1], k, by_k, packing.keys),
        (into[2], v, by_v, packing.keys),
    ):
        Heads(x, source.cos, source.sin).gather(blocks, back)


class Run(NamedTuple):
    """Some of a part's products: of whole blocks, or of one key head of one block."""

    at: slice  # of the N K products
    sees: Tensor
    known: tuple[int, int, int, int, int, bool]  # of a SoftmaxTask, but the scaling

    def soften(self, rows: Tensor, keys: Tensor, scaling: float) -> Tensor:
        p = torch.bmm(rows[self.at], keys[self.at].transpose(1, 2))
        task = core().SoftmaxTask(pointer(p), pointer(self.sees), *self.known, scaling)
        core().masked_softmax(task, threads())
        return p


def _runs(q: Tensor, k: Tensor, part: Any) -> Iterator[Run]:
    """Products whose scores together stay in a cache, where one alone does."""
    (blocks, heads, queries, _), key_heads, width = q.shape, k.shape[1], k.shape[2]
    shared, each = len(part.sees) != blocks, heads * queries * width
    some, apart = max(1, TOGETHER // max(1, each)), key_heads if each > TOGETHER else 1
    for first in range(0, blocks, some):
        last = min(first + some, blocks)
        sees = part.sees if shared else part.sees[first:last]
        known = last - first, heads // apart, queries, width, DTYPES[q.dtype], shared
        for head in range(apart):
            step = key_heads // apart
            start = first * key_heads + head
            yield Run(slice(start, start + (last - first) * step), sees, known)


def _rows(q: Tensor, k: Tensor) -> Tensor:  # (N, H, W, d) -> (N K, H / K W, d)
    """The query heads of one key head stand together."""
    blocks, heads, _, size = k.shape
    return q.view(blocks * heads, -1, size)
