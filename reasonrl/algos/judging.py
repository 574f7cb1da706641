"""Training a judge by its verdicts, with a price on length (Libra, arXiv 2507.21645, eq. 4).

    R = 1[verdict == label] - clip((L - l_exp) / (l_max - l_exp), 0, 1)

L is the number of tokens of the judgement, its end included. A judgement without a clean verdict
earns 0 and still pays for its length: it is the judge that is graded, so this is a known 0 and not
an unscorable one. Advantages are GRPO's. Evaluation and `outcome` in the completions table are
plain accuracy. l_max == l_exp is a step: nothing up to l_exp, 1 beyond. Both null: no price, the
ablation without it. The paper's eq. 4 is known through its constants only; this form is ours (that
of DAPO's over-long penalty). Left out: the ranking subset (pairwise prompts).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reasonrl.algos.base import GRPO
from reasonrl.batch import lengths
from reasonrl.records import InputError, Rewards, Rollout, Score, scored
from reasonrl.systems import libra_reward
from reasonrl.tasks.judging import Judging


@dataclass(frozen=True)
class JudgeRL(GRPO):
    l_exp: float | None = None  # tokens that cost nothing
    l_max: float | None = None  # tokens from which on the price is 1

    def __post_init__(self) -> None:
        if not isinstance(self.task, Judging):
            raise InputError(
                f"algorithm judging: expected task judging, got {self.task.name!r}"
                " (algorithm libra trains on a judge's verdicts)"
            )
        if self.l_exp is None and self.l_max is None:
            return
        if self.l_exp is None or self.l_max is None:
            raise InputError(
                f"algo.l_exp, algo.l_max: expected two numbers, or null for both, got {self.l_exp}"
                f" and {self.l_max}"
            )
        if not (0 <= self.l_exp <= self.l_max and math.isfinite(self.l_max)):
            raise InputError(
                f"algo.l_exp, algo.l_max: expected 0 <= l_exp <= l_max, got {self.l_exp}"
                f" and {self.l_max}"
            )

    def score(self, rollout: Rollout) -> Rewards:
        assert isinstance(self.task, Judging)
        problems = [rollout.problems[g] for g in rollout.group.tolist()]
        pairs = list(zip(problems, rollout.text, strict=True))
        found = [self.task.verdict(problem, text) for problem, text in pairs]
        verdict = torch.tensor([math.nan if isinstance(v, str) else float(v) for v in found])
        label = torch.tensor([float(problem.extra["label"]) for problem in problems])
        length = torch.tensor([float(n) for n in lengths(rollout)])
        right = [Score("scored", float(v == n)) for v, n in zip(verdict, label, strict=True)]
        reward = self._reward(verdict, label, length)
        reasons = [v if isinstance(v, str) else "" for v in found]
        none = sum(map(bool, reasons)) / max(1, len(found))
        price = (verdict == label).float() - reward
        return Rewards(
            outcome=[scored(v, why) for v, why in zip(reward.tolist(), reasons, strict=True)],
            metrics={
                "judge/accuracy": _mean((verdict == label).float()),
                "judge/said_right": _mean((verdict == 1).float()),
                "judge/unparsable": none,
                "judge/length_price": _mean(price),
            },
            verdict=right,
        )

    def _reward(self, verdict: Tensor, label: Tensor, length: Tensor) -> Tensor:  # (B,)
        if self.l_exp is None or self.l_max is None:
            return (verdict == label).float()
        return libra_reward(verdict, label, length, l_exp=self.l_exp, l_max=self.l_max)


def _mean(value: Tensor) -> float:
    return float(value.mean()) if len(value) else 0.0
