"""What a step shows of itself: metrics under TRL's names, and the completions table's rows."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from reasonrl.algos.base import outcomes
from reasonrl.batch import lengths
from reasonrl.prompts import text_of
from reasonrl.records import Rewards, Rollout


def step_metrics(rollout: Rollout, rewards: Rewards, advantage: Tensor) -> dict[str, float]:
    """Rewards, lengths and signal of one rollout; unknown rewards are counted, never averaged.

    entropy is the mean of -logp over sampled tokens, an unbiased estimate at the sampling
    temperature; reward_std the mean over groups of the unbiased std of the known outcomes;
    reward_se the standard error of `reward` over prompts, where there are two with known outcomes.
    """
    value, known = outcomes(rewards)
    size = lengths(rollout)
    mean = float(value[known].mean()) if known.any() else math.nan
    spread, off, dead, groups = [], [], 0, 0
    for g in range(len(rollout.problems)):
        inside = value[(rollout.group == g) & known]
        off += [float((inside - mean).sum())] if len(inside) else []
        groups += 1
        dead += len(inside) < 2 or bool(inside.max() == inside.min())
        if len(inside) > 1:
            spread.append(float(inside.std()))
    logp = torch.cat(list(rollout.logp)) if rollout.logp else torch.zeros(0)
    metrics = {
        "reward": mean,
        "reward_std": sum(spread) / len(spread) if spread else 0.0,
        "frac_reward_zero_std": dead / max(1, groups),
        "completions/mean_length": sum(size) / max(1, len(size)),
        "completions/min_length": float(min(size, default=0)),
        "completions/max_length": float(max(size, default=0)),
        "completions/clipped_ratio": 1 - sum(rollout.finished) / max(1, len(size)),
        "entropy": float(-logp.mean()) + 0.0 if len(logp) else 0.0,
        "num_tokens": float(sum(size) + sum(map(len, rollout.prompt_ids))),
        "rewards/unscorable": float(sum(s.kind == "unscorable" for s in rewards.outcome)),
        "rewards/infra": float(sum(s.kind == "infra" for s in rewards.outcome)),
        "process/advantage_nonzero": float((advantage != 0).float().mean())
        if len(advantage)
        else 0.0,
    }
    if len(off) > 1:  # prompts are independent, completions of one are not
        around = len(off) / (len(off) - 1) * sum(e * e for e in off)
        metrics["reward_se"] = math.sqrt(around) / int(known.sum())
    if rewards.steps is not None:
        metrics |= _process_metrics(rewards, value, known)
    return metrics | dict(rewards.metrics)


def _process_metrics(rewards: Rewards, value: Tensor, known: Tensor) -> dict[str, float]:
    """Mean step reward, steps a completion, and how often good steps and outcome agree."""
    per_row = [[s.reward for s in steps if s.reward is not None] for steps in rewards.steps or ()]
    flat = [r for row in per_row for r in row]
    clean = [bool(row) and min(row) >= 0.5 for row in per_row]
    pairs = [
        (c, v >= 0.5) for c, v, k in zip(clean, value.tolist(), known.tolist(), strict=True) if k
    ]
    agree = sum(a == b for a, b in pairs)
    return {
        "process/step_reward_mean": sum(flat) / len(flat) if flat else math.nan,
        "process/steps_mean": sum(map(len, per_row)) / max(1, len(per_row)),
        "process/outcome_agreement": agree / len(pairs) if pairs else math.nan,
    }


def completion_rows(
    step: int, rollout: Rollout, rewards: Rewards, advantage: Tensor
) -> dict[str, list[Any]]:
    """Columns of the completions table, one row a completion; TRL's names plus steps and credit.
    id: the problem's number in the task's train split, the completion's in its group; it is trained
    on once in a run."""
    parts = advantage.split(lengths(rollout))
    of, seen = rollout.group.tolist(), Counter()
    numbers = rollout.numbers or range(len(rollout.problems))
    ids = []
    for g in of:
        ids.append(f"{numbers[g]}.{seen[g]}")
        seen[g] += 1
    problems = [rollout.problems[g] for g in of]
    return {
        "step": [step] * len(problems),
        "id": ids,
        "problem_id": [p.id for p in problems],
        "prompt": [_text(p.prompt) for p in problems],
        "completion": list(rollout.text),
        "images": [[picture_name(image) for image in p.images] for p in problems],
        "answer": [p.answer for p in problems],
        "reward": [s.value for s in rewards.outcome],
        "reward_kind": [s.kind for s in rewards.outcome],
        "reward_reason": [s.reason for s in rewards.outcome],
        "outcome": [s.value for s in rewards.verdict or rewards.outcome],
        "advantage": [float(part.mean()) if len(part) else 0.0 for part in parts],
        "finished": list(rollout.finished),
        "steps": [[] if r is None else [(s.start, s.end) for s in r] for r in _steps(rewards)],
        "step_rewards": [[] if r is None else [s.reward for s in r] for r in _steps(rewards)],
        "step_advantages": _step_advantages(rollout, rewards, parts),
    }


def picture_name(image: Any) -> str:
    """Where a run finds an image again: the path it came from, or where `RunLog` put the picture
    that no file holds."""
    return image if isinstance(image, str) else f"images/{image.key}.png"


def _steps(rewards: Rewards):
    return rewards.steps if rewards.steps is not None else [None] * len(rewards.outcome)


def _step_advantages(rollout: Rollout, rewards: Rewards, parts) -> list[list[float]]:
    """The mean advantage of the tokens that start inside each step."""
    out = []
    for steps, pieces, part in zip(_steps(rewards), rollout.pieces, parts, strict=True):
        values = part.tolist()
        row = []
        for step in steps or ():
            inside = [
                v for v, at in zip(values, pieces, strict=False) if step.start <= at < step.end
            ]
            row.append(sum(inside) / len(inside) if inside else 0.0)
        out.append(row)
    return out


def _text(prompt: Any) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{m['role']}: {text_of(m['content'])}" for m in prompt)
