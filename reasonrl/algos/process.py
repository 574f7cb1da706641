"""GRPO with process rewards: the steps of a completion are credited one by one.

Step rewards are normalised over all steps of the group, like outcomes over its completions
(process supervision, arXiv 2402.03300, section 4.1.3); `baseline="position"` compares a step only
with its siblings at the same place, which is right where all completions of a prompt take the same
steps: an easy first step then says nothing about a hard last one. `credit="return"` gives a token
the sum of its own and all later steps, as in the paper; `credit="step"` gives it its own step only,
which is right where each step is judged on the value written before it. The outcome stays beside:

    advantage_t = outcome_weight * A(outcome) + step_weight * credit_t

Step rewards come from the task's rules here; learned scorers replace `score`. Where a task has no
rule for its steps the outcome is all the credit there is, which the log says once.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from reasonrl import ops
from reasonrl.algos.base import GRPO, cu_seqlens, per_token
from reasonrl.batch import lengths
from reasonrl.records import Rewards, Rollout
from reasonrl.segment import token_steps

logger = logging.getLogger("reasonrl")


@dataclass(frozen=True)
class Process(GRPO):
    credit: Literal["step", "return"] = "return"
    baseline: Literal["group", "position"] = "group"
    outcome_weight: float = 1.0
    step_weight: float = 1.0

    def advantage(self, rewards: Rewards, rollout: Rollout) -> Tensor:
        outcome = per_token(self.outcome_advantage(rewards, rollout), rollout)
        return self.outcome_weight * outcome + self.step_weight * self._process(rewards, rollout)

    def _process(self, rewards: Rewards, rollout: Rollout) -> Tensor:
        """(N,): the credit of the step each token stands in, 0 outside all steps."""
        if rewards.steps is None:
            _say_once(self.task.name)
            return torch.zeros(sum(lengths(rollout)))
        value = [s.reward for steps in rewards.steps for s in steps]
        counts = torch.tensor([len(steps) for steps in rewards.steps], dtype=torch.long)
        known = torch.tensor([v is not None for v in value], dtype=torch.bool)
        step_advantage = ops.group_advantage(
            torch.tensor([v or 0.0 for v in value], dtype=torch.float32),
            self._peers(rollout.group, counts),
            kind=self.kind,
            scored=known,
            ddof=self.ddof,
            eps=self.eps,
        )
        step_advantage = step_advantage * self.step_scale(counts)
        at = step_ids(rewards, rollout)
        if self.credit == "step":
            return ops.step_expand(step_advantage, at, where="all")
        ends = ops.step_expand(step_advantage, at, where="last")
        return ops.returns(ends, cu_seqlens=cu_seqlens(rollout))

    def step_scale(self, counts: Tensor) -> Tensor | float:
        """What multiplies the advantage of each of the S steps; counts: (B,) steps of each row."""
        return 1.0

    def _peers(self, group: Tensor, counts: Tensor) -> Tensor:
        """Which steps are compared with which: an id for each of the S steps."""
        owner = group.repeat_interleave(counts)
        if self.baseline == "group" or not len(owner):
            return owner
        place = torch.cat([torch.arange(n) for n in counts.tolist()])
        return owner * (int(place.max()) + 1) + place


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
