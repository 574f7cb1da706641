"""A rollout and its advantages become packed micro-batches in which a group's prompt stands once.

    for batch in pack(rollout, advantage, tokens=4096): loss_on(policy, batch)

A group whose tokens exceed the budget is split over batches, its prompt repeated; nothing is
truncated or padded. Left out: sorting by length, which would tie a row's batch to the others'.
Legend: B rows, N completion tokens, L packed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

from reasonrl.records import Batch, Rollout


def lengths(rollout: Rollout) -> list[int]:
    """Tokens of every completion, B of them."""
    return [len(ids) for ids in rollout.completion_ids]


def cu_seqlens(rollout: Rollout) -> Tensor:
    """(B + 1,) int64 offsets of the completions in the packed token tensors."""
    return torch.tensor([0, *accumulate(lengths(rollout))], dtype=torch.long)


def pack(
    rollout: Rollout,
    advantage: Tensor,  # (N,) fp32
    tokens: int,
    rows: Sequence[int] | None = None,
    old_logp: Tensor | None = None,  # (N,)
    ref_logp: Tensor | None = None,  # (N,)
) -> Iterator[Batch]:
    """Batches of at most `tokens` packed tokens (one row alone may be longer), rows in order.

    rows: which rows to pack, all by default; empty completions have nothing to learn from and are
    left out.
    """
    size = lengths(rollout)
    starts = [0, *accumulate(size)]
    wanted = range(len(size)) if rows is None else rows
    for chosen in _cuts(rollout, [b for b in wanted if size[b]], tokens):
        yield _batch(rollout, chosen, starts, advantage, old_logp, ref_logp)


def _cuts(rollout: Rollout, rows: Sequence[int], tokens: int) -> Iterator[list[int]]:
    """Rows cut so that prompts (once for each group present) and completions fit the budget."""
    chosen: list[int] = []
    used, group = 0, -1
    for b in sorted(rows, key=lambda b: (int(rollout.group[b]), b)):
        g = int(rollout.group[b])
        prompt = len(rollout.prompt_ids[g])
        cost = len(rollout.completion_ids[b]) + (prompt if g != group else 0)
        if chosen and used + cost > tokens:
            yield chosen
            chosen, used = [], 0
            cost = len(rollout.completion_ids[b]) + prompt
        chosen.append(b)
        used, group = used + cost, g
    if chosen:
        yield chosen


def _batch(rollout, rows, starts, advantage, old_logp, ref_logp) -> Batch:
    ids: list[int] = []
    positions: list[int] = []
    predict: list[int] = []
    layout: list[tuple[int, int, list[int]]] = []
    group = -1
    for b in rows:
        g = int(rollout.group[b])
        completion = rollout.completion_ids[b]
        if g != group:
            prompt = rollout.prompt_ids[g]
            layout.append((len(ids), len(prompt), []))
            ids.extend(prompt)
            positions.extend(range(len(prompt)))
            group = g
        start, length, sizes = layout[-1]
        # the last prompt token predicts the first token of every completion of the group
        predict.append(start + length - 1)
        predict.extend(range(len(ids), len(ids) + len(completion) - 1))
        positions.extend(range(length, length + len(completion)))
        ids.extend(completion)
        sizes.append(len(completion))
    at = torch.cat([torch.arange(starts[b], starts[b + 1]) for b in rows])
    target = torch.tensor([i for b in rows for i in rollout.completion_ids[b]])
    sizes = [0, *accumulate(len(rollout.completion_ids[b]) for b in rows)]
    return Batch(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        layout=layout,
        predict=torch.tensor(predict),
        target=target,
        cu_seqlens=torch.tensor(sizes),
        advantage=advantage[at],
        old_logp=None if old_logp is None else old_logp[at],
        ref_logp=None if ref_logp is None else ref_logp[at],
        mask=torch.ones(len(target), dtype=torch.bool),
        rows=torch.tensor(rows),
    )
