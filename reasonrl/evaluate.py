"""Greedy accuracy on a split: what a run is judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from reasonrl.algos import Algorithm
from reasonrl.progress import phase
from reasonrl.records import Problem, Rollout, Score
from reasonrl.rollout import Sampling, sample
from reasonrl.tasks import Task


def evaluate(
    algo: Algorithm,
    split: str,
    problems: int,
    max_tokens: int,
    rows: int,
    trained_prompt: bool = False,  # the prompt of training, where the algorithm changes it
) -> tuple[dict[str, Any], Rollout]:
    """Metrics `eval/...` over `problems` distinct problems of a split, and the completions.

    eval/accuracy is the share of right ones among the scored, eval/accuracy_se its standard error;
    eval/reward the mean grade, where the task's stated reward is more than right or wrong;
    eval/prefix the mean share of leading right steps where the task has rules for them, eval/steps
    the mean share of right ones, eval/lucky the share of right answers behind a wrong step.
    """
    chosen = algo.task.problems(split, 0, problems)
    prompts = algo.prompt(chosen) if trained_prompt else algo.plain_prompt(chosen)
    rollout = sample(algo.policy, chosen, prompts, 1, Sampling(max_tokens, 0.0), 0, rows)
    with phase("grading"):
        grades = algo.task.verdicts(chosen, rollout.text)
    known = [g.value for g in grades if g.value is not None]
    accuracy = sum(known) / len(known) if known else math.nan
    spread = sum((v - accuracy) ** 2 for v in known) / max(1, len(known) - 1)
    pairs = zip(chosen, rollout.text, strict=True)
    found = [algo.task.prefix_correct(problem, text) for problem, text in pairs]
    prefix = [share for share in found if share is not None]
    metrics = {
        "eval/accuracy": accuracy,
        "eval/accuracy_se": math.sqrt(spread / len(known)) if known else math.nan,
        "eval/problems": len(chosen),
        "eval/unscored": len(grades) - len(known),
        "eval/mean_length": sum(map(len, rollout.completion_ids)) / max(1, len(chosen)),
        "eval/clipped_ratio": 1 - sum(rollout.finished) / max(1, len(chosen)),
    }
    if type(algo.task).verdicts is not Task.verdicts and algo.task.reward_spec() is not None:
        rewards = [s.value for s in algo.task.grades(chosen, rollout.text) if s.value is not None]
        metrics["eval/reward"] = sum(rewards) / len(rewards) if rewards else math.nan
    if prefix and len(prefix) == len(found):
        metrics["eval/prefix"] = sum(prefix) / len(prefix)
    return metrics | _steps(algo.task, chosen, rollout.text, grades), rollout


def _steps(
    task: Task, problems: Sequence[Problem], texts: Sequence[str], grades: Sequence[Score]
) -> dict[str, float]:
    """Shares over the completions whose steps a rule can check; nothing where one has no rule."""
    found = [task.steps(problem, text) for problem, text in zip(problems, texts, strict=True)]
    if not found or any(steps is None for steps in found):
        return {}
    rewards = [[s.reward for s in steps or ()] for steps in found]
    shares = [sum(r == 1.0 for r in row) / len(row) if row else 0.0 for row in rewards]
    right = [row for row, grade in zip(rewards, grades, strict=True) if grade.value == 1.0]
    lucky = [any(r != 1.0 for r in row) for row in right]
    out = {"eval/steps": sum(shares) / len(shares)}
    return out | ({"eval/lucky": sum(lucky) / len(lucky)} if lucky else {})
