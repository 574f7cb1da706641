"""DPO through the RL loop: a pair is a group of two given completions, its advantage is exact.

arXiv 2305.18290 eq. 7. The loss -log sigmoid(m) of a pair's margin m = beta ((log pi(y_w) - log
ref(y_w)) - (log pi(y_l) - log ref(y_l))) has the gradient of the reinforce loss with the advantage
+-beta sigmoid(-m) on every token of y_w and y_l; so packing, micro-batches and ranks are the loop's
own. Pairs are rows with `prompt`, `chosen` and `rejected` (a JSONL or parquet file as the task).
Left out: label smoothing, length normalisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from reasonrl.algos.base import Algorithm, Start, per_token
from reasonrl.batch import lengths
from reasonrl.logprobs import rollout_logp
from reasonrl.models import Policy
from reasonrl.records import InputError, Problem, Rewards, Rollout, Score, scored
from reasonrl.rollout import Sampling, given
from reasonrl.systems import dpo_loss


@dataclass
class Held:
    reference: Policy | None = None
    tokens: int = 4096


@dataclass(frozen=True)
class Dpo(Algorithm):
    needs_initial: ClassVar[bool] = True
    needs_groups: ClassVar[bool] = False  # a pair is what a group is here
    needs_loss: ClassVar[dict[str, Any]] = {"name": "reinforce", "reduce": "fixed", "max_length": 1}

    beta: float = 0.1
    held: Held = field(default_factory=Held, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise InputError(f"algo.beta: expected > 0, got {self.beta}")

    def begin(self, start: Start) -> None:
        self.held.reference, self.held.tokens = start.initial, start.tokens

    def rollout(
        self, problems: Sequence[Problem], group: int, sampling: Sampling, seed: int
    ) -> Rollout:
        """The pairs as they are written: chosen, then rejected."""
        written = []
        for problem in problems:
            texts = [problem.extra.get(name) for name in ("chosen", "rejected")]
            for name, text in zip(("chosen", "rejected"), texts, strict=True):
                if not isinstance(text, str) or not text:
                    raise InputError(
                        f"problem {problem.id}: {name}: expected a non-empty text, got {text!r}"
                    )
            if texts[0] == texts[1]:
                raise InputError(f"problem {problem.id}: chosen and rejected are the same text")
            written += texts
        return given(self.policy, problems, self.prompt(problems), written)

    def score(self, rollout: Rollout) -> Rewards:
        """Outcome: 1 for the chosen, 0 for the rejected. Metrics: what DPO papers plot."""
        margin = self.margin(rollout)
        zero = torch.zeros_like(margin)
        loss = dpo_loss(margin / self.beta, zero, zero, zero, beta=self.beta)
        return Rewards(
            outcome=[scored(float(b % 2 == 0)) for b in range(len(rollout.text))],
            metrics={
                "dpo/loss": float(loss),
                "dpo/margin": float(margin.mean()) if len(margin) else 0.0,
                "dpo/accuracy": float((margin > 0).float().mean()) if len(margin) else 0.0,
            },
            token=list(self._token(margin, rollout).split(lengths(rollout))),
        )

    def canary(self, false: Rollout) -> dict[str, Sequence[Score]]:
        """None: nobody grades pairs."""
        return {}

    def advantage(self, rewards: Rewards, rollout: Rollout) -> Tensor:
        return torch.cat(list(rewards.token)) if rewards.token else torch.zeros(0)

    def margin(self, rollout: Rollout) -> Tensor:
        """(P,) beta times the difference of the two log-ratios."""
        assert self.held.reference is not None
        tokens = self.held.tokens
        gap = rollout_logp(self.policy, rollout, tokens)
        gap = gap - rollout_logp(self.held.reference, rollout, tokens)
        sums = torch.stack([part.double().sum() for part in gap.split(lengths(rollout))] or [])
        return (self.beta * (sums[0::2] - sums[1::2])).float()

    def _token(self, margin: Tensor, rollout: Rollout) -> Tensor:
        """(N,) the advantage: the loss divides by all 2P completions, so it is doubled."""
        weight = 2 * self.beta * torch.sigmoid(-margin)
        return per_token(torch.stack([weight, -weight], 1).reshape(-1), rollout)
