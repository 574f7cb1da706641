"""How much a token that another distribution drew counts: truncated importance weights.

    w = min(exp(log p_old - log p_drawn), cap)

of every token, or with the sum over a completion in the exponent. `old` is the trainer's policy
before the update, `drawn` what the server says it drew from: the same weights in another
arithmetic, or weights of an earlier step. (Truncated importance sampling: Ionides 2008, eq. 4.)
Legend: N completion tokens, B completions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

GAP, RATIO = "sampling_logp_difference", "importance_sampling_ratio"  # TRL's names
NAMES = (f"{GAP}/mean", f"{GAP}/max", f"{RATIO}/mean", f"{RATIO}/max", "capped")


def weights(
    old: Tensor,  # (N,)
    drawn: Tensor,  # (N,)
    sizes: Sequence[int],  # B, tokens of every completion
    level: Literal["token", "sequence"],
    cap: float,
) -> Tensor:
    """(N,) fp32, constant over a completion at level `sequence`."""
    gap = (old - drawn).double()
    if level == "sequence":
        lengths = torch.tensor(sizes, dtype=torch.long)
        row = torch.arange(len(sizes)).repeat_interleave(lengths)
        whole = torch.zeros(len(sizes), dtype=torch.double).index_add_(0, row, gap)
        gap = whole[row]
    return gap.exp().clamp(max=cap).float()


def sums(old: Tensor, drawn: Tensor, weight: Tensor | None, cap: float) -> list[float]:
    """What `metrics` needs of a rank: two sums, two maxima, what was capped, the tokens."""
    gap = (old - drawn).abs()
    w = torch.ones_like(gap) if weight is None else weight
    if gap.numel() == 0:
        return [0.0] * 6
    capped = float((w >= cap).sum())
    return [float(gap.sum()), float(gap.max()), float(w.sum()), float(w.max()), capped, gap.numel()]


def metrics(ranks: Sequence[Sequence[float]]) -> dict[str, float]:
    """Of all ranks' tokens: |log p_old - log p_drawn|, the weights, the share of them capped."""
    gap, gap_max, w, w_max, capped, tokens = zip(*ranks, strict=True)
    n = max(1.0, sum(tokens))
    found = (sum(gap) / n, max(gap_max), sum(w) / n, max(w_max), sum(capped) / n)
    return {f"sampling/{name}": value for name, value in zip(NAMES, found, strict=True)}
