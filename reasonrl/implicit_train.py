"""How an implicit reward model learns while a run goes on: its optimiser, and what it reads again.

PRIME (arXiv 2502.01456) takes one step on the newest rollouts (`updates=1`). A small model whose
completions are short gets too few labels that way. More updates read rollouts again: those of the
last `replay` steps, or the newest alone (`replay=0`). Nothing is sampled for it, and what the
scores were before the first step is what the policy is paid. Which past step an update reads is
drawn from the number of steps seen, so a resumed run draws the same. `average` pays the scores of
an exponential average of the model's weights: few labels make each step noisy, and the noise is
most of what a young model says. Left out: a memory shared between ranks (refused there).
"""

from __future__ import annotations

from collections import deque
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor

from reasonrl.batch import lengths
from reasonrl.ranks import gathered, summed
from reasonrl.records import InputError, NonFiniteStop, Problem, Rewards, Rollout
from reasonrl.rewards.implicit import ImplicitPRM
from reasonrl.state_file import load_state, save_state
from reasonrl.vision import Seen

PATIENCE = 3  # steps in a row with a gradient that is not finite


class Labelled(NamedTuple):
    """Rollouts with their outcomes, as the reward model reads them."""

    rollout: Rollout
    outcome: Tensor  # (B,) fp32
    known: Tensor  # (B,) bool
    count: float  # known outcomes, of all ranks
    ref: Tensor | None  # (N,) fp32 log-probabilities of the reference


