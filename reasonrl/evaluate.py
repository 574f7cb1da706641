"""Greedy accuracy on a split: what a run is judged by."""

from __future__ import annotations

import math
from typing import Any

from reasonrl.algos import Algorithm
from reasonrl.records import Rollout
from reasonrl.rollout import Sampling, sample


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
    eval/prefix the mean share of leading right steps where the task has rules for them.
    """
    chosen = algo.task.problems(split, 0, problems)
    prompts = algo.prompt(chosen) if trained_prompt else algo.plain_prompt(chosen)
    rollout = sample(algo.policy, chosen, prompts, 1, Sampling(max_tokens, 0.0), 0, rows)
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
    if prefix and len(prefix) == len(found):
        metrics["eval/prefix"] = sum(prefix) / len(prefix)
    return metrics, rollout
