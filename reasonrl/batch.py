"""A rollout and its advantages become packed micro-batches in which a group's prompt stands once.

    for batch in pack(rollout, advantage, tokens=4096): loss_on(policy, batch)

The last token of a completion predicts nothing: it is a target alone.

A group whose tokens exceed the budget is split over batches, its prompt repeated; nothing is
truncated or padded. Left out: sorting by length, which would tie a row's batch to the others'.
Legend: B rows, N completion tokens, L packed tokens.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from reasonrl.records import Batch, Rollout


def lengths(rollout: Rollout) -> list[int]:
    """Tokens of every completion, B of them."""
    return [len(ids) for ids in rollout.completion_ids]


def cu_seqlens(rollout: Rollout) -> Tensor:
    """(B + 1,) int64 offsets of the completions in the packed token tensors."""
    return torch.tensor([0, *accumulate(lengths(rollout))], dtype=torch.long)


def places(rollout: Rollout, rows: Sequence[int] | Tensor) -> Tensor:
    """Where the tokens of these rows stand among all N completion tokens, (n,) int64."""
    return _places([0, *accumulate(lengths(rollout))], rows)


def _places(edges: Sequence[int], rows: Iterable[Any]) -> Tensor:
    return integers(_numbers(edges[int(b)], edges[int(b) + 1]) for b in rows)


def integers(parts: Iterable[array]) -> Tensor:
    """End to end, int64."""
    found = array("q")
    for part in parts:
        found += part
    return torch.frombuffer(found, dtype=torch.long) if found else torch.zeros(0, dtype=torch.long)


def merge(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts end to end; an optional field stays only where every part with rows has it."""
    parts = [part for part in parts if part.problems] or [parts[0]]
    shifts = accumulate((len(part.problems) for part in parts[:-1]), initial=0)
    groups = [part.group + shift for part, shift in zip(parts, shifts, strict=True)]
    return Rollout(
        problems=flat(parts, "problems"),
        prompt_ids=flat(parts, "prompt_ids"),
        group=torch.cat(groups),
        completion_ids=flat(parts, "completion_ids"),
        text=flat(parts, "text"),
        finished=flat(parts, "finished"),
        logp=flat(parts, "logp"),
        pieces=flat(parts, "pieces"),
        sampling_logp=flat(parts, "sampling_logp"),
        images=_images(parts),
        outcome=flat(parts, "outcome"),
        served=any(part.served for part in parts),
        numbers=flat(parts, "numbers"),
        stale=any(part.stale for part in parts),
    )


def _images(parts: Sequence[Rollout]) -> Sequence[Any]:
    if not any(part.images for part in parts):
        return ()
    return [i for part in parts for i in part.images or [None] * len(part.problems)]


def flat(parts: Sequence[Any], field: str) -> Any:
    """One field of several records, end to end; None where one of them has none."""
    values = [getattr(part, field) for part in parts]
    return None if any(v is None for v in values) else list(chain.from_iterable(values))


def take(rollout: Rollout, groups: Sequence[int]) -> Rollout:
    """Some groups of a rollout, in the order given, their completions in their own order."""
    rows = [(new, b) for new, g in enumerate(groups) for b in _rows(rollout, g)]
    images = [rollout.images[g] for g in groups] if any(rollout.images) else ()
    return replace(
        rows_of(rollout, [b for _, b in rows]),
        problems=[rollout.problems[g] for g in groups],
        prompt_ids=[rollout.prompt_ids[g] for g in groups],
        numbers=[rollout.numbers[g] for g in groups] if rollout.numbers else (),
        group=torch.tensor([new for new, _ in rows], dtype=torch.long),
        images=images if any(images) else (),
    )


def rows_of(rollout: Rollout, rows: Sequence[int]) -> Rollout:
    """Some completions of a rollout, all problems kept."""

    def chosen(field: str) -> Any:
        values = getattr(rollout, field)
        return None if values is None else [values[b] for b in rows]

    fields = "completion_ids text finished logp pieces sampling_logp outcome".split()
    return replace(
        rollout,
        group=rollout.group[torch.tensor(rows, dtype=torch.long)],
        **{field: chosen(field) for field in fields},
    )


def _rows(rollout: Rollout, group: int) -> list[int]:
    return (rollout.group == group).nonzero()[:, 0].tolist()


