"""Offline selection: rank answers by a score, keep the best, and say what became of the rest.

ReasonFlux-PRM's first use (arXiv 2506.18896): the top k of a pool by the trajectory-aware score are
the data for supervised training. An answer that stands twice under the same prompt counts once;
what could not be scored is never kept. `per_prompt` bounds how many answers of one prompt are
kept, so that easy prompts do not crowd out the rest. Ties keep the order of the pool.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from reasonrl.records import InputError
from reasonrl.stepwise import Trace

BINS = 20


class Selection(NamedTuple):
    kept: list[int]  # indices into the pool, the best first
    report: dict[str, Any]


def select(
    traces: Sequence[Trace],
    scores: Sequence[float],  # NaN: not scored
    reasons: Sequence[str],  # why not
    keep: int,
    per_prompt: int | None = None,
) -> Selection:
    """The best `keep` of a pool; InputError where fewer than that can be kept."""
    seen: dict[tuple[str, str], int] = {}
    duplicates, unscored, order = [], [], []
    for i, trace in enumerate(traces):
        key = (repr(trace.prompt), trace.text)
        if key in seen:
            duplicates.append({"id": trace.id, "same_as": traces[seen[key]].id})
            continue
        seen[key] = i
        if math.isfinite(scores[i]):
            order.append(i)
        else:
            unscored.append({"id": trace.id, "reason": reasons[i] or f"the score is {scores[i]}"})
    order.sort(key=lambda i: -scores[i])
    taken: Counter[str] = Counter()
    kept, crowded = [], 0
    for i in order:
        prompt = repr(traces[i].prompt)
        if len(kept) == keep:
            break
        if per_prompt is not None and taken[prompt] == per_prompt:
            crowded += 1
            continue
        taken[prompt] += 1
        kept.append(i)
    if len(kept) < keep:
        raise InputError(
            f"--keep: {keep} asked for, {len(kept)} can be kept of {len(traces)} answers"
            f" ({len(duplicates)} duplicates, {len(unscored)} unscored, {crowded} beyond"
            " --per-prompt)"
        )
    chosen = [scores[i] for i in kept]
    report = {
        "answers": len(traces),
        "kept": keep,
        "prompts_kept": len(taken),
        "lowest_kept": min(chosen, default=None),
        "beyond_per_prompt": crowded,
        "duplicates": duplicates,
        "unscored": unscored,
        "histogram": _histogram([scores[i] for i in order], chosen),
    }
    known = [(i, traces[i].final) for i in order if traces[i].final is not None]
    if known:
        report["share_right"] = {
            "pool": _mean([f for _, f in known]),
            "kept": _mean([f for i in kept if (f := traces[i].final) is not None]),
        }
    return Selection(kept, report)


def _histogram(pool: Sequence[float], kept: Sequence[float]) -> list[dict[str, float]]:
    """Counts of the pool and of what was kept, in equal bins of the score."""
    if not pool:
        return []
    low, high = min(pool), max(pool)
    width = (high - low) / BINS or 1.0

    def counts(values: Sequence[float]) -> Counter[int]:
        return Counter(min(BINS - 1, int((v - low) / width)) for v in values)

    every, chosen = counts(pool), counts(kept)
    return [{"from": low + b * width, "pool": every[b], "kept": chosen[b]} for b in range(BINS)]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else None
