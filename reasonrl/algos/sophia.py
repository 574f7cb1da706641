"""SophiaVL-R1's Trust-GRPO: a model scores the thinking; each group says how far to trust it.

arXiv 2505.17018, eq. 1-5: R = outcome + gamma * alpha * exp(-step / T) * thinking, then GRPO on R.
gamma is 1 where the group's right answers were thought out better than its wrong ones, as a sound
reward model should see it, and exp(mu_c - mu_w) where it sees the opposite. The thinking reward
fades over the run. What could not be scored is outside mu_c and mu_w and takes its group's mean.

`scorer` names who scores: a folder with a thinking reward model, a server (http://.../v1, with
`scorer_model`), or `rule`, the share of right steps where the task can check them. To make one:
`reasonrl train sophia`, which goes through the published stages (commands/stages.py).

The released code never asks about wrong answers (`score_wrong: false`, which leaves gamma 1 on
tasks graded 0 or 1), shows the model the whole response (`whole_response: true`) and fades over
12,000 steps (`total_steps`). `trust` and `anneal` are the paper's ablations. `inverted` takes
1 - score for a score: a reward model that likes wrong thinking, the case that trust is for.
`Trust` is all of this but the asking; other trainers use it alone (integrations/trl_trust.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from reasonrl import models, ops, prm_heads
from reasonrl.algos.base import GRPO, mean, outcomes
from reasonrl.batch import rows_of
from reasonrl.chat import ChatClient
from reasonrl.models import Policy
from reasonrl.records import InputError, Rewards, Rollout, Score, scored
from reasonrl.rewards.prm import PRMScorer
from reasonrl.rewards.thinking import Scorer, ThinkingScorer, by_rule
from reasonrl.tasks import Task

ASKED_FROM = 0.2  # outcome from which the released code asks for a thinking reward


class Paid(NamedTuple):
    reward: Tensor  # (B,) fp32, NaN where the outcome is unknown
    advantage: Tensor  # (B,) of that reward in its group, 0 where the outcome is unknown
    gamma: Tensor  # (B,) of the completion's group, NaN where the outcome is unknown
    metrics: dict[str, float]


@dataclass(frozen=True)
class Trust:
    """Outcomes and thinking rewards as one reward: the knobs, who is asked, what is paid."""

    alpha: float = 0.3
    total_steps: float | None = None  # T of the annealing; the run's own number of steps by default
    trust: bool = True
    anneal: bool = True
    score_wrong: bool = True
    keep_degenerate: bool = False
    section: ClassVar[str] = ""  # what stands before a knob's name in a refusal

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise InputError(
                f"{self.section}alpha: expected a finite number >= 0, got {self.alpha}"
            )
        total = self.total_steps
        if total is not None and not (math.isfinite(total) and total > 0):
            raise InputError(
                f"{self.section}total_steps: expected a finite number > 0, got {total}"
            )

    def asked(self, outcome: Tensor, known: Tensor) -> list[int]:
        """The completions whose thinking is to be scored."""
        wanted = known if self.score_wrong else known & (outcome >= ASKED_FROM)
        return wanted.nonzero()[:, 0].tolist()

    def pay(
        self,
        outcome: Tensor,  # (B,) fp32
        known: Tensor,  # (B,) bool, whose outcome is known
        thinking: Sequence[Score | None],  # B; None = nobody asked
        group: Tensor,  # (B,) int64
        step: int,  # under way, from 1
        steps: int,  # of the run
        kind: str = "grpo",
    ) -> Paid:
        """InputError where a thinking reward is outside of [0, 1]."""
        values = [None if s is None else s.value for s in thinking]
        for b, value in enumerate(values):
            if value is not None and not 0 <= value <= 1:
                raise InputError(
                    f"thinking: completion {b}: expected a score from 0 to 1, got {value:.6g}"
                )
        mine = known.nonzero()[:, 0]
        out = ops.trust_advantage(
            outcome[mine],
            torch.tensor([v or 0.0 for v in values])[mine],
            group[mine],
            *self._time(step, steps),
            alpha=self.alpha,
            trust=self.trust,
            score_wrong=self.score_wrong,
            keep_degenerate=self.keep_degenerate,
            scored=torch.tensor([v is not None for v in values], dtype=torch.bool)[mine],
            kind=kind,
        )
        unknown = torch.full(outcome.shape, math.nan)
        metrics = self._metrics(outcome, known, thinking, group, step, steps)
        metrics["process/gamma"] = _group_mean(out.gamma.tolist(), group[mine].tolist())
        return Paid(
            unknown.index_copy(0, mine, out.reward),
            torch.zeros(outcome.shape).index_copy(0, mine, out.advantage),
            unknown.index_copy(0, mine, out.gamma),
            metrics,
        )

    def _time(self, step: int, steps: int) -> tuple[float, float]:
        """Step and T of exp(-step / T); without annealing the factor stays 1."""
        return (step if self.anneal else 0), self.total_steps or max(1, steps)

    def _metrics(
        self,
        outcome: Tensor,
        known: Tensor,
        thinking: Sequence[Score | None],
        group: Tensor,
        step: int,
        steps: int,
    ) -> dict[str, float]:
        """What the thinking was worth, by how the completions ended."""
        now, total = self._time(step, steps)
        sides: dict[bool, list[tuple[int, float]]] = {True: [], False: []}
        rows = zip(outcome.tolist(), thinking, group.tolist(), strict=True)
        for ended, score, g in rows:
            if score is not None and score.value is not None:
                sides[ended >= 0.5].append((g, score.value))
        contrast = {g for g, _ in sides[True]} & {g for g, _ in sides[False]}
        groups = len(set(group.tolist()))
        failed = [s.kind for s in thinking if s is not None]
        return {
            "process/outcome_mean": mean(outcome[known].tolist()),
            "process/thinking_weight": self.alpha * math.exp(-now / total),
            "process/thinking_right": mean([v for _, v in sides[True]]),
            "process/thinking_wrong": mean([v for _, v in sides[False]]),
            "process/no_contrast": 1 - len(contrast) / groups if groups else 0.0,
            "process/thinking_unscorable": float(failed.count("unscorable")),
            "process/thinking_infra": float(failed.count("infra")),
        }


@dataclass
class Held:
    """What is loaded once."""

    scorer: Scorer


@dataclass(frozen=True)
class Sophia(Trust, GRPO):
    scorer: str = ""  # folder, http://.../v1, or rule
    scorer_model: str = ""  # its name at that server
    whole_response: bool = False
    inverted: bool = False
    section: ClassVar[str] = "algo."
    held: Held = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.scorer:
            raise InputError(
                "algo.scorer: expected a folder with a thinking reward model, a server's"
                " http://.../v1 or rule, got nothing; `reasonrl train sophia` makes one first"
            )
        if self.scorer_model and not self.scorer.startswith("http"):
            raise InputError(
                f"algo.scorer_model: only for a server, algo.scorer is {self.scorer!r}"
            )
        if self.whole_response and self.scorer == "rule":
            raise InputError("algo.whole_response: a rule looks at the thinking alone")
        found = find_scorer(
            self.scorer,
            self.task,
            server_model=self.scorer_model,
            whole_response=self.whole_response,
            beside=self.policy,
        )
        object.__setattr__(self, "held", Held(found))

    def ahead(self, group: Rollout) -> None:
        """All are asked about, also one whose outcome will be unknown; not where wrong ones are
        left out, which nobody knows yet."""
        if self.score_wrong and isinstance(self.held.scorer, ThinkingScorer):
            self.held.scorer.begin(group)

    def score(self, rollout: Rollout) -> Rewards:
        """Outcomes with the thinking reward on top; GRPO's own advantage takes it from there."""
        plain = super().score(rollout)
        outcome, known = outcomes(plain)
        rows = self.asked(outcome, known)
        found: list[Score | None] = [None] * len(outcome)
        for b, score in zip(rows, self.held.scorer(rows_of(rollout, rows)), strict=True):
            found[b] = _inverted(score) if self.inverted else score
        out = self.pay(outcome, known, found, rollout.group, self.clock.step, self.clock.steps)
        paid = list(plain.outcome)
        for b in known.nonzero()[:, 0].tolist():
            paid[b] = scored(float(out.reward[b]), plain.outcome[b].reason)
        metrics = out.metrics
        if plain.steps is not None:
            right = [b for b, s in enumerate(plain.outcome) if (s.value or 0.0) >= 0.5]
            odd = [any(s.reward != 1.0 for s in plain.steps[b]) for b in right]
            metrics["process/lucky"] = mean([float(x) for x in odd])
        return Rewards(paid, plain.steps, verdict=plain.outcome, metrics=metrics)

    def canary(self, false: Rollout) -> dict[str, Sequence[Score]]:
        found = self.held.scorer(false)
        thinking = [_inverted(score) for score in found] if self.inverted else found
        return super().canary(false) | {"thinking": thinking}


