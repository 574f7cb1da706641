"""The specification of the ops over groups, completions and steps, in plain torch (see
`reference`).

Sums are taken in float64 and rounded once. GRPO (arXiv 2402.03300), leave-one-out (2402.14740),
PRIME (2502.01456). Legend: B completions, N packed tokens, S steps; `cu` (B+1,) int64 offsets,
`mask` (N,) bool or None.
"""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantage(
    reward: Tensor,  # (B,)
    group: Tensor,  # (B,) int64
    kind: str,
    scored: Tensor | None,  # (B,) bool
    ddof: int,
    eps: float,
) -> Tensor:  # (B,)
    """grpo (r - mean) / (std + eps), dr_grpo r - mean, rloo r - mean of the others; dead groups
    exactly 0."""
    known = torch.ones_like(reward, dtype=torch.bool) if scored is None else scored
    value, stat = _group(reward, group, known)
    centred = value - stat["mean"]
    if kind == "rloo":
        centred = value - (stat["sum"] - value) / (stat["count"] - 1).clamp(min=1)
    elif kind == "grpo":
        centred = centred / (_std(centred, stat, ddof) + eps)
    return torch.where(known & ~stat["dead"], centred, 0.0).to(reward.dtype)


def _group(x: Tensor, group: Tensor, known: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """x in float64 with unknown members at 0, and its group's statistics over the known ones, one
    per member."""
    x = torch.where(known, x.detach().double(), 0.0)
    ids, member = torch.unique(group, return_inverse=True)
    rows = ids.numel()
    count, total = segment_sum(known, member, rows), segment_sum(x, member, rows)
    top = _extreme(torch.where(known, x, -torch.inf), member, rows, "amax")
    bottom = _extreme(torch.where(known, x, torch.inf), member, rows, "amin")
    dead = (count < 2) | (top == bottom)
    per_group = {"count": count, "sum": total, "mean": total / count.clamp(min=1), "dead": dead}
    stat = {name: value[member] for name, value in per_group.items()}
    return x, stat | {"member": member, "known": known}


def _std(centred: Tensor, stat: dict[str, Tensor], ddof: int) -> Tensor:
    square = torch.where(stat["known"], centred.square(), 0.0)
    total = segment_sum(square, stat["member"], square.numel())[stat["member"]]
    return torch.where(stat["dead"], 1.0, (total / (stat["count"] - ddof).clamp(min=1)).sqrt())


def prime_advantage(
    token_reward: Tensor,  # (N,)
    outcome: Tensor,  # (B,)
    group: Tensor,  # (B,) int64
    cu: Tensor,
    mask: Tensor | None,
    form: str,
    gamma: float,
    ddof: int,
    scored: Tensor | None,  # (B,) bool
    whiten_result: bool,
    verl_baseline: bool,
) -> Tensor:  # (N,)
    """PRIME (arXiv 2502.01456), eq. 5 (rloo), 7 (grpo), 8 (reinforce): process return + outcome
    part.

    verl_baseline adds (r_t - rbar_i) / (K - 1) to the process reward, as the released code does.
    """
    n = token_reward.numel()
    row = segment_ids(cu, n)
    known = torch.ones_like(outcome, dtype=torch.bool) if scored is None else scored
    keep = known[row] if mask is None else mask & known[row]
    r = torch.where(keep, token_reward.detach().double(), 0.0)
    rows = outcome.numel()
    rbar = segment_sum(r, row, rows) / segment_sum(keep, row, rows).clamp(min=1)
    rbar, process = _group(rbar, group, known)
    value, result = _group(outcome, group, known)
    if form == "rloo":
        others = (process["count"] - 1).clamp(min=1)
        r = r - ((process["sum"] - rbar) / others)[row]
        if verl_baseline:
            r = r + (torch.where(keep, token_reward.double(), 0.0) - rbar[row]) / others[row]
        alive = (process["count"] > 1)[row]
        r = torch.where(alive, r, 0.0)
        value = torch.where(result["count"] > 1, value - (result["sum"] - value) / others, 0.0)
    elif form == "grpo":
        scale = _std(rbar - process["mean"], process, ddof)
        r = torch.where(process["dead"][row], 0.0, (r - process["mean"][row]) / scale[row])
        centred = value - result["mean"]
        value = torch.where(result["dead"], 0.0, centred / _std(centred, result, ddof))
    out = torch.where(keep, returns(r, cu, keep, gamma) + value[row], 0.0)
    return (whiten(out, keep, 1e-8) if whiten_result else out).to(token_reward.dtype)


def returns(token_reward: Tensor, cu: Tensor, mask: Tensor | None, gamma: float) -> Tensor:  # (N,)
    """R_t = r_t + gamma R_t+1 within each completion over its unmasked tokens, by doubling: log2(T)
    passes."""
    row = segment_ids(cu, token_reward.numel())
    place = torch.arange(token_reward.numel(), device=row.device)
    if mask is not None:
        place = mask.nonzero()[:, 0]
        row = row[place]
    total, shift = token_reward[place].to(torch.float64), 1
    while shift < row.numel():
        same = row[:-shift] == row[shift:]
        if not bool(same.any()):
            break
        further = torch.where(same, gamma**shift * total[shift:], 0.0)
        total = total + torch.cat([further, total.new_zeros(shift)])
        shift *= 2
    out = torch.zeros_like(token_reward, dtype=torch.float64)
    return out.index_copy(0, place, total).to(token_reward.dtype)


def step_reduce(
    value: Tensor, step: Tensor, n_steps: int, how: str
) -> Tensor:  # (N,), (N,) -> (S,)
    """Reduce the values of each step; min and max give their gradient to the first of equal
    values."""
    place = (step >= 0).nonzero()[:, 0]
    step, x = step[place], value[place].double()
    if how in ("sum", "mean"):
        total = segment_sum(x, step, n_steps)
        count = segment_sum(torch.ones_like(x), step, n_steps)
        return (total / count.clamp(min=1) if how == "mean" else total).to(value.dtype)
    if how == "prod":
        return x.new_ones(n_steps).scatter_reduce(0, step, x, "prod").to(value.dtype)
    order = torch.arange(x.numel(), device=x.device)
    if how == "last":
        chosen = _extreme(order, step, n_steps, "amax")
    else:
        best = _extreme(x.detach(), step, n_steps, f"a{how}")
        hit = (x.detach() == best[step]) | x.detach().isnan()
        chosen = _extreme(order[hit], step[hit], n_steps, "amin")
    full = segment_sum(torch.ones_like(x), step, n_steps) > 0
    out = x.new_zeros(n_steps)
    return out.index_copy(0, full.nonzero()[:, 0], x[chosen[full]]).to(value.dtype)


def step_expand(step_value: Tensor, step: Tensor, where: str) -> Tensor:  # (S,), (N,) -> (N,)
    """Give every token of a step (or only its last in memory order) the step's value; 0 in no
    step."""
    place = (step >= 0).nonzero()[:, 0]
    if where == "last":
        last = _extreme(place, step[place], step_value.numel(), "amax")
        place = place[last[step[place]] == place]
    out = torch.zeros(step.shape, dtype=step_value.dtype, device=step_value.device)
    return out.index_copy(0, place, step_value[step[place]])


def whiten(value: Tensor, mask: Tensor | None, eps: float) -> Tensor:  # (N,)
    """(x - mean) / sqrt(unbiased var + eps) over the unmasked values; fewer than two give 0."""
    keep = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
    x = torch.where(keep, value, 0.0).double()
    count = keep.sum()
    centred = torch.where(keep, x - x.sum() / count.clamp(min=1), 0.0)
    var = centred.square().sum() / (count - 1).clamp(min=1)
    return (centred / (var + eps).sqrt()).to(value.dtype)


def segment_ids(cu: Tensor, n: int) -> Tensor:  # (B+1,) -> (N,)
    rows = torch.arange(cu.numel() - 1, device=cu.device)
    return rows.repeat_interleave(cu.diff(), output_size=n)


def segment_sum(x: Tensor, row: Tensor, rows: int) -> Tensor:  # (rows,) float64
    return torch.zeros(rows, dtype=torch.float64, device=x.device).index_add(0, row, x.double())


def _extreme(x: Tensor, row: Tensor, rows: int, how: str) -> Tensor:
    return torch.zeros(rows, dtype=x.dtype, device=x.device).scatter_reduce(
        0, row, x, how, include_self=False
    )
