"""PRIME: an implicit process reward model, learned online from outcomes, pays every token.

arXiv 2502.01456. The reward model pi_phi and the reference start as the policy RL starts from.
A step scores the completions' tokens (eq. 3), turns them and the outcomes into advantages (eq. 5
rloo, 7 grpo, 8 reinforce), updates the policy, and steps pi_phi on the cross-entropy of its sums
against the outcomes. `order="single"` (default): the scores are those of pi_phi before its step, so
one forward and backward serve both. "double": pi_phi steps first and scores afterwards. The
accuracy filter is the run's (`filter.low`, `filter.high`); outcomes may be soft (code).

Flags of the released code: `verl_baseline`, `batch_norm` (scores over their largest return, over
all ranks; a floor keeps early noise small), `last_token=false`. Memory: `lora_rank` makes pi_phi an
adapter on the reference, `reference="policy"` takes the policy's own log-probabilities instead.

Not in the paper, for small models (all off by default): `prm_updates` and `prm_replay` let the
reward model read rollouts more than once, `prm_average` pays the scores of an average of its
weights (implicit_train.py); `process_warmup` lets its rewards count little by little over the first
steps, while it learns from ordinary outcome-only ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from reasonrl import lora, models, ops
from reasonrl.algos.base import Algorithm, Start, outcomes
from reasonrl.batch import cu_seqlens, lengths
from reasonrl.implicit_train import Learning
from reasonrl.logprobs import rollout_logp
from reasonrl.ranks import gathered
from reasonrl.records import InputError, Rewards, Rollout, Score, scored
from reasonrl.rewards.implicit import ImplicitPRM, same_vocabulary


@dataclass
class Held:
    """What changes while the run goes on."""

    start: Start | None = None
    prm: ImplicitPRM | None = None
    learning: Learning | None = None


@dataclass(frozen=True)
class Prime(Algorithm):
    needs_initial: ClassVar[bool] = True

    form: Literal["rloo", "grpo", "reinforce"] = "rloo"
    beta: float = 0.05
    gamma: float = 1.0
    ddof: int = 1
    process_weight: float = 1.0
    whiten: bool = True
    verl_baseline: bool = False
    batch_norm: bool = False
    batch_norm_floor: float = 1.0
    last_token: bool = True  # whether the last token has a process reward
    order: Literal["single", "double"] = "single"
    reference: Literal["initial", "policy"] = "initial"
    prm: str = ""  # a folder; empty: a copy of the policy RL starts from
    prm_learning_rate: float = 1e-6
    prm_grad_clip: float = 10.0
    prm_updates: int = 1  # optimiser steps of the reward model in every step
    prm_replay: int = 0  # steps whose rollouts the updates after the first read; 0: the newest
    prm_average: float = 0.0  # scores by an average of its weights that keeps this share a step
    process_warmup: int = 0  # steps over which the process weight grows from 0
    lora_rank: int = 0
    held: Held = field(default_factory=Held, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        rules = [
            ("beta", self.beta > 0, "> 0", self.beta),
            ("gamma", 0 <= self.gamma <= 1, "0 to 1", self.gamma),
            ("ddof", self.ddof in (0, 1), "0 or 1", self.ddof),
            ("batch_norm_floor", self.batch_norm_floor > 0, "> 0", self.batch_norm_floor),
            ("prm_learning_rate", self.prm_learning_rate >= 0, ">= 0", self.prm_learning_rate),
            ("prm_grad_clip", self.prm_grad_clip > 0, "> 0", self.prm_grad_clip),
            ("prm_updates", self.prm_updates >= 1, ">= 1", self.prm_updates),
            ("prm_replay", self.prm_replay >= 0, ">= 0", self.prm_replay),
            (
                "prm_replay",
                not self.prm_replay or self.prm_updates > 1,
                "0 with prm_updates=1",
                self.prm_replay,
            ),
            ("prm_average", 0 <= self.prm_average < 1, "0 to below 1", self.prm_average),
            ("process_warmup", self.process_warmup >= 0, ">= 0", self.process_warmup),
            ("lora_rank", self.lora_rank >= 0, ">= 0", self.lora_rank),
            ("verl_baseline", not self.verl_baseline or self.form == "rloo", "form=rloo", True),
            ("prm", not (self.prm and self.lora_rank), "empty with lora_rank", self.prm),
        ]
        for knob, holds, expected, got in rules:
            if not holds:
                raise InputError(f"algo.{knob}: expected {expected}, got {got!r}")

    def begin(self, start: Start) -> None:
        initial = start.initial
        assert initial is not None  # needs_initial
        kept = self.reference == "initial" and not self.lora_rank
        if self.prm:
            model = models.load(self.prm, device=str(self.policy.device))
            model.follow(self.policy)
            if not same_vocabulary(model, self.policy):
                raise InputError(f"algo.prm: {self.prm}: its vocabulary differs from the policy's")
        elif kept or start.shared:
            model = initial.frozen()
        else:  # nobody else needs the first weights
            model = initial
        model = lora.trainable(model, self.lora_rank)
        ref = initial if kept else None  # else the adapter switched off, or the policy
        self.held.prm = ImplicitPRM(model, ref, beta=self.beta, tokens=start.tokens)
        self.held.learning = Learning(
            self.held.prm,
            start.accelerator,
            rate=self.prm_learning_rate,
            grad_clip=self.prm_grad_clip,
            updates=self.prm_updates,
            replay=self.prm_replay,
            average=self.prm_average,
        )
        self.held.start = start

    def score(self, rollout: Rollout) -> Rewards:
        outcome, known = outcomes(task := Rewards(outcome=self.outcomes(rollout)))
        held = self.held
        assert held.prm is not None and held.start is not None and held.learning is not None
        ref = None
        if self.reference == "policy":
            ref = rollout_logp(self.policy, rollout, held.start.tokens)
        scores, loss, count = held.learning.read(rollout, outcome, known, ref)
        sums = _agreement(scores, outcome, known, count) | {"process/prm_loss": loss}
        accelerator = held.start.accelerator
        ranks = gathered(accelerator, list(sums.values()))
        total = [float(sum(column)) for column in zip(*ranks, strict=True)]
        metrics = dict(zip(sums, total, strict=True))
        if self.order == "double":
            metrics |= held.learning.step()
            scores = held.learning.score(rollout, ref)
        scores, lost = _usable(scores, known)
        metrics["process/nonfinite"] = sum(n for (n,) in gathered(accelerator, [lost]))
        token = self._process(scores, rollout)
        metrics["process/return_std"] = _spread(token, rollout)
        metrics["process/weight"] = self._weight()
        return Rewards(
            outcome=task.outcome,
            token=list(token.split(lengths(rollout))),
            metrics=metrics,
        )

    def canary(self, false: Rollout) -> dict[str, Sequence[Score]]:
        """The reward model's side by the sign of its sum, the log-odds."""
        held = self.held
        assert held.learning is not None and held.start is not None
        ref = None
        if self.reference == "policy":
            ref = rollout_logp(self.policy, false, held.start.tokens)
        found = held.learning.score(false, ref).outcome
        signs = [s if s.value is None else scored(float(s.value > 0)) for s in found]
        return super().canary(false) | {"prm": signs}

    def advantage(self, rewards: Rewards, rollout: Rollout) -> Tensor:
        outcome, known = outcomes(rewards)
        token = torch.cat(list(rewards.token)) if rewards.token else torch.zeros(0)
        value = ops.prime_advantage(
            self._weight() * token,
            outcome,
            rollout.group,
            cu_seqlens=cu_seqlens(rollout),
            form=self.form,
            gamma=self.gamma,
            ddof=self.ddof,
            scored=known,
            verl_baseline=self.verl_baseline,
        )
        return self._whitened(value, known, rollout) if self.whiten else value

    def update(self, rollout: Rollout, rewards: Rewards) -> dict[str, float]:
        assert self.held.learning is not None
        return self.held.learning.step() if self.order == "single" else {}

    def finite(self) -> bool:
        return self.held.learning is None or self.held.learning.finite()

    def save(self, folder: Path) -> None:
        assert self.held.prm is not None and self.held.learning is not None
        lora.save(self.held.prm.prm, folder / "prm", folder / "prm_adapter")
        self.held.learning.save(folder)

    def restore(self, folder: Path) -> None:
        assert self.held.prm is not None and self.held.learning is not None
        lora.restore(self.held.prm.prm, folder / "prm", folder / "prm_adapter")
        self.held.learning.restore(folder)

    def _weight(self) -> float:
        """The process weight of the step under way: 0 at the first of a warm-up."""
        done = (self.clock.step - 1) / self.process_warmup if self.process_warmup else 1.0
        return self.process_weight * min(done, 1.0)

    def _process(self, scores: Rewards, rollout: Rollout) -> Tensor:
        """(N,) token rewards under the flags; NaN where the outcome is unknown."""
        token = torch.cat(list(scores.token)) if scores.token else torch.zeros(0)
        cu = cu_seqlens(rollout)
        if not self.last_token:
            ends = cu[1:][cu.diff() > 0] - 1
            token = token.index_fill(0, ends, 0.0)
        if self.batch_norm:
            assert self.held.start is not None
            back = ops.returns(token.nan_to_num(), cu_seqlens=cu).abs()
            mine = float(back.max()) if len(back) else 0.0
            largest = max(m for (m,) in gathered(self.held.start.accelerator, [mine]))
            token = token / max(largest, self.batch_norm_floor)
        return token

    def _whitened(self, value: Tensor, known: Tensor, rollout: Rollout) -> Tensor:
        """Whitened over the scored tokens of all ranks."""
        assert self.held.start is not None
        accelerator = self.held.start.accelerator
        keep = known.repeat_interleave(torch.tensor(lengths(rollout), dtype=torch.long))
        if accelerator.num_processes == 1:
            return ops.whiten(value, mask=keep)
        x = value[keep].double()
        sums = gathered(accelerator, [float(len(x)), float(x.sum()), float(x.square().sum())])
        n, total, squares = (sum(column) for column in zip(*sums, strict=True))
        mean = total / max(n, 1.0)
        variance = (squares - n * mean * mean) / max(n - 1, 1.0)
        return torch.where(keep, (value - mean) / (variance + 1e-8) ** 0.5, 0.0).float()