def find_scorer(
    name: str,
    task: Task,
    *,
    server_model: str = "",
    whole_response: bool = False,
    beside: Policy | None = None,
) -> Scorer:
    """The scorer called `name`: `rule`, a server's http://.../v1, a folder with a generative model
    or with a process reward model; a model runs where `beside` does, in its compute dtype."""
    if name == "rule":
        return by_rule(task)
    options = {"whole_response": whole_response}
    if name.startswith(("http:", "https:")):
        if not server_model:
            raise InputError("algo.scorer_model: a model behind a server needs its name")
        return ThinkingScorer(ChatClient(name, server_model), task, **options)
    if (Path(name) / models.PRM_FILE).is_file():
        prm = prm_heads.load(name, delimiter=task.delimiter)
        if beside is not None:
            prm.to(beside.device).body.follow(beside)
        return ThinkingScorer(PRMScorer(prm, alpha=0.0), task, **options)
    policy = models.load(name, device="cpu" if beside is None else str(beside.device))
    if beside is not None:
        policy.follow(beside)
    policy.model.requires_grad_(False)
    return ThinkingScorer(policy, task, **options)


def _inverted(score: Score) -> Score:
    return score if score.value is None else scored(1 - score.value, score.reason)


def _group_mean(values: Sequence[float], group: Sequence[int]) -> float:
    """Mean over groups of what is equal within each."""
    return mean(list(dict(zip(group, values, strict=True)).values()))
