"""SophiaVL-R1's Trust-GRPO: a model scores the thinking; each group says how far to trust it.

arXiv 2505.17018, eq. 1-5: R = outcome + gamma * alpha * exp(-step / T) * thinking, then GRPO on R.
gamma is 1 where the group's right answers were thought out better than its wrong ones, as a sound
reward model should see it, and exp(mu_c - mu_w) where it sees the opposite. The thinking reward
fades over the run. What could not be scored is outside mu_c and mu_w and takes its group's mean.

`scorer` names who scores: a folder with a thinking reward model, a server (http://.../v1, with
`scorer_model`), or `rule`, the share of right steps where the task can check them. Without one the
run trains one on the policy it starts from (thinking_train.py says out of what).

The released code never asks about wrong answers (`score_wrong: false`, which leaves gamma 1 on
tasks graded 0 or 1), shows the model the whole response (`whole_response: true`) and fades over
12,000 steps (`total_steps`). `trust` and `anneal` are the paper's ablations. `trm_inverted` trains
a reward model that likes wrong thinking: the case that trust is for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from reasonrl import models, ops
from reasonrl.algos.base import GRPO, Start, outcomes
from reasonrl.batch import rows_of
from reasonrl.models import Policy
from reasonrl.records import InputError, Rewards, Rollout, Score, scored, unscorable
from reasonrl.rewards.thinking import ThinkingScorer, by_rule, find_scorer
from reasonrl.thinking_train import Lesson, collect, teach

Scorer = Callable[[Rollout], Sequence[Score]]
ASKED_FROM = 0.2  # outcome from which the released code asks for a thinking reward


@dataclass
class Held:
    """What `begin` loads or trains."""

    scorer: Scorer | None = None
    own: Policy | None = None  # the reward model that this run trained


@dataclass(frozen=True)
class Sophia(GRPO):
    scorer: str = ""  # folder, http://.../v1, or rule; "": the run trains its own
    scorer_model: str = ""  # its name at that server
    alpha: float = 0.3
    total_steps: float | None = None  # T of the annealing; the run's own number of steps by default
    trust: bool = True
    anneal: bool = True
    score_wrong: bool = True
    keep_degenerate: bool = False
    whole_response: bool = False
    trm_problems: int = 256  # of the training problems, for a reward model of its own
    trm_group: int = 8
    trm_steps: int = 150
    trm_learning_rate: float = 5e-4
    trm_inverted: bool = False
    held: Held = field(default_factory=Held, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for knob in ("alpha", "trm_learning_rate", "total_steps"):
            value = getattr(self, knob)
            if value is not None and not (math.isfinite(value) and value > 0):
                if not (knob == "alpha" and value == 0):
                    raise InputError(f"algo.{knob}: expected a finite number > 0, got {value}")
        for knob in ("trm_problems", "trm_group", "trm_steps"):
            if getattr(self, knob) < 1:
                raise InputError(f"algo.{knob}: expected >= 1, got {getattr(self, knob)}")
        if self.scorer_model and not self.scorer.startswith("http"):
            raise InputError(
                f"algo.scorer_model: only for a server, algo.scorer is {self.scorer!r}"
            )
        if self.trm_inverted and self.scorer:
            raise InputError("algo.trm_inverted: only for a reward model that the run trains")
        if self.scorer == "rule":
            self.held.scorer = by_rule(self.task)
        elif self.scorer:
            self.held.scorer = find_scorer(
                self.scorer,
                self.task,
                server_model=self.scorer_model,
                whole_response=self.whole_response,
                device=self.policy.device,
                compute=self.policy.compute,
            )

    def begin(self, start: Start) -> None:
        if not self.scorer and start.fresh:
            self._hold(self._taught(start))

    def save(self, folder: Path) -> None:
        if self.held.own is not None:
            self.held.own.save(folder / "trm")

    def restore(self, folder: Path) -> None:
        if not self.scorer:
            policy = models.load(str(folder / "trm"), device=str(self.policy.device))
            policy.compute = self.policy.compute
            self._hold(policy)

    def _hold(self, policy: Policy) -> None:
        policy.model.eval().requires_grad_(False)
        self.held.own = policy
        self.held.scorer = ThinkingScorer(
            policy, task=self.task, whole_response=self.whole_response
        )

    def _taught(self, start: Start) -> Policy:
        """A reward model on a copy of the policy, from the policy's own thinking."""
        start.note(
            f"no algo.scorer: the thinking of {self.trm_problems} problems, scored by the task's"
            f" rule, teaches a reward model in {self.trm_steps} steps"
        )
        pairs = collect(
            self.policy,
            self.task,
            start.sampling,
            ("train", 0, self.trm_problems),
            self.trm_group,
            by_rule(self.task),
        )
        lesson = Lesson(
            steps=self.trm_steps,
            learning_rate=self.trm_learning_rate,
            inverted=self.trm_inverted,
            whole_response=self.whole_response,
            seed=self.task.seed,
        )
        return teach(self.policy, self.task, pairs, lesson, start.note)

    def score(self, rollout: Rollout) -> Rewards:
        """Outcomes with the thinking reward on top; GRPO's own advantage takes it from there."""
        assert self.held.scorer is not None
        plain = super().score(rollout)
        outcome, known = outcomes(plain)
        asked = known if self.score_wrong else known & (outcome >= ASKED_FROM)
        rows = asked.nonzero()[:, 0].tolist()
        found: list[Score] = [unscorable("nobody asked")] * len(outcome)
        for b, score in zip(rows, self.held.scorer(rows_of(rollout, rows)), strict=True):
            found[b] = score
        mine = known.nonzero()[:, 0]
        value = torch.tensor([0.0 if s.value is None else s.value for s in found])
        out = ops.trust_advantage(
            outcome[mine],
            value[mine],
            rollout.group[mine],
            *self._time(),
            alpha=self.alpha,
            trust=self.trust,
            score_wrong=self.score_wrong,
            keep_degenerate=self.keep_degenerate,
            scored=torch.tensor([s.value is not None for s in found], dtype=torch.bool)[mine],
        )
        paid = list(plain.outcome)
        for b, reward in zip(mine.tolist(), out.reward.tolist(), strict=True):
            paid[b] = scored(reward, plain.outcome[b].reason)
        metrics = self._metrics(rollout, plain, [found[b] for b in rows], rows)
        metrics["process/gamma"] = _group_mean(out.gamma.tolist(), rollout.group[mine].tolist())
        return Rewards(paid, plain.steps, verdict=plain.outcome, metrics=metrics)

    def _time(self) -> tuple[float, float]:
        """Step and T of exp(-step / T); without annealing the factor stays 1."""
        step = self.clock.step if self.anneal else 0
        return step, self.total_steps or max(1, self.clock.steps)

    def _metrics(
        self, rollout: Rollout, plain: Rewards, thinking: Sequence[Score], rows: Sequence[int]
    ) -> dict[str, float]:
        """What the thinking of the completions `rows` was worth, by how they ended."""
        step, total = self._time()
        sides: dict[bool, list[tuple[int, float]]] = {True: [], False: []}
        for b, score in zip(rows, thinking, strict=True):
            if score.value is not None:
                right = (plain.outcome[b].value or 0.0) >= 0.5
                sides[right].append((int(rollout.group[b]), score.value))
        contrast = {g for g, _ in sides[True]} & {g for g, _ in sides[False]}
        groups = len(rollout.problems)
        known = [s.value for s in plain.outcome if s.value is not None]
        metrics = {
            "process/outcome_mean": _mean(known),
            "process/thinking_weight": self.alpha * math.exp(-step / total),
            "process/thinking_right": _mean([v for _, v in sides[True]]),
            "process/thinking_wrong": _mean([v for _, v in sides[False]]),
            "process/no_contrast": 1 - len(contrast) / groups if groups else 0.0,
            "process/thinking_unscorable": float(sum(s.kind == "unscorable" for s in thinking)),
            "process/thinking_infra": float(sum(s.kind == "infra" for s in thinking)),
        }
        if plain.steps is not None:
            right = [b for b, s in enumerate(plain.outcome) if (s.value or 0.0) >= 0.5]
            odd = [any(s.reward != 1.0 for s in plain.steps[b]) for b in right]
            metrics["process/lucky"] = _mean([float(x) for x in odd])
        return metrics


def _group_mean(values: Sequence[float], group: Sequence[int]) -> float:
    """Mean over groups of what is equal within each."""
    return _mean(list(dict(zip(group, values, strict=True)).values()))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
