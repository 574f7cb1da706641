"""Supervised fine-tuning through the RL loop: the completion is given, its advantage is 1.

With the reinforce loss, -A logp averaged over tokens is the cross-entropy of the worked completion.
It is the cold start of every recipe and `reasonrl train sft`. Left out: loss on the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from reasonrl.algos.base import Algorithm
from reasonrl.records import InputError, Problem, Rewards, Rollout, scored
from reasonrl.rollout import Sampling, given


@dataclass(frozen=True)
class SFT(Algorithm):
    needs_groups: ClassVar[bool] = False

    def rollout(
        self, problems: Sequence[Problem], group: int, sampling: Sampling, seed: int
    ) -> Rollout:
        texts = []
        for problem in problems:
            worked = self.task.worked(problem)
            if worked is None:
                raise InputError(
                    f"problem {problem.id}: task {self.task.name} has no worked completion to learn"
                    " from (rows of a file need a `worked` field)"
                )
            texts.append(worked)
        return given(self.policy, problems, self.prompt(problems), texts)

    def score(self, rollout: Rollout) -> Rewards:
        return Rewards(outcome=[scored(1.0)] * len(rollout.text))

    def advantage(self, rewards: Rewards, rollout: Rollout) -> Tensor:
        return torch.ones(sum(map(len, rollout.completion_ids)))
