"""Canaries: completions found right for one problem, judged again as answers to another one.

    rewards = with_canaries(algo, rollout, rewards, config.canary, step)

The other problem is one of the same step whose answer surely differs (`Task.canary` says which), so
nobody may reward them. Every `canary.every` steps up to `canary.count` of them, one a group, go
through whatever pays the policy (`Algorithm.canary`): the verifier, a reward model, a judge. The
share that was rewarded is a metric of the step, `canary/<who>`, and nothing else: canaries are in
no statistic of a group, no gradient, no table of completions. Where no two answers can be told
apart, or nothing was right, there is no canary and no metric.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from reasonrl.algos.base import Algorithm
from reasonrl.batch import rows_of
from reasonrl.config import Canary
from reasonrl.records import Rewards, Rollout


def with_canaries(
    algo: Algorithm, rollout: Rollout, rewards: Rewards, limits: Canary, step: int
) -> Rewards:
    """The rewards, with the canaries' metrics where they are due."""
    if not limits.every or step % limits.every:
        return rewards
    false = falsified(algo, rollout, rewards, limits.count)
    if not false.text:
        return rewards
    found = {"canary/asked": float(len(false.text))}
    for who, scores in algo.canary(false).items():
        known = [score.value for score in scores if score.value is not None]
        if known:
            found[f"canary/{who}"] = sum(value >= 0.5 for value in known) / len(known)
    return replace(rewards, metrics={**rewards.metrics, **found})


def falsified(algo: Algorithm, rollout: Rollout, rewards: Rewards, count: int) -> Rollout:
    """Right completions, at most one a group, under problems that they do not answer."""
    verdicts = rewards.verdict or rewards.outcome
    total, group = len(rollout.problems), rollout.group.tolist()
    rows, partners = [], {}
    for b, verdict in enumerate(verdicts):
        g = group[b]
        if len(rows) == count:
            break
        if verdict.value != 1.0 or g in partners:
            continue
        for other in [*range(g + 1, total), *range(g)]:
            problem = algo.task.canary(rollout.problems[g], rollout.problems[other])
            if problem is not None:
                partners[g] = other, problem
                rows.append(b)
                break
    chosen = rows_of(rollout, rows)
    images = [rollout.images[other] for other, _ in partners.values()] if rollout.images else ()
    return replace(
        chosen,
        problems=[problem for _, problem in partners.values()],
        prompt_ids=[rollout.prompt_ids[other] for other, _ in partners.values()],
        group=torch.arange(len(rows)),
        images=images if any(images) else (),
        outcome=None,  # what was said of them under their own problem
    )
