"""The specification of a credit: the advantages that follow from step or token rewards (see
`reference`).

A step counts against the steps of its group (arXiv 2402.03300, section 4.1.3), `by_place` against
those at the same place; it is worth that to itself (pay "step") or to every token before its end
(pay "return"). Tokens follow PRIME (2502.01456). Legend: B completions, N packed tokens, S steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonrl.kernels.reference_segments import (
    group_advantage,
    prime_advantage,
    returns,
    segment_ids,
    step_expand,
)


def credit_advantage(credit: Any, cu: Tensor, mask: Tensor | None) -> Tensor:  # (N,)
    """outcome_weight * A(outcome) + process_weight * what the tokens' steps, or they, are worth."""
    c = credit
    if c.token_reward is not None:
        return _tokens(c, cu, mask)
    n = c.step.numel()
    check_steps(c, cu)
    value = step_worth(c)
    if c.pay == "step":
        paid = step_expand(value, c.step, "all")
    else:
        paid = returns(step_expand(value, c.step, "last"), cu, mask, c.gamma)
    whole = group_advantage(c.outcome, c.group, c.kind, c.scored, c.ddof, c.eps)
    out = c.outcome_weight * whole[segment_ids(cu, n)] + c.process_weight * paid
    return out if mask is None else torch.where(mask, out, 0.0)


def step_worth(c: Any) -> Tensor:  # (S,)
    """Step rewards against their peers, divided by the completion's number of steps if asked."""
    counts = c.step_cu.diff()
    peer = c.group.repeat_interleave(counts)
    steps = torch.arange(peer.numel(), device=peer.device)
    if c.by_place and peer.numel():
        place = steps - c.step_cu[:-1].repeat_interleave(counts)
        _, compact = torch.unique(peer, return_inverse=True)
        peer = compact * (place.max() + 1) + place
    value = group_advantage(c.step_reward, peer, c.kind, c.step_scored, c.ddof, c.eps)
    return value / counts.repeat_interleave(counts) if c.divide else value


def _tokens(c: Any, cu: Tensor, mask: Tensor | None) -> Tensor:
    args = (c.group, cu, mask, c.kind, c.gamma, c.ddof, c.scored, False, c.verl_baseline)
    none = torch.zeros_like(c.token_reward)
    process = prime_advantage(c.token_reward, torch.zeros_like(c.outcome), *args)
    outcome = prime_advantage(none, c.outcome, *args)
    return c.process_weight * process + c.outcome_weight * outcome


def check_steps(c: Any, cu: Tensor) -> None:
    """Every step is one run of tokens, in the completion whose steps hold its number."""
    step, n = c.step, c.step.numel()
    if n == 0:
        return
    begins = torch.ones(n, dtype=torch.bool, device=step.device)
    begins[1:] = step[1:] != step[:-1]
    edges = cu[1:-1]
    begins[edges[(edges > 0) & (edges < n)]] = True
    at = (begins & (step != -1)).nonzero()[:, 0]
    ids, row = step[at], torch.searchsorted(cu, at, right=True) - 1
    first, last = c.step_cu[row], c.step_cu[row + 1]
    bad = (ids < first) | (ids >= last)
    inside = torch.where(bad, 0, ids)
    torn = torch.bincount(inside[~bad], minlength=1)[inside].gt(1) & ~bad
    if not bool((bad | torn).any()):
        return
    k = int((bad | torn).nonzero()[0, 0])
    if bool(bad[k]):
        raise ValueError(
            f"step must lie in [{int(first[k])}, {int(last[k])}), the steps of completion"
            f" {int(row[k])}, got {int(ids[k])} at {int(at[k])}"
        )
    again = int(at[ids == ids[k]][1])
    raise ValueError(
        f"step must be one run of neighbouring tokens each, got {int(ids[k])} again at {again}"
    )
