"""GRPO, the base class: five rooms, of which every other algorithm replaces one or two.

    prompt -> rollout -> score -> advantage -> loss   (-> update of a learned reward)

GRPO (arXiv 2402.03300, section 4.1): the advantage of a completion is its outcome, normalised in
its group, on all of its tokens. Which loss (DAPO, Dr. GRPO, GSPO, CISPO, ...) is a LossSpec, not
an algorithm. Left out: the value model; the KL term is the loss's own.
"""

from __future__ import annotations

import difflib
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, get_type_hints

import torch
from accelerate import Accelerator
from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from reasonrl import ops
from reasonrl.batch import cu_seqlens, lengths
from reasonrl.models import Policy
from reasonrl.prompts import render
from reasonrl.records import InputError, Problem, Rewards, Rollout, Score, scored
from reasonrl.rollout import Sampling, sample
from reasonrl.tasks import Task


@dataclass
class Clock:
    """Where the run stands: the step under way (from 1) and how many there will be."""

    step: int = 0
    steps: int = 0


@dataclass(frozen=True)
class Start:
    """What a learned reward is given when RL begins."""

    initial: Policy | None  # frozen, the weights RL starts from; where `needs_initial`
    shared: bool  # whether the loss uses `initial` too; if not, it may be taken over
    accelerator: Accelerator
    tokens: int  # packed tokens of one micro-batch, at most
    fresh: bool = True  # False: a checkpoint holds what has been learned; `restore` follows
    sampling: Sampling = Sampling(64)  # how the run draws completions
    note: Callable[[str], None] = print  # says what takes long


@dataclass(frozen=True)
class Algorithm:
    """What every algorithm has; the fields after `policy` are its knobs (config section `algo`)."""

    task: Task
    policy: Policy
    needs_groups: ClassVar[bool] = True  # whether a group of one teaches nothing
    needs_initial: ClassVar[bool] = False  # whether it keeps the policy that RL started from
    needs_loss: ClassVar[Mapping[str, Any] | None] = None  # the only `loss` section it works with
    clock: Clock = field(default_factory=Clock, init=False, repr=False, compare=False)

    def prompt(self, problems: Sequence[Problem]) -> list[list[int]]:
        """The token ids each problem is asked with in training."""
        return self.plain_prompt(problems)

    def plain_prompt(self, problems: Sequence[Problem]) -> list[list[int]]:
        """The token ids of the prompts as the task states them, for evaluation."""
        words = self.policy.tokenizer
        return [render(words, p.prompt, images=len(p.images)) for p in problems]

    def rollout(
        self, problems: Sequence[Problem], group: int, sampling: Sampling, seed: int
    ) -> Rollout:
        asked = (self.policy, problems, self.prompt(problems), group, sampling, seed)
        if self.policy.engine is None or type(self).ahead is Algorithm.ahead:
            return sample(*asked)
        return sample(*asked, done=self.ahead)

    def ahead(self, group: Rollout) -> None:
        """Called with a group as soon as a server has drawn it, while it draws others: a scorer at
        a server may be asked from here on; `score` comes when all are there."""

    def score(self, rollout: Rollout) -> Rewards:
        """The task's own verdict on every completion, and its steps where a rule can check them."""
        problems = [rollout.problems[g] for g in rollout.group.tolist()]
        pairs = zip(problems, rollout.text, strict=True)
        found = [self.task.steps(problem, text) for problem, text in pairs]
        steps = [s for s in found if s is not None]
        known = steps if len(steps) == len(found) else None
        return Rewards(outcome=self.outcomes(rollout), steps=known)

    def outcomes(self, rollout: Rollout) -> Sequence[Score]:
        """The task's verdict on every completion, B of them; asked once a completion."""
        if rollout.outcome is not None:
            return rollout.outcome
        problems = [rollout.problems[g] for g in rollout.group.tolist()]
        return self.task.grades(problems, rollout.text)

    def canary(self, false: Rollout) -> dict[str, Sequence[Score]]:
        """What each of those who pay says of completions under problems that they do not answer
        (canary.py), 0 to 1; nothing is learned from it."""
        problems = [false.problems[g] for g in false.group.tolist()]
        found = self.task.verdicts(problems, false.text)
        return {"verifier": [_whole(score) for score in found]}

    def advantage(self, rewards: Rewards, rollout: Rollout) -> Tensor:
        """What multiplies the gradient of every completion token, (N,) fp32."""
        raise NotImplementedError

    def update(self, rollout: Rollout, rewards: Rewards) -> dict[str, float]:
        """Train a learned reward on this rollout; its metrics."""
        return {}

    def begin(self, start: Start) -> None:
        """Called once in a process, before its first RL step."""

    def finite(self) -> bool:
        """Whether every number of what has been learned is."""
        return True

    def save(self, folder: Path) -> None:
        """Put what the algorithm has learned into a checkpoint; on the main rank only."""

    def restore(self, folder: Path) -> None:
        """Take it back from a checkpoint, after `begin`."""


