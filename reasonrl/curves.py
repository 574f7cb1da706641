"""Best-of-N as curves: how often each way of choosing is right, against the number of completions.

For every N the completions of a problem are cut into consecutive lots of N, each lot is decided,
and the shares of right choices are averaged; `oracle` is right where any completion is, `majority`
counts answers, `weighted` sums their scores. Intervals are percentile bootstraps over problems
(2.5 % and 97.5 %). A tie goes to the first. Nothing is sampled here: stored rollouts are enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reasonrl.answer import ballot
from reasonrl.choice import TOGETHER
from reasonrl.progress import phase
from reasonrl.records import InputError

RESAMPLES = 2000
SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Candidate:
    """One completion: whether it is right, its vote, its step scores and its total."""

    right: bool
    vote: str | None
    steps: Sequence[float]  # empty: unscored, never chosen while another is scored
    total: float


def candidate(text: str, right: bool, steps: Sequence[float], total: float) -> Candidate:
    return Candidate(right, ballot(text), tuple(steps), total)


def curves(
    groups: Sequence[Sequence[Candidate]], hows: Sequence[str], weigh: str, seed: int = 0
) -> dict[str, Any]:
    """{"n": sizes, "problems": P, "curves": {name: [{accuracy, low, high}, ...]}}.

    hows: ways of TOGETHER or "total"; weigh: the one whose numbers `weighted` sums. Sizes go up to
    the largest group; a smaller one is decided on all it has. InputError without a group.
    """
    if not groups or not min(map(len, groups)):
        raise InputError("expected at least one problem with completions, got none")
    sizes = [n for n in SIZES if n <= max(map(len, groups))]
    deciders: dict[str, Callable[[Sequence[Candidate]], bool]] = {
        f"prm_{how}": lambda lot, how=how: _best(lot, how).right for how in hows
    }
    deciders["weighted"] = lambda lot: _elected(lot, lambda c: number(c, weigh))
    deciders["majority"] = lambda lot: _elected(lot, lambda c: 1.0)
    deciders["oracle"] = lambda lot: any(c.right for c in lot)
    draws = np.random.default_rng(seed).integers(len(groups), size=(RESAMPLES, len(groups)))
    out = {}
    with phase("choosing", len(deciders), "ways") as part:
        for name, decide in deciders.items():
            out[name] = [_interval([_share(g, n, decide) for g in groups], draws) for n in sizes]
            part.add()
    return {"n": sizes, "problems": len(groups), "curves": out}


def difference(
    groups: Sequence[Sequence[Candidate]], how: str, n: int, seed: int = 0
) -> dict[str, float]:
    """PRM minus majority at N, paired over problems: {accuracy, low, high}."""
    draws = np.random.default_rng(seed).integers(len(groups), size=(RESAMPLES, len(groups)))
    ours = [_share(g, n, lambda lot: _best(lot, how).right) for g in groups]
    theirs = [_share(g, n, lambda lot: _elected(lot, lambda c: 1.0)) for g in groups]
    return _interval([a - b for a, b in zip(ours, theirs, strict=True)], draws)


def number(c: Candidate, how: str) -> float:
    """The completion's one number; minus infinity where it is unscored."""
    if not c.steps:
        return -math.inf
    return c.total if how == "total" else TOGETHER[how](c.steps)


def _best(lot: Sequence[Candidate], how: str) -> Candidate:
    return max(lot, key=lambda c: number(c, how))


def _elected(lot: Sequence[Candidate], weight: Callable[[Candidate], float]) -> bool:
    """Whether the answer with the largest sum of weights is right (its first completion is)."""
    votes: dict[str, float] = {}
    first: dict[str, Candidate] = {}
    for c in lot:
        w = weight(c)
        if c.vote is not None and w > -math.inf:
            votes[c.vote] = votes.get(c.vote, 0.0) + w
            first.setdefault(c.vote, c)
    return first[max(votes, key=lambda v: votes[v])].right if votes else lot[0].right


def _share(group: Sequence[Candidate], n: int, decide: Callable) -> float:
    lots = [group[i : i + n] for i in range(0, len(group) - n + 1, n)] or [group]
    return sum(bool(decide(lot)) for lot in lots) / len(lots)


def _interval(values: Sequence[float], draws: np.ndarray) -> dict[str, float]:
    x = np.asarray(values, dtype=np.float64)
    low, high = np.percentile(x[draws].mean(axis=1), [2.5, 97.5])
    return {"accuracy": float(x.mean()), "low": float(low), "high": float(high)}
