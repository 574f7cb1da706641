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
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from reasonrl import lora, models, ops
from reasonrl.algos.base import Algorithm, Start, outcomes
from reasonrl.batch import cu_seqlens, lengths
from reasonrl.logprobs import rollout_logp
from reasonrl.ranks import gathered, summed
from reasonrl.records import InputError, NonFiniteStop, Rewards, Rollout
from reasonrl.rewards.implicit import ImplicitPRM, same_vocabulary
from reasonrl.state_file import load_state, save_state

PATIENCE = 3  # steps in a row with a gradient that is not finite


@dataclass
class Held:
    """What changes while the run goes on."""

    start: Start | None = None
    prm: ImplicitPRM | None = None
    optimizer: Any = None
    skipped: int = 0


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
            model.compute = self.policy.compute
            if not same_vocabulary(model, self.policy):
                raise InputError(f"algo.prm: {self.prm}: its vocabulary differs from the policy's")
        elif kept or start.shared:
            model = initial.frozen()
        else:  # nobody else needs the first weights
            model = initial
        model = lora.trainable(model, self.lora_rank)
        ref = initial if kept else None  # else the adapter switched off, or the policy
        self.held.prm = ImplicitPRM(model, ref, beta=self.beta, tokens=start.tokens)
        self.held.optimizer = torch.optim.AdamW(
            [p for p in model.model.parameters() if p.requires_grad],
            lr=self.prm_learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.0,
        )
        self.held.start = start

    def score(self, rollout: Rollout) -> Rewards:
        outcome, known = outcomes(task := Rewards(outcome=self.outcomes(rollout)))
        held = self.held
        assert held.prm is not None and held.start is not None
        accelerator = held.start.accelerator
        count = sum(n for (n,) in gathered(accelerator, [float(known.sum())]))
        ref = None
        if self.reference == "policy":
            ref = rollout_logp(self.policy, rollout, held.start.tokens)
        scores, loss = held.prm.learn(rollout, outcome, known, max(count, 1.0), ref)
        sums = _agreement(scores, outcome, known, max(count, 1.0)) | {"process/prm_loss": loss}
        ranks = gathered(accelerator, list(sums.values()))
        total = [float(sum(column)) for column in zip(*ranks, strict=True)]
        metrics = dict(zip(sums, total, strict=True))
        if self.order == "double":
            metrics |= self._step_prm()
            scores = held.prm(rollout, ref)
        token = self._process(scores, rollout)
        metrics["process/return_std"] = _spread(token, rollout)
        return Rewards(
            outcome=task.outcome,
            token=list(token.split(lengths(rollout))),
            metrics=metrics,
        )

    def advantage(self, rewards: Rewards, rollout: Rollout) -> Tensor:
        outcome, known = outcomes(rewards)
        token = torch.cat(list(rewards.token)) if rewards.token else torch.zeros(0)
        value = ops.prime_advantage(
            self.process_weight * token,
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
        return self._step_prm() if self.order == "single" else {}

    def save(self, folder: Path) -> None:
        assert self.held.prm is not None
        lora.save(self.held.prm.prm, folder)
        save_state(folder / "prm_optimizer", self.held.optimizer.state_dict())

    def restore(self, folder: Path) -> None:
        assert self.held.prm is not None
        lora.restore(self.held.prm.prm, folder)
        self.held.optimizer.load_state_dict(load_state(folder / "prm_optimizer"))

    def _step_prm(self) -> dict[str, float]:
        """Step pi_phi on the gradient that `learn` left; one that is not finite is left out."""
        held = self.held
        assert held.start is not None
        parameters = held.optimizer.param_groups[0]["params"]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        summed(held.start.accelerator, [p.grad for p in parameters])
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.prm_grad_clip))
        finite = norm == norm and norm != float("inf")
        if finite:
            held.optimizer.step()
        held.skipped = 0 if finite else held.skipped + 1
        held.optimizer.zero_grad(set_to_none=True)
        if held.skipped >= PATIENCE:
            raise NonFiniteStop(f"the reward model's gradient was not finite {PATIENCE} times")
        return {"process/prm_grad_norm": norm, "process/prm_skipped": float(not finite)}

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
