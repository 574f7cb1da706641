"""What an update saw of every token: the ratio of the policy to the old one, and whether it clips.

`ratios` are the numbers of the loss again, for the run page; their arithmetic is the metrics' of
`kernels/reference.py`. A token whose row was left out of the update has the ratio NaN, in the
tables nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonrl.batch import cu_seqlens, lengths
from reasonrl.loss import LossSpec
from reasonrl.records import Rollout


@dataclass(frozen=True)
class Seen:
    """Of a rollout's N completion tokens."""

    ratio: Tensor  # (N,)
    clipped: Tensor  # (N,) bool


def ratios(
    rollout: Rollout, logp: Tensor, old: Tensor | None, advantage: Tensor, spec: LossSpec
) -> Seen:
    """logp (N,), NaN in rows left out; old None: the policy itself, so every ratio is 1."""
    if old is None:
        one = torch.where(logp.isnan(), logp, 1.0)
        return Seen(one, torch.zeros(len(logp), dtype=torch.bool))
    d = logp - old
    ratio = d.exp()
    if spec.ratio != "token" and spec.surrogate != "gmpo":
        ratio = _mean_over_rows(d, cu_seqlens(rollout)).exp()
    low, high = ratio < 1 - spec.clip_low, ratio > 1 + spec.clip_high
    if spec.surrogate == "gmpo":
        low, high = d < -spec.clip_low, d > spec.clip_high
    elif spec.surrogate == "cispo":
        low = torch.zeros_like(high)
    elif spec.surrogate != "clip":
        low = high = torch.zeros_like(high)
    return Seen(ratio, (low & (advantage < 0)) | (high & (advantage > 0)))


def token_columns(rollout: Rollout, seen: Seen | None = None) -> dict[str, list[Any]]:
    """Columns of the completions table: where each token starts in the text, its log-probability
    when it was drawn, and what the update saw of it."""
    out: dict[str, list[Any]] = {
        "token_starts": [
            list(at[: len(logp)]) for at, logp in zip(rollout.pieces, rollout.logp, strict=True)
        ],
        "token_logps": [_short(part) for part in rollout.logp],
    }
    if seen is not None:
        size = lengths(rollout)
        out["token_ratios"] = [_short(part) for part in seen.ratio.split(size)]
        out["token_clipped"] = [part.tolist() for part in seen.clipped.split(size)]
    return out


def _short(values: Tensor) -> Sequence[float | None]:
    return [None if math.isnan(value) else round(value, 4) for value in values.tolist()]


def _mean_over_rows(values: Tensor, edges: Tensor) -> Tensor:
    rows = torch.repeat_interleave(torch.arange(len(edges) - 1), edges.diff())
    total = torch.zeros(len(edges) - 1).index_add_(0, rows, values)
    return (total / edges.diff().clamp(min=1))[rows]
