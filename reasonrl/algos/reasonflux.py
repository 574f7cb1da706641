"""ReasonFlux-PRM's online use: a trajectory-aware process reward model beside the outcome.

arXiv 2506.18896, eq. 12: r = (1 - beta) * outcome + beta * rhat, with rhat = mean of the step
scores + alpha * the trajectory's score (eq. 11).
`mode=scalar` pays r for the whole completion (GRPO on r). `mode=dense` pays it piece by piece:
each of S steps beta * A(score) / S where it ends, and the end of the completion
(1 - beta) * outcome + beta * alpha * trajectory. Scores are centred in their group before they are
divided by S: the other way round, a completion of one step would earn S times as much as one of S.
`credit`, `baseline` and the weights are those of process.py. The reward model is frozen.

Without `prm` the run first trains one on the policy it starts from: completions of `prm_problems`
training problems, their steps labelled by the task's rule, `prm_steps` steps of prm_train.py.

The released code uses beta = 0.75 on one scalar; there a confident wrong answer (0.675) is paid
more than a right one that the model dislikes (0.4), so the default here pays the outcome more.
What the model cannot read is unscorable: outside its group, no gradient, `rewards/unscorable`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from reasonrl import prm_heads
from reasonrl.algos.base import GRPO, Start, mean, per_token
from reasonrl.algos.process import Process
from reasonrl.labels import sampled
from reasonrl.prm import PRM
from reasonrl.prm_train import PRMConfig, train
from reasonrl.records import InputError, Rewards, Rollout, Score, scored
from reasonrl.rewards.prm import PRMScorer
from reasonrl.stepwise import trace_of
from reasonrl.systems import reasonflux_reward
from reasonrl.vision import refuse


@dataclass
class Held:
    """What `begin` loads."""

    scorer: PRMScorer | None = None


@dataclass(frozen=True)
class ReasonFlux(Process):
    prm: str = ""  # folder of the reward model, or of its training run
    mode: Literal["scalar", "dense"] = "dense"
    beta: float = 0.5
    alpha: float = 1.0
    prm_problems: int = 2000
    prm_group: int = 8
    prm_steps: int = 800
    prm_learning_rate: float = 5e-4
    held: Held = field(default_factory=Held, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.beta <= 1:
            raise InputError(f"algo.beta: expected 0 to 1, got {self.beta}")
        if not math.isfinite(self.alpha):
            raise InputError(f"algo.alpha: expected a finite number, got {self.alpha}")
        for knob in ("prm_problems", "prm_group", "prm_steps"):
            if getattr(self, knob) < 1:
                raise InputError(f"algo.{knob}: expected >= 1, got {getattr(self, knob)}")
        refuse([self.task.problem("train", 0)], "a process reward model")
        if self.prm:
            self._hold(prm_heads.load(self.prm, delimiter=self.task.delimiter))

    def begin(self, start: Start) -> None:
        if not self.prm and start.fresh:
            self._hold(self._trained(start))

    def save(self, folder: Path) -> None:
        if not self.prm and self.held.scorer is not None:
            self.held.scorer.prm.save(folder / "prm")

    def restore(self, folder: Path) -> None:
        if not self.prm:
            self._hold(PRM.load(folder / "prm"))

    def _hold(self, prm: PRM) -> None:
        prm.to(self.policy.device).body.follow(self.policy)
        self.held.scorer = PRMScorer(prm, alpha=self.alpha)

    def _trained(self, start: Start) -> PRM:
        """A reward model on a copy of the policy, from its own completions."""
        task, delimiter = self.task, self.task.delimiter
        span = ("train", 0, self.prm_problems)
        start.note(f"no algo.prm: labelling {self.prm_problems} problems for a reward model")
        rows = sampled(
            self.policy, task, start.sampling, span, self.prm_group, delimiter, task.seed
        )
        traces = [trace_of(row, row["id"], True, delimiter) for row in rows]
        config = PRMConfig(
            steps=self.prm_steps,
            learning_rate=self.prm_learning_rate,
            batch_traces=64,
            delimiter=delimiter,
            seed=task.seed,
        )
        policy = self.policy.frozen()
        policy.model.requires_grad_(True)
        return train(traces, config, None, policy=policy, note=start.note).prm

    def score(self, rollout: Rollout) -> Rewards:
        assert self.held.scorer is not None
        outcome = self.outcomes(rollout)
        found = self.held.scorer(rollout)
        dense = self.mode == "dense"
        paid = [
            self._paid(o, rhat, steps if dense else ())
            for o, rhat, steps in zip(outcome, found.outcome, found.steps or (), strict=True)
        ]
        return Rewards(
            outcome=paid,
            steps=found.steps,
            metrics={**found.metrics, **_agreement(outcome, found.outcome)},
            verdict=outcome,
        )

    def canary(self, false: Rollout) -> dict[str, Sequence[Score]]:
        """The reward model's side by the mean of its steps."""
        assert self.held.scorer is not None
        found = self.held.scorer(false)
        known = [[s.reward for s in row if s.reward is not None] for row in found.steps or ()]
        pairs = zip(known, found.outcome, strict=True)
        means = [scored(mean(row)) if row and s.value is not None else s for row, s in pairs]
        return super().canary(false) | {"prm": means}

    def advantage(self, rewards: Rewards, rollout: Rollout) -> Tensor:
        if self.mode == "scalar":
            return per_token(GRPO.outcome_advantage(self, rewards, rollout), rollout)
        return Process.advantage(self, rewards, rollout)

    def step_scale(self) -> tuple[float, bool]:
        """beta / S: a completion's steps come to beta * their mean; where a token is paid by its
        own step alone there is no sum, and beta is all."""
        return self.beta, self.credit != "step"

    def _paid(self, outcome: Score, rhat: Score, steps: Sequence[Any]) -> Score:
        """Eq. 12; in dense mode without the steps' mean, which is paid where the steps end."""
        if outcome.value is None or rhat.value is None:
            return outcome if outcome.value is None else rhat
        average = math.fsum(s.reward for s in steps) / len(steps) if steps else 0.0
        pair = torch.tensor([[outcome.value], [rhat.value - average]], dtype=torch.float64)
        return scored(float(reasonflux_reward(*pair, beta=self.beta)), outcome.reason)


def _agreement(outcome: Sequence[Score], rhat: Sequence[Score]) -> dict[str, float]:
    """The plain outcome's mean, and what the model gives the right and the wrong ones: a model
    that pays the wrong ones as much is being fooled."""
    pairs = [
        (o.value, r.value)
        for o, r in zip(outcome, rhat, strict=True)
        if o.value is not None and r.value is not None
    ]
    right = [r for o, r in pairs if o >= 0.5]
    wrong = [r for o, r in pairs if o < 0.5]
    known = [o.value for o in outcome if o.value is not None]
    return {
        "process/outcome_mean": mean(known),
        "process/prm_score_right": mean(right),
        "process/prm_score_wrong": mean(wrong),
    }