class Learning:
    """`read` gives scores and leaves a gradient, `step` takes it and any further updates."""

    def __init__(
        self,
        prm: ImplicitPRM,
        accelerator: Accelerator,
        *,
        rate: float = 1e-6,
        grad_clip: float = 10.0,
        updates: int = 1,  # optimiser steps for every `step`, the first on the newest rollouts
        replay: int = 0,  # steps whose rollouts the other updates choose from, the newest included
        average: float = 0.0,  # what the averaged weights keep of themselves at every update
    ):
        if replay and accelerator.num_processes > 1:
            raise InputError("algo.prm_replay: expected 0 with several processes, got a memory")
        self.prm, self.accelerator = prm, accelerator
        self.grad_clip, self.updates = grad_clip, updates
        self.parameters = [p for p in prm.prm.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.average = average
        self.mean: ImplicitPRM | None = None
        if average:
            self.mean = ImplicitPRM(prm.prm.frozen(), prm.ref, beta=prm.beta, tokens=prm.tokens)
        self.memory: deque[Labelled] = deque(maxlen=max(1, replay))
        self.remembers = replay > 0
        self.seen = 0  # calls of `read`
        self.skipped = 0

    def read(
        self, rollout: Rollout, outcome: Tensor, known: Tensor, ref: Tensor | None = None
    ) -> tuple[Rewards, float, float]:
        """Token rewards, this rank's share of the loss, and the known outcomes of all ranks."""
        count = _total(self.accelerator, float(known.sum()))
        if ref is None and (
            self.updates > 1 or self.mean is not None
        ):  # asked once for all readings
            ref = self.prm.reference_logp(rollout)
        found = Labelled(rollout, outcome, known, max(count, 1.0), ref)
        scores, loss = self.prm.learn(rollout, outcome, known, found.count, ref)
        if self.mean is not None:
            scores = self.mean(rollout, ref)
        if self.updates > 1:
            self.memory.append(found)
        self.seen += 1
        return scores, loss, found.count

    def score(self, rollout: Rollout, ref: Tensor | None = None) -> Rewards:
        """Token rewards now, of the averaged weights where there are some."""
        return (self.mean or self.prm)(rollout, ref)

    def step(self) -> dict[str, float]:
        """Step on the gradient that `read` left, then on what is read again."""
        metrics = self._apply()
        draw = torch.Generator().manual_seed(self.seen)
        losses = []
        for _ in range(self.updates - 1):
            at = int(torch.randint(len(self.memory), (), generator=draw))
            one = self.memory[at]
            losses.append(
                self.prm.learn(one.rollout, one.outcome, one.known, one.count, one.ref)[1]
            )
            metrics["process/prm_skipped"] += self._apply()["process/prm_skipped"]
        if losses:
            total = _total(self.accelerator, sum(losses))
            metrics["process/prm_replay_loss"] = total / len(losses)
        return metrics

    def finite(self) -> bool:
        """Whether every weight and every moment is."""
        moments = [m for of in self.optimizer.state.values() for m in of.values()]
        return all(bool(t.isfinite().all()) for t in [*self.parameters, *moments])

    def save(self, folder: Path) -> None:
        state = self.optimizer.state_dict() | {"skipped": self.skipped}
        save_state(folder / "prm_optimizer", state)
        if self.remembers:
            memory = [_plain(one) for one in self.memory]
            save_state(folder / "prm_memory", {"seen": self.seen, "memory": memory})

        if self.mean is not None:
            weights = [mine for mine, _ in self._averaged()]
            save_state(folder / "prm_average", {"weights": weights})

    def restore(self, folder: Path) -> None:
        if self.mean is not None:
            kept = load_state(folder / "prm_average")["weights"]
            with torch.no_grad():
                for (mine, _), value in zip(self._averaged(), kept, strict=True):
                    mine.copy_(value)
        state = load_state(folder / "prm_optimizer")
        self.skipped = state.pop("skipped", 0)
        self.optimizer.load_state_dict(state)
        if self.remembers:
            state = load_state(folder / "prm_memory")
            self.seen = state["seen"]
            self.memory.extend(_labelled(plain) for plain in state["memory"])

    def _apply(self) -> dict[str, float]:
        """One optimiser step; a gradient that is not finite is left out."""
        for p in self.parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        summed(self.accelerator, [p.grad for p in self.parameters if p.grad is not None])
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.grad_clip))
        finite = norm == norm and norm != float("inf")
        if finite:
            self.optimizer.step()
            with torch.no_grad():
                for mine, new in self._averaged():
                    mine.lerp_(new, 1 - self.average)
        self.skipped = 0 if finite else self.skipped + 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped >= PATIENCE:
            raise NonFiniteStop(f"the reward model's gradient was not finite {PATIENCE} times")
        return {"process/prm_grad_norm": norm, "process/prm_skipped": float(not finite)}

    def _averaged(self) -> list[tuple[Tensor, Tensor]]:
        """The averaged weights and the newest, of every parameter that learns."""
        if self.mean is None:
            return []
        pairs = zip(self.mean.prm.model.parameters(), self.prm.prm.model.parameters(), strict=True)
        return [(mine, new) for mine, new in pairs if new.requires_grad]


def _total(accelerator: Accelerator, mine: float) -> float:
    return sum(value for (value,) in gathered(accelerator, [mine]))


def _plain(one: Labelled) -> dict[str, Any]:
    rollout = one.rollout
    ids = [i for part in rollout.completion_ids for i in part]
    return {
        "prompts": [list(part) for part in rollout.prompt_ids],
        "ids": torch.tensor(ids, dtype=torch.long),
        "lengths": lengths(rollout),
        "group": rollout.group,
        "outcome": one.outcome,
        "known": one.known,
        "count": one.count,
        "ref": one.ref,
        "images": [None if i is None else (i.pixels, i.grid, i.positions) for i in rollout.images],
    }


def _labelled(plain: dict[str, Any]) -> Labelled:
    parts = plain["ids"].split(plain["lengths"])
    rollout = Rollout(
        problems=[Problem(str(i), "") for i in range(len(plain["prompts"]))],
        prompt_ids=plain["prompts"],
        group=plain["group"],
        completion_ids=[part.tolist() for part in parts],
        text=(),
        finished=(),
        logp=(),
        pieces=(),
        images=[None if i is None else Seen(*i) for i in plain.get("images", ())],
    )
    return Labelled(rollout, plain["outcome"], plain["known"], plain["count"], plain["ref"])
