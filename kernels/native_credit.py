"""Rewards to advantages on the CPU: `credit_advantage`, and what the fused core takes in its place.

A credit holds outcomes and groups beside step or token rewards (`reasonrl.credit`). Its group
statistics are made first, (B,) and (S,) numbers; then a completion is walked from its end, a block
of advantages at a time: into memory here (token rewards a group at a time, so that they come from
memory once), into the loss in `native.policy_loss`, which so needs one call from rewards to loss
and gradient. Legend: B completions, N packed tokens, S steps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonrl.kernels.native import FORMS, KINDS, PAYS, core, pointer, threads


def given(credit: Any, cu: Tensor, mask: Tensor | None) -> Any:
    """The CreditInput of _C; it points at the credit's tensors, which must outlive it."""
    c, paid = credit, credit.token_reward is not None
    return core().CreditInput(
        0 if c.token_reward is None else c.token_reward.numel(), c.outcome.numel(),
        0 if c.step_reward is None else c.step_reward.numel(), pointer(c.outcome),
        pointer(c.group), pointer(cu), pointer(mask), pointer(c.scored), pointer(c.token_reward),
        pointer(c.step_reward), pointer(c.step_scored), pointer(c.step), pointer(c.step_cu), paid,
        (FORMS if paid else KINDS)[c.kind], PAYS[c.pay], c.by_place, c.divide, c.verl_baseline,
        c.gamma, c.ddof, c.eps, c.outcome_weight, c.process_weight,
    )  # fmt: skip


def credit_advantage(credit: Any, cu: Tensor, mask: Tensor | None) -> Tensor:  # (N,)
    """Outcome against its group, and the worth of steps or tokens against theirs, one call."""
    tokens = credit.step if credit.token_reward is None else credit.token_reward
    out = torch.empty(tokens.numel(), dtype=torch.float32)
    core().credit_advantage(given(credit, cu, mask), pointer(out), threads())
    return out


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
    """Process returns and outcome against the group; whitened, if asked, over scored tokens."""
    reward, out = token_reward.detach(), torch.empty_like(token_reward)
    task = core().CreditInput(
        reward.numel(), outcome.numel(), 0, pointer(outcome), pointer(group), pointer(cu),
        pointer(mask), pointer(scored), pointer(reward), 0, 0, 0, 0, True, FORMS[form], 0, False,
        False, verl_baseline, gamma, ddof, 0.0, 1.0, 1.0,
    )  # fmt: skip
    core().credit_advantage(task, pointer(out), threads())
    if whiten_result:  # in place: fresh memory for a second array would cost more than the sums
        known = counted(cu, mask, scored, out.numel())
        core().whiten(pointer(out), pointer(known), out.numel(), 1e-8, pointer(out), threads())
    return out


def counted(cu: Tensor, mask: Tensor | None, scored: Tensor | None, n: int) -> Tensor | None:
    """Which of n tokens are unmasked and of a scored completion; None: all."""
    if scored is None:
        return mask
    known = scored.repeat_interleave(cu.diff(), output_size=n)
    return known if mask is None else known & mask


def trust(
    outcome: Tensor,  # (B,)
    thinking: Tensor,  # (B,)
    group: Tensor,  # (B,) int64
    known: Tensor | None,  # (B,) bool
    weight: float,
    threshold: float,
    trust: bool,
    score_wrong: bool,
    keep_degenerate: bool,
    kind: str,
    ddof: int,
    eps: float,
) -> Tensor:  # (3, B)
    """SophiaVL-R1's advantage, reward and gamma, a group at a time."""
    out = outcome.new_empty(3, outcome.numel())
    core().trust(
        pointer(outcome), pointer(thinking), pointer(group), pointer(known), outcome.numel(),
        weight, threshold, trust, score_wrong, keep_degenerate, KINDS[kind], ddof, eps,
        pointer(out),
    )  # fmt: skip
    return out
