"""Libra's use of its judge: the mean verdict on unlabelled prompts is the reward (arXiv
2507.21645).

The paper labels rollouts with its judge and trains by DPO on the pairs (`reasonrl pairs --judge`,
`reasonrl train dpo`); this is the same judge online, which its reviewers asked for. Reward: the
mean of `votes` verdicts of a frozen judge (rewards/judge.py); GRPO as it is. No answer key is read
for it: the task's own verdict, where the task has one, is shown (`process/outcome_mean`,
`process/judge_right` and `_wrong`, the completions' `outcome`) and learned from nowhere. A
completion that the judge gave no clean verdict on is unscorable or infra: out of its group's
statistics, no gradient, counted in `rewards/unscorable` and `rewards/infra`.

`judge` is a folder or http://host:port/v1 (then `judge_model` is its name there). Without it the
run makes one: the policy as it is when RL begins answers `judge_problems` problems of the "sft"
split, the task's verifier labels the answers, and a copy of the policy learns the judgements by
rule for `judge_steps` steps. Those problems need an answer key and a worked answer, the prompts of
RL do not. A checkpoint keeps that judge in `judge/`, a folder that `judge` takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from reasonrl import models
from reasonrl.algos.base import GRPO, Start, mean
from reasonrl.cases import case_of
from reasonrl.chat import ChatClient, Patience
from reasonrl.chat.client import KEY
from reasonrl.judge_data import make_cases
from reasonrl.judge_train import taught
from reasonrl.models import Policy
from reasonrl.records import InputError, Problem, Rewards, Rollout, Score
from reasonrl.rewards.judge import Judge
from reasonrl.tasks.judging import gold, judgement


@dataclass
class Held:
    judge: Judge | None = None
    own: bool = False  # made by this run


@dataclass(frozen=True)
class Libra(GRPO):
    judge: str = ""  # folder, or http://host:port/v1
    judge_model: str = ""  # its name at that server
    judge_key_env: str = KEY
    judge_parallel: int = 32
    outage: Literal["pause", "mask", "fail"] = "pause"
    votes: int = 4
    max_tokens: int = 512  # of one judgement
    temperature: float = 1.0
    think: bool = True
    style: Literal["full", "compact"] = "full"
    with_cot: bool = False
    checklist: list[str] = field(default_factory=list)
    judge_problems: int = 1500
    judge_samples: int = 4
    judge_steps: int = 400
    judge_learning_rate: float = 1e-3
    held: Held = field(default_factory=Held, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        counts = "votes max_tokens judge_parallel judge_problems judge_samples judge_steps"
        for knob in counts.split():
            if getattr(self, knob) < 1:
                raise InputError(f"algo.{knob}: expected >= 1, got {getattr(self, knob)}")
        for knob in ("temperature", "judge_learning_rate"):
            value = getattr(self, knob)
            greedy = knob == "temperature" and value == 0 and self.votes == 1
            if not (math.isfinite(value) and (value > 0 or greedy)):
                raise InputError(f"algo.{knob}: expected a number > 0, got {value}")
        if self.style == "compact" and self.checklist:
            raise InputError("algo.checklist: expected none with style compact, got some")
        remote = self.judge.startswith(("http:", "https:"))
        if remote != bool(self.judge_model):
            raise InputError(
                "algo.judge_model: expected a name for a judge at http://..., and none for another,"
                f" got {self.judge_model!r} for {self.judge!r}"
            )
        if remote:
            patience = Patience(self.outage)
            self._hold(
                ChatClient(
                    self.judge,
                    self.judge_model,
                    key_env=self.judge_key_env,
                    parallel=self.judge_parallel,
                    patience=patience,
                )
            )
        elif self.judge:
            self._hold(models.load(self.judge, device=str(self.policy.device)))

    def begin(self, start: Start) -> None:
        if not self.judge:
            self.held.own = True
            if start.fresh:
                self._hold(self._made(start))

    def save(self, folder: Path) -> None:
        if self.held.own and self.held.judge is not None:
            policy = self.held.judge.policy
            assert isinstance(policy, Policy)
            policy.save(folder / "judge")

    def restore(self, folder: Path) -> None:
        if not self.judge:
            self._hold(models.load(str(folder / "judge"), device=str(self.policy.device)))

    def ahead(self, group: Rollout) -> None:
        assert self.held.judge is not None
        self.held.judge.begin(group)

    def outcomes(self, rollout: Rollout) -> Sequence[Score]:
        """The judge's mean verdicts; a filter sees them too."""
        return self._judged(rollout).outcome

    def score(self, rollout: Rollout) -> Rewards:
        found = self._judged(rollout)
        problems = [rollout.problems[g] for g in rollout.group.tolist()]
        known = self.task.verdicts(problems, rollout.text)
        metrics = {**found.metrics, **agreement(known, found.outcome)}
        return Rewards(outcome=found.outcome, metrics=metrics, verdict=known)

    def canary(self, false: Rollout) -> dict[str, Sequence[Score]]:
        return {"judge": self.outcomes(false)}

    def _judged(self, rollout: Rollout) -> Rewards:
        assert self.held.judge is not None
        if rollout.outcome is not None:
            return Rewards(outcome=rollout.outcome)
        return self.held.judge(rollout)

    def _hold(self, model: Policy | ChatClient) -> None:
        if isinstance(model, Policy):
            model.follow(self.policy)
            model.model.eval().requires_grad_(False)
        self.held.judge = Judge(
            model,
            votes=self.votes,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            think=self.think,
            with_cot=self.with_cot,
            checklist=self.checklist,
            style=self.style,
            seed=self.task.seed,
        )

    def _made(self, start: Start) -> Policy:
        """A judge from the policy itself, taught by rule on its own labelled answers."""
        task, count = self.task, self.judge_problems
        start.note(f"no algo.judge: labelling answers to {count} problems to teach one")
        problems = self._lessons(start)
        texts = [gold(problem, self.style, self.think) for problem in problems]
        pairs = [(p, t) for p, t in zip(problems, texts, strict=True) if t is not None]
        if not pairs:
            raise InputError(
                f"algo.judge: task {task.name} has no worked answers to teach a judge by; make one"
                " with `reasonrl judge train` and give its folder, or a server's address"
            )
        policy = self.policy.frozen()
        policy.model.requires_grad_(True)
        return taught(
            policy,
            [p for p, _ in pairs],
            [t for _, t in pairs],
            steps=self.judge_steps,
            learning_rate=self.judge_learning_rate,
            tokens=start.tokens,
            seed=task.seed,
            note=start.note,
        )

    def _lessons(self, start: Start) -> list[Problem]:
        """Judging problems: the policy's own answers, right and wrong ones balanced; a worked
        answer stands in for a problem that it never gets right."""
        task, span = self.task, ("sft", 0, self.judge_problems)
        rows = make_cases(
            {"policy": self.policy}, task, start.sampling, span, self.judge_samples, task.seed, True
        )
        how = (self.style, self.think, self.with_cot, task.seed)
        return [judgement(case_of(row), f"lesson-{i}", *how) for i, row in enumerate(rows)]


def agreement(known: Sequence[Score], judged: Sequence[Score]) -> dict[str, float]:
    """What the judge gives right and wrong completions, where the task can tell them apart: a judge
    that pays the wrong ones as much is being fooled."""
    pairs = [
        (k.value, j.value)
        for k, j in zip(known, judged, strict=True)
        if k.value is not None and j.value is not None
    ]
    right = [j for k, j in pairs if k >= 0.5]
    wrong = [j for k, j in pairs if k < 0.5]
    same = [float((j > 0.5) == (k >= 0.5)) for k, j in pairs]
    return {
        "process/outcome_mean": mean([k for k, _ in pairs]),
        "process/judge_right": mean(right),
        "process/judge_wrong": mean(wrong),
        "process/judge_agreement": mean(same),
    }
