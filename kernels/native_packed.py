"""Attention over packed tokens on the CPU: heads are spread over blocks and turned on the way,
torch multiplies, our softmax between, and blocks are summed back into the tokens' rows.

Kept for the gradient: what came in, and the weights of the softmax. `packing` (places.Packing) says
where each token stands. Legend: L tokens, H query and K key heads of size d, N blocks of W queries
among S keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonrl.kernels.native import DTYPES, core, pointer, threads


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
) -> tuple[Tensor, list[Tensor]]:  # (L, H, d) and the weights of every part
    """softmax(scaling q k^T where seen) v."""
    outs, weights = [], []
    for part in packing.parts:
        qb, kb, vb = q.spread(part.queries), k.spread(part.keys), v.spread(part.keys)
        p = torch.bmm(_rows(qb, kb), kb.flatten(0, 1).transpose(1, 2))
        task = core().SoftmaxTask(pointer(p), pointer(part.sees), *_known(qb, kb, part, scaling))
        core().masked_softmax(task, threads())
        outs.append(torch.bmm(p, vb.flatten(0, 1)).view(qb.shape))
        weights.append(p)
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
    """The gradients by q, k and v as they came in, from the weights that `attend` gave."""
    by_q, by_k, by_v = [], [], []
    for part, p in zip(packing.parts, weights, strict=True):
        qb, kb, vb = q.spread(part.queries), k.spread(part.keys), v.spread(part.keys)
        above = _rows(Heads(grad).spread(part.queries), kb)
        by_v.append(torch.bmm(p.transpose(1, 2), above).view(vb.shape))
        ds = torch.bmm(above, vb.flatten(0, 1).transpose(1, 2))
        task = core().SoftmaxTask(pointer(p), 0, *_known(qb, kb, part, scaling))
        core().masked_softmax_grad(task, pointer(ds), pointer(ds), threads())
        by_q.append(torch.bmm(ds, kb.flatten(0, 1)).view(qb.shape))
        by_k.append(torch.bmm(ds.transpose(1, 2), _rows(qb, kb)).view(kb.shape))
    for x, source, blocks, back in (
        (into[0], q, by_q, packing.queries),
        (into[1], k, by_k, packing.keys),
        (into[2], v, by_v, packing.keys),
    ):
        Heads(x, source.cos, source.sin).gather(blocks, back)


def _rows(q: Tensor, k: Tensor) -> Tensor:  # (N, H, W, d) -> (N K, H / K W, d)
    """The query heads of one key head stand together."""
    blocks, heads, _, size = k.shape
    return q.view(blocks * heads, -1, size)


def _known(q: Tensor, k: Tensor, part: Any, scaling: float):
    blocks, heads, queries, _ = q.shape
    shared = len(part.sees) != blocks
    return blocks, heads, queries, k.shape[2], DTYPES[q.dtype], shared, scaling