@dataclass(frozen=True)
class GRPO(Algorithm):
    kind: Literal["grpo", "dr_grpo", "rloo"] = "grpo"
    ddof: int = 1
    eps: float = 1e-6

    def advantage(self, rewards: Rewards, rollout: Rollout) -> Tensor:
        return per_token(self.outcome_advantage(rewards, rollout), rollout)

    def outcome_advantage(self, rewards: Rewards, rollout: Rollout) -> Tensor:
        """(B,): outcomes normalised in their groups; unknown outcomes are outside and get 0."""
        value, known = outcomes(rewards)
        return ops.group_advantage(
            value, rollout.group, kind=self.kind, scored=known, ddof=self.ddof, eps=self.eps
        )


def outcomes(rewards: Rewards) -> tuple[Tensor, Tensor]:
    """Outcome values (B,) fp32, 0 where unknown, and which are known (B,) bool."""
    value = [0.0 if s.value is None else s.value for s in rewards.outcome]
    known = [s.kind == "scored" for s in rewards.outcome]
    return _floats(array("f", value)), torch.tensor(known, dtype=torch.bool)


def _whole(score: Score) -> Score:
    """Right or not; part of an answer may be right under another problem too."""
    return score if score.value is None else scored(float(score.value == 1.0))


def mean(values: Sequence[float]) -> float:
    """The mean of known numbers; NaN of none."""
    return math.fsum(values) / len(values) if values else math.nan


def per_token(value: Tensor, rollout: Rollout) -> Tensor:
    """(B,) -> (N,): every token of a completion gets the completion's value."""
    if value.dtype != torch.float32:
        return value.repeat_interleave(torch.tensor(lengths(rollout), dtype=torch.long))
    every = array("f")
    for own, size in zip(value.tolist(), lengths(rollout), strict=True):
        every += array("f", (own,)) * size
    return _floats(every)


def _floats(values: array) -> Tensor:
    return torch.frombuffer(values, dtype=torch.float32) if values else torch.zeros(0)


def make(kind: type[Algorithm], task: Task, policy: Policy, knobs: Mapping[str, Any]) -> Algorithm:
    """An algorithm from the config's `algo` section; InputError for unknown or ill-typed knobs."""
    hints = get_type_hints(kind)
    known = [f.name for f in fields(kind) if f.init and f.name not in ("task", "policy")]
    checked = {}
    for key, value in knobs.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, 1, 0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"algo.{key}: unknown knob{hint} (known: {', '.join(known) or 'none'})"
            )
        try:
            adapter = TypeAdapter(hints[key], config=ConfigDict(strict=True))
            checked[key] = adapter.validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise InputError(f"algo.{key}: {reason}, got {value!r}") from None
    return kind(task=task, policy=policy, **checked)


__all__ = ["GRPO", "Algorithm", "cu_seqlens", "make", "mean", "outcomes", "per_token"]
