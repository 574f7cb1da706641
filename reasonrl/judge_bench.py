"""Libra Bench's measure of judges (arXiv 2507.21645) on rows of judge_data.py's format.

Accuracy on each subset, the unweighted mean of them, balanced accuracy, accuracy for each
generator; intervals are percentile bootstraps over rows. A tie of votes is "wrong"; a row
without any verdict counts as judged wrongly and is reported.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from reasonrl.cases import Case
from reasonrl.progress import phase
from reasonrl.rewards.judge import Judge

RESAMPLES = 2000


def bench(judge: Judge, cases: Sequence[Case], seed: int = 0) -> dict[str, Any]:
    """The metrics of a judge; it sees the thinking where it was made `with_cot`."""
    responses = [c.with_cot if judge.with_cot else c.response for c in cases]
    votes = judge.verdicts([c.question for c in cases], responses)
    known = [[v for v in row if not isinstance(v, str)] for row in votes]
    said = [int(2 * sum(row) > len(row)) if row else None for row in known]
    hit = np.array([s == c.label for s, c in zip(said, cases, strict=True)], dtype=np.float64)
    label = np.array([c.label for c in cases])
    subsets = sorted({c.subset for c in cases})
    masks = {name: np.array([c.subset == name for c in cases]) for name in subsets}

    def means(rows: np.ndarray) -> dict[str, float]:
        by = {name: _mean(hit[rows[masks[name][rows]]]) for name in subsets}
        seen = [v for v in by.values() if not math.isnan(v)]
        halves = [_mean(hit[rows[label[rows] == k]]) for k in (0, 1)]
        return by | {"mean": _mean(np.array(seen)), "balanced": _mean(np.array(halves))}

    rng, every = np.random.default_rng(seed), np.arange(len(cases))
    whole = means(every)
    with phase("intervals"):
        draws = [means(rng.integers(len(cases), size=len(cases))) for _ in range(RESAMPLES)]

    def point(name: str) -> dict[str, float]:
        low, high = np.nanpercentile([d[name] for d in draws], [2.5, 97.5])
        return {"accuracy": whole[name], "low": float(low), "high": float(high)}

    models = sorted({c.model for c in cases})
    return {
        "rows": len(cases),
        "unjudged": sum(s is None for s in said),
        "accuracy": point("mean"),
        "balanced_accuracy": point("balanced"),
        "subsets": {name: point(name) for name in subsets},
        "generators": {m: _mean(hit[[c.model == m for c in cases]]) for m in models},
        "said_right": sum(s == 1 for s in said) / max(1, len(said)),
        "with_cot": judge.with_cot,
        "thinking": judge.think,
        "votes": judge.votes,
    }


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
