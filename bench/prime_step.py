"""A whole PRIME step beside a step of outcome-only RLOO: seconds, phases, peak memory.

Sides: `outcome`, and PRIME with its reward model as a copy, a LoRA adapter on the reference, and a
copy whose reference is the policy. All start from one model and sample the same completions of
exactly `tokens` tokens (the learning rate is too small to move a weight); every other one counts as
right, so that no row is dead. Sides take turns after one warm-up each. Memory is the high water of
a process that runs one side alone. The gate: equal completions on all sides, and a reward model
that has moved.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from bench.step_ours import NeverEnds, Settings, parity, prompt_texts
from reasonrl import models
from reasonrl.algos import GRPO, Prime
from reasonrl.algos.base import Algorithm, Start
from reasonrl.config import BatchLimit, Config
from reasonrl.loss import LossSpec
from reasonrl.records import Problem, Rewards, Score, scored
from reasonrl.rollout import Sampling
from reasonrl.update import Learner

RATE = 1e-12  # moves no fp32 weight that matters: every side samples from the same policy
PHASES = ("rollout", "score", "update", "reward_update")
SIDES: dict[str, dict[str, Any]] = {
    "outcome": {},
    "copy": {"prm_learning_rate": 1e-5},
    "lora": {"prm_learning_rate": 1e-5, "lora_rank": 8},
    "policy_reference": {"prm_learning_rate": 1e-5, "reference": "policy"},
}


class Halves:
    """Every other completion is right; prompts are plain text."""

    def plain_prompt(self, problems):
        return [self.policy.tokenizer(p.prompt)["input_ids"] for p in problems]  # type: ignore[attr-defined]

    def outcomes(self, rollout) -> list[Score]:
        return [scored(x) for x in parity(len(rollout.text))]


@dataclass(frozen=True)
class Outcome(Halves, GRPO):
    def score(self, rollout):
        return Rewards(outcome=self.outcomes(rollout))


@dataclass(frozen=True)
class Halved(Halves, Prime):
    pass


class Side:
    """One algorithm with its own policy and optimiser, stepped by the loop's own rooms."""

    def __init__(self, name: str, settings: Settings, dtype: str):
        loaded = models.load(settings.model, dtype=dtype, device="cpu")
        policy = NeverEnds(loaded.model, loaded.tokenizer, loaded.compute)
        self.settings, self.name = settings, name
        self.algo: Algorithm = (
            Outcome(task=None, policy=policy, kind="rloo")  # type: ignore[arg-type]
            if name == "outcome"
            else Halved(task=None, policy=policy, **SIDES[name])  # type: ignore[arg-type]
        )
        accelerator = Accelerator(cpu=True)
        config = Config(
            model=settings.model, learning_rate=RATE, batch=BatchLimit(tokens=settings.batch_tokens)
        )
        self.learner = Learner(policy, config, accelerator)
        initial = policy.frozen() if name != "outcome" else None
        self.algo.begin(Start(initial, False, accelerator, settings.batch_tokens))
        self.spec = LossSpec.named("dapo", clip_high=0.2)
        texts = prompt_texts(policy.tokenizer, settings)
        self.problems = [Problem(str(i), text) for i, text in enumerate(texts)]
        self.seen: list[list[list[int]]] = []
        self.norms: list[float] = []

    def step(self, number: int) -> dict[str, float]:
        """Seconds of each phase of one step."""
        size = self.settings
        problems = self.problems[number * size.prompts : (number + 1) * size.prompts]
        marks = [time.perf_counter()]
        rollout = self.algo.rollout(problems, size.group, Sampling(size.tokens), number)
        marks.append(time.perf_counter())
        rewards = self.algo.score(rollout)
        advantage = self.algo.advantage(rewards, rollout)
        marks.append(time.perf_counter())
        self.learner.step(rollout, advantage, self.spec, RATE)
        marks.append(time.perf_counter())
        found = self.algo.update(rollout, rewards)
        marks.append(time.perf_counter())
        self.seen.append([list(ids) for ids in rollout.completion_ids])
        self.norms.append(found.get("process/prm_grad_norm", 0.0))
        spans = [b - a for a, b in zip(marks, marks[1:], strict=False)]
        return dict(zip(PHASES, spans, strict=True)) | {"total": marks[-1] - marks[0]}


def measure(settings: Settings, dtype: str, names: list[str]) -> dict[str, Any]:
    """Medians of every side, its overhead over `outcome`, and the gate."""
    sides = [Side(name, settings, dtype) for name in names]
    times: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(settings.repeats + 1):
        order = sides if number % 2 else sides[::-1]
        for side in order:
            spent = side.step(number)
            if number:
                times[side.name].append(spent)
    base = statistics.median(t["total"] for t in times[names[0]])
    rows = []
    for side in sides:
        own = times[side.name]
        total = [t["total"] for t in own]
        ratio = [t["total"] / b["total"] for t, b in zip(own, times[names[0]], strict=True)]
        rows.append(
            {
                "side": side.name,
                "seconds": total,
                "median": statistics.median(total),
                "over_outcome": statistics.median(total) / base - 1,
                "over_outcome_paired": [r - 1 for r in ratio],
                "phases": {p: statistics.median(t[p] for t in own) for p in PHASES},
                "same_completions": side.seen == sides[0].seen,
                "reward_model_moved": side.name == "outcome" or min(side.norms) > 0,
            }
        )
    return {"tokens": settings.prompts * settings.group * settings.tokens, "rows": rows}


def green(report: dict[str, Any]) -> bool:
    return all(r["same_completions"] and r["reward_model_moved"] for r in report["rows"])


def alone(settings: Settings, dtype: str, name: str) -> None:
    """Two steps of one side, for the high water of this process."""
    side = Side(name, settings, dtype)
    for number in range(2):
        side.step(number)


def table(report: dict[str, Any]) -> str:
    lines = [
        f"one step, {report['tokens']} completion tokens; medians, range; overhead over outcome",
        f"{'side':18}{'seconds':>9}{'range':>16}{'over':>9}{'peak MiB':>10}"
        "   rollout / score / update / reward update",
    ]
    for row in report["rows"]:
        low, high = min(row["seconds"]), max(row["seconds"])
        phases = " / ".join(f"{row['phases'][p]:.3f}" for p in PHASES)
        peak = row.get("peak_mib", "")
        lines.append(
            f"{row['side']:18}{row['median']:9.3f}{f'{low:.3f}-{high:.3f}':>16}"
            f"{100 * row['over_outcome']:+8.1f}%{peak:>10}   {phases}"
        )
    return "\n".join(lines)


def set_threads(count: int) -> None:
    if count:
        torch.set_num_threads(count)