def _usable(scores: Rewards, known: Tensor) -> tuple[Rewards, float]:
    """Token rewards that are not finite count as none, as a token's credit does in the loss; how
    many there were. The update finds the cause: its gradient is not finite either."""
    tokens, lost = [], 0
    for token, sure in zip(scores.token or (), known.tolist(), strict=True):
        bad = ~token.isfinite() if sure else torch.zeros_like(token, dtype=torch.bool)
        lost += int(bad.sum())
        tokens.append(token.masked_fill(bad, 0.0))
    return replace(scores, token=tokens), float(lost)


def _agreement(scores: Rewards, outcome: Tensor, known: Tensor, count: float) -> dict[str, float]:
    """This rank's share of two means over the `count` scored completions of all ranks: the log-
    odds, and how often its side is the outcome's."""
    total = torch.tensor([s.value or 0.0 for s in scores.outcome])[known]
    right = (total > 0) == (outcome[known] >= 0.5)
    return {
        "process/implicit_reward_mean": float(total.sum()) / count,
        "process/prm_accuracy": float(right.sum()) / count,
    }


def _spread(token: Tensor, rollout: Rollout) -> float:
    """Standard deviation of the process returns before whitening."""
    back = ops.returns(token.nan_to_num(), cu_seqlens=cu_seqlens(rollout))
    return float(back.std()) if len(back) > 1 else 0.0
