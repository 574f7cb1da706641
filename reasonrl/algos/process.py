"""GRPO with process rewards: the steps of a completion are credited one by one.

Step rewards are normalised over all steps of the group, like outcomes over its completions
(process supervision, arXiv 2402.03300, section 4.1.3); `baseline="position"` compares a step only
with its siblings at the same place, which is right where all completions of a prompt take the same
steps: an easy first step then says nothing about a hard last one. `credit="return"` gives a token
the sum of its own and all later steps, as in the paper; `credit="step"` gives it its own step only,
which is right where each step is judged on the value written before it. The outcome stays beside:

    advantage_t = outcome_weight * A(outcome) + step_weight * credit_t

All of it is one `StepCredit`, one call from rewards to advantages.
Step rewards come from the task's rules here; learned scorers replace `score`. Where a task has no
rule for its steps the outcome is all the credit there is, which the log says once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Literal

import torch
from torch import Tensor

from reasonrl import keys, ops
from reasonrl.algos.base import GRPO, cu_seqlens, outcomes, per_token
from reasonrl.credit import StepCredit
from reasonrl.records import Rewards, Rollout
from reasonrl.segment import token_steps

logger = keys.logger("reasonrl")


@dataclass(frozen=True)
class Process(GRPO):
    credit: Literal["step", "return"] = "return"
    baseline: Literal["group", "position"] = "group"
    outcome_weight: float = 1.0
    step_weight: float = 1.0

    def advantage(self, rewards: Rewards, rollout: Rollout) -> Tensor:
        if rewards.steps is None:
            _say_once(self.task.name)
            return self.outcome_weight * per_token(
                self.outcome_advantage(rewards, rollout), rollout
            )
        credit = self.step_credit(rewards, rollout)
        return ops.credit_advantage(credit, cu_seqlens=cu_seqlens(rollout))

    def step_credit(self, rewards: Rewards, rollout: Rollout) -> StepCredit:
        """Outcomes and step rewards as the kernels take them; unknown ones stay out of groups."""
        outcome, known = outcomes(rewards)
        steps = rewards.steps or ()
        value = [s.reward for row in steps for s in row]
        factor, divide = self.step_scale()
        return StepCredit(
            outcome,
            rollout.group,
            torch.tensor([v or 0.0 for v in value], dtype=torch.float32),
            step_ids(rewards, rollout),
            torch.tensor([0, *accumulate(map(len, steps))], dtype=torch.long),
            scored=known,
            step_scored=torch.tensor([v is not None for v in value], dtype=torch.bool),
            kind=self.kind,
            ddof=self.ddof,
            eps=self.eps,
            pay=self.credit,
            baseline=self.baseline,
            outcome_weight=self.outcome_weight,
            process_weight=self.step_weight * factor,
            divide=divide,
        )

    def step_scale(self) -> tuple[float, bool]:
        """What multiplies every step's advantage, and whether a completion's steps share it."""
        return 1.0, False


@lru_cache
def _say_once(task: str) -> None:
    logger.warning("algorithm process: task %s has no rule for its steps; outcome only", task)


def step_ids(rewards: Rewards, rollout: Rollout) -> Tensor:
    """(N,) int64: the step of every completion token, numbered through the batch, -1 = none."""
    out: list[int] = []
    first = 0
    for steps, at in zip(rewards.steps or (), rollout.pieces, strict=True):
        out += [first + s if s >= 0 else -1 for s in token_steps(steps, at)]
        first += len(steps)
    return torch.tensor(out, dtype=torch.long)
