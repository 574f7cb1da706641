"""Rewards in place of advantages: what a loss takes when it makes the advantages itself.

    credit = StepCredit(outcome, group, step_reward, step, step_cu)
    out = policy_loss(logp, old_logp, credit, spec)          # one launch: rewards to dL/dlogp
    advantage = credit_advantage(credit)                     # the same advantages, as a tensor

`StepCredit` is process supervision (arXiv 2402.03300, section 4.1.3): outcomes and step rewards,
each against their group. `TokenCredit` is PRIME (2502.01456, eq. 5, 7, 8): token rewards and
outcomes. `policy_loss` never stores their advantages (native, cuda; `reference` does);
`linear_policy_loss` makes them once, in a launch of their own. Left out: whitening, which must have
seen the whole batch before the first loss (`prime_advantage(..., whiten=True)`).
Legend: B completions, T tokens, N packed tokens, S steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from reasonrl import checks
from reasonrl.ops import credit_advantage

__all__ = ["StepCredit", "TokenCredit", "credit_advantage"]


@dataclass
class Packed:
    """A credit as the kernels see it: packed, contiguous tensors and plain numbers."""

    outcome: Tensor  # (B,)
    group: Tensor  # (B,) int64
    scored: Tensor | None  # (B,) bool
    gamma: float
    ddof: int
    outcome_weight: float
    process_weight: float
    kind: str
    token_reward: Tensor | None = None  # (N,); None: steps
    step_reward: Tensor | None = None  # (S,)
    step_scored: Tensor | None = None  # (S,) bool
    step: Tensor | None = None  # (N,) int64
    step_cu: Tensor | None = None  # (B+1,) int64
    pay: str = "return"
    by_place: bool = False
    divide: bool = False
    verl_baseline: bool = False
    eps: float = 0.0


@dataclass(frozen=True)
class StepCredit:
    """outcome_weight * A(outcome) + process_weight * (what the token's step is worth), by token.

    A is `group_advantage` (kind, ddof, eps), for steps over the scored steps of the group, or, with
    baseline="position", over those at the same place in their completions. pay="return": a step is
    worth its A to every token up to its end, gamma discounting by unmasked tokens; pay="step": to
    its own tokens only. divide: a completion's steps share it evenly. A step is one run of
    neighbouring tokens; completion b has the steps step_cu[b] .. step_cu[b + 1] - 1.
    """

    outcome: Tensor  # (B,)
    group: Tensor  # (B,) int
    step_reward: Tensor  # (S,)
    step: Tensor  # int, the layout of logp; -1 = in no step
    step_cu: Tensor  # (B+1,) int
    scored: Tensor | None = None  # (B,) bool, whose outcome is known
    step_scored: Tensor | None = None  # (S,) bool, whose reward is known
    kind: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    ddof: int = 1
    eps: float = 1e-6
    pay: Literal["return", "step"] = "return"
    baseline: Literal["group", "position"] = "group"
    gamma: float = 1.0
    outcome_weight: float = 1.0
    process_weight: float = 1.0
    divide: bool = False

    @property
    def tokens(self) -> Tensor:
        return self.step

    def packed(self, lay: checks.Layout, dtype: torch.dtype) -> Packed:
        checks.choice("kind", self.kind, ("grpo", "dr_grpo", "rloo"))
        checks.choice("pay", self.pay, ("return", "step"))
        checks.choice("baseline", self.baseline, ("group", "position"))
        step = lay.token("step", self.step, checks.INTEGER)
        _rewards("step_reward", self.step_reward, self.step_scored, lay.cu.device)
        steps = self.step_reward.numel()
        cu = (self.step_cu, (lay.rows + 1,), "(B+1,)", checks.INTEGER, lay.cu.device)
        checks.tensor("step_cu", *cu)
        offsets = checks.offsets("step_cu", self.step_cu, steps, lay.cu.device, "S")
        known = self.step_scored
        own = {
            "step_reward": self.step_reward.detach().to(dtype).contiguous(),
            "step_scored": None if known is None else known.contiguous(),
            "step": step.long().contiguous(),
            "step_cu": offsets,
            "kind": self.kind,
            "pay": self.pay,
            "by_place": self.baseline == "position",
            "divide": bool(self.divide),
            "eps": checks.nonnegative("eps", self.eps),
        }
        return Packed(**_common(self, lay, dtype), **own)


@dataclass(frozen=True)
class TokenCredit:
    """PRIME's advantages, as `prime_advantage`: process return and outcome against the group.

    process_weight multiplies the token rewards' part, outcome_weight the outcomes'.
    """

    token_reward: Tensor  # the layout of logp
    outcome: Tensor  # (B,)
    group: Tensor  # (B,) int
    scored: Tensor | None = None  # (B,) bool
    form: Literal["rloo", "grpo", "reinforce"] = "rloo"
    gamma: float = 1.0
    ddof: int = 1
    verl_baseline: bool = False
    outcome_weight: float = 1.0
    process_weight: float = 1.0

    @property
    def tokens(self) -> Tensor:
        return self.token_reward

    def packed(self, lay: checks.Layout, dtype: torch.dtype) -> Packed:
        checks.choice("form", self.form, ("rloo", "grpo", "reinforce"))
        if self.verl_baseline and self.form != "rloo":
            raise ValueError(f"verl_baseline needs form='rloo', got {self.form!r}")
        reward = lay.token("token_reward", self.token_reward.detach())
        common = _common(self, lay, dtype)
        counted = lay.mask
        if self.scored is not None:
            known = self.scored.repeat_interleave(lay.cu.diff(), output_size=reward.numel())
            counted = known if counted is None else known & counted
        checks.finite("token_reward", reward, counted)
        own = {
            "token_reward": reward.to(dtype).contiguous(),
            "kind": self.form,
            "verl_baseline": bool(self.verl_baseline),
        }
        return Packed(**common, **own)


def _common(credit: StepCredit | TokenCredit, lay: checks.Layout, dtype) -> dict[str, Any]:
    checks.choice("ddof", credit.ddof, (0, 1))
    device, outcome = lay.cu.device, credit.outcome
    checks.tensor("outcome", outcome, (lay.rows,), "(B,)", checks.FULL, device)
    group = checks.groups("outcome", outcome, credit.group, credit.scored)
    return {
        "outcome": outcome.detach().to(dtype).contiguous(),
        "group": group.contiguous(),
        "scored": None if credit.scored is None else credit.scored.contiguous(),
        "gamma": checks.discount(credit.gamma),
        "ddof": credit.ddof,
        "outcome_weight": checks.number("outcome_weight", credit.outcome_weight),
        "process_weight": checks.number("process_weight", credit.process_weight),
    }


def _rewards(name: str, value: Tensor, known: Tensor | None, device: torch.device) -> None:
    checks.dtype(name, value, checks.FULL)
    if value.dim() != 1:
        raise ValueError(f"{name} must be (S,), got {tuple(value.shape)}")
    checks.tensor(name, value, value.shape, "(S,)", checks.FULL, device)
    if known is not None:
        checks.tensor("step_scored", known, value.shape, "(S,)", (torch.bool,), device)
    checks.finite(name, value, known)
