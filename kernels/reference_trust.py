"""The specification of SophiaVL-R1's combined reward (arXiv 2505.17018 eq. 1-5), in plain torch.

Statistics are taken in float64. Thresholds of the outcome are compared in float32, as the data
holds them. Legend: B completions.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reasonrl.kernels.reference_segments import group_advantage, segment_sum

RIGHT, WRONG, UNSCORED_BELOW = 0.9, 0.1, 0.2  # of the outcome


def trust(
    outcome: Tensor,  # (B,)
    thinking: Tensor,  # (B,)
    group: Tensor,  # (B,) int64
    known: Tensor | None,  # (B,) bool: whose thinking is known
    weight: float,  # alpha * exp(-step / T)
    threshold: float,  # of a right outcome
    trust: bool,
    score_wrong: bool,
    keep_degenerate: bool,
    kind: str,
    ddof: int,
    eps: float,
) -> Tensor:  # (3, B): advantage, reward, gamma
    """R = outcome + gamma weight thinking, its advantage in the group, and gamma.

    gamma = exp(min(mu_c - mu_w, 0)), 1 where a side is empty or trust is off. Unknown thinking is
    the mean of the group's known one; in groups all right or all wrong it counts nothing.
    """
    outcome, thinking = outcome.detach(), thinking.detach()
    known = torch.ones_like(outcome, dtype=torch.bool) if known is None else known
    if not score_wrong:
        unasked = ~_at_least(outcome, UNSCORED_BELOW)
        thinking, known = torch.where(unasked, 0.0, thinking), known | unasked
    ids, member = torch.unique(group, return_inverse=True)
    rows = ids.numel()
    right = _at_least(outcome, threshold)
    mean_right, some_right = _mean(thinking, member, known & right, rows)
    mean_wrong, some_wrong = _mean(thinking, member, known & ~right, rows)
    gap = torch.where(some_right & some_wrong & trust, mean_right - mean_wrong, 0.0)
    gamma = gap.clamp(max=0).exp()[member].to(outcome.dtype)
    filled = torch.where(known, thinking.double(), _mean(thinking, member, known, rows)[0][member])
    if not keep_degenerate:
        bound = torch.tensor(WRONG, dtype=torch.float32, device=outcome.device)
        mixed = _any(~_at_least(outcome, RIGHT), member, rows)
        mixed = mixed & _any(outcome.float() > bound, member, rows)
        filled = torch.where(mixed[member], filled, 0.0)
    reward = (outcome.double() + gamma.double() * weight * filled).to(outcome.dtype)
    return torch.stack([group_advantage(reward, group, kind, None, ddof, eps), reward, gamma])


def _mean(x: Tensor, member: Tensor, keep: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Mean of the kept values of each group (0 if there is none), and whether there is one."""
    total = segment_sum(torch.where(keep, x.double(), 0.0), member, rows)
    count = segment_sum(keep.double(), member, rows)
    return total / count.clamp(min=1), count > 0


def _any(x: Tensor, member: Tensor, rows: int) -> Tensor:
    return segment_sum(x.double(), member, rows) > 0


def _at_least(outcome: Tensor, threshold: float) -> Tensor:
    return outcome.float() >= torch.tensor(threshold, dtype=torch.float32, device=outcome.device)
