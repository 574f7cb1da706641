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
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from reasonrl import models, ops, prm_heads
from reasonrl.algos.base import GRPO, mean, outcomes
from reasonrl.batch import rows_of
from reasonrl.chat import ChatClient
from reasonrl.models import Policy
from reasonrl.records import InputError, Rewards, Rollout, Score, scored, unscorable
from reasonrl.rewards.prm import PRMScorer
from reasonrl.rewards.thinking import Scorer, ThinkingScorer, by_rule
from reasonrl.tasks import Task

ASKED_FROM = 0.2  # outcome from which the released code asks for a thinking reward


@dataclass
class Held:
    """What is loaded once."""

    scorer: Scorer


@dataclass(frozen=True)
class Sophia(GRPO):
    scorer: str = ""  # folder, http://.../v1, or rule
    scorer_model: str = ""  # its name at that server
    alpha: float = 0.3
    total_steps: float | None = None  # T of the annealing; the run's own number of steps by default
    trust: bool = True
    anneal: bool = True
    score_wrong: bool = True
    keep_degenerate: bool = False
    whole_response: bool = False
    inverted: bool = False
    held: Held = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise InputError(f"algo.alpha: expected a finite number >= 0, got {self.alpha}")
        total = self.total_steps
        if total is not None and not (math.isfinite(total) and total > 0):
            raise InputError(f"algo.total_steps: expected a finite number > 0, got {total}")
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

    def score(self, rollout: Rollout) -> Rewards:
        """Outcomes with the thinking reward on top; GRPO's own advantage takes it from there."""
        plain = super().score(rollout)
        outcome, known = outcomes(plain)
        asked = known if self.score_wrong else known & (outcome >= ASKED_FROM)
        rows = asked.nonzero()[:, 0].tolist()
        found: list[Score] = [unscorable("nobody asked")] * len(outcome)
        for b, score in zip(rows, self.held.scorer(rows_of(rollout, rows)), strict=True):
            found[b] = _inverted(score) if self.inverted else score
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

    def canary(self, false: Rollout) -> dict[str, Sequence[Score]]:
        found = self.held.scorer(false)
        thinking = [_inverted(score) for score in found] if self.inverted else found
        return super().canary(false) | {"thinking": thinking}

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
            "process/outcome_mean": mean(known),
            "process/thinking_weight": self.alpha * math.exp(-step / total),
            "process/thinking_right": mean([v for _, v in sides[True]]),
            "process/thinking_wrong": mean([v for _, v in sides[False]]),
            "process/no_contrast": 1 - len(contrast) / groups if groups else 0.0,
            "process/thinking_unscorable": float(sum(s.kind == "unscorable" for s in thinking)),
            "process/thinking_infra": float(sum(s.kind == "infra" for s in thinking)),
        }
        if plain.steps is not None:
            right = [b for b, s in enumerate(plain.outcome) if (s.value or 0.0) >= 0.5]
            odd = [any(s.reward != 1.0 for s in plain.steps[b]) for b in right]
            metrics["process/lucky"] = mean([float(x) for x in odd])
        return metrics


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