def pack(
    rollout: Rollout,
    advantage: Tensor | None,  # (N,) fp32; None: zeros, for a forward without a loss
    tokens: int,
    rows: Sequence[int] | None = None,
    old_logp: Tensor | None = None,  # (N,)
    ref_logp: Tensor | None = None,  # (N,)
    weight: Tensor | None = None,  # (N,)
    ends: bool = False,
) -> Iterator[Batch]:
    """Batches of at most `tokens` packed tokens (one row alone may be longer), rows in order.

    rows: which rows to pack, all by default; empty completions have nothing to learn from and are
    left out. ends: the last tokens stand there too, for who reads more than predictions.
    """
    size = lengths(rollout)
    if advantage is None:
        advantage = torch.zeros(sum(size))
    wanted = range(len(size)) if rows is None else rows
    owner: list[int] = rollout.group.tolist()
    edges = [0, *accumulate(size)]
    for chosen in _cuts(rollout, owner, [b for b in wanted if size[b]], tokens, ends):
        yield _batch(rollout, owner, edges, chosen, (advantage, old_logp, ref_logp, weight), ends)


def _cuts(
    rollout: Rollout, owner: list[int], rows: list[int], tokens: int, ends: bool
) -> Iterator[list[int]]:
    """Rows cut so that prompts (once for each group present) and completions fit the budget."""
    chosen: list[int] = []
    used, group = 0, -1
    for b in sorted(sorted(rows), key=owner.__getitem__):
        g = owner[b]
        prompt = len(rollout.prompt_ids[g])
        own = len(rollout.completion_ids[b]) - (not ends)
        cost = own + (prompt if g != group else 0)
        if chosen and used + cost > tokens:
            yield chosen
            chosen, used = [], 0
            cost = own + prompt
        chosen.append(b)
        used, group = used + cost, g
    if chosen:
        yield chosen


def _batch(rollout, owner, edges, rows, values, ends: bool) -> Batch:
    """owner: every row's group; edges: where rows begin among all tokens; values: (N,) or None."""
    ids, predict, target, sizes = array("q"), array("q"), array("q"), array("q", [0])
    positions: list[Any] = []  # ranges, or what an image says
    seen: list[Any] = []
    layout: list[tuple[int, int, list[int]]] = []
    group, following, together = -1, edges[rows[0]], True
    for b in rows:
        g = owner[b]
        completion = array("q", rollout.completion_ids[b])
        if g != group:
            prompt = array("q", rollout.prompt_ids[g])
            layout.append((len(ids), len(prompt), []))
            ids += prompt
            image = rollout.images[g] if rollout.images else None
            seen += [] if image is None else [image]
            own = range(len(prompt)) if image is None else image.positions
            positions.append(own)
            after = first_position(image, len(prompt))
            group = g
        start, length, own_sizes = layout[-1]
        # the last prompt token predicts the first token of every completion of the group
        own = len(completion) - (not ends)
        predict.append(start + length - 1)
        predict += _numbers(len(ids), len(ids) + len(completion) - 1)
        positions.append(range(after, after + own))
        ids += completion[:own]
        target += completion
        sizes.append(len(target))
        own_sizes.append(own)
        together, following = together and edges[b] == following, edges[b + 1]
    where = slice(edges[rows[0]], following) if together else _places(edges, rows)
    picked: list[Any] = [None if x is None else x[where] for x in values]
    advantage, old_logp, ref_logp, weight = picked
    return Batch(
        input_ids=integers([ids]),
        position_ids=_positions(positions, bool(seen)),
        layout=layout,
        predict=integers([predict]),
        target=integers([target]),
        cu_seqlens=integers([sizes]),
        advantage=advantage,
        old_logp=old_logp,
        ref_logp=ref_logp,
        weight=weight,
        mask=None,
        rows=torch.tensor(rows),
        images=seen,
    )


def _positions(parts: Sequence[Any], images: bool) -> Tensor:
    if not images:
        return integers(_numbers(part.start, part.stop) for part in parts)
    return join_positions(
        [torch.tensor(part) if isinstance(part, range) else part for part in parts], True
    )


def _numbers(start: int, stop: int) -> array:
    """range(start, stop), out of numbers that are made once."""
    return _counted(stop.bit_length())[start:stop]


@cache
def _counted(bits: int) -> array:
    return array("q", range(1 << bits))


def first_position(image: Any, length: int) -> int:
    """Where a completion begins behind a prompt of so many tokens, with its images or without."""
    return length if image is None else int(image.positions.max()) + 1


def join_positions(parts: Sequence[Tensor], images: bool) -> Tensor:
    """Positions end to end, (L,); with images (3, L): text has the same one three times."""
    if images:
        parts = [part if part.dim() == 2 else part.expand(3, -1) for part in parts]
    return torch.cat(list(parts), -1) if parts else torch.zeros(0, dtype=torch.long)
