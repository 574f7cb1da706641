"""Best of N: score the completions of a prompt with any scorer and choose one.

The scorer that trains a policy is the one that chooses at test time. A completion's number is its
step rewards put together by `how` (the weakest step by default, as in arXiv 2305.20050), or its
outcome where it has no step rewards. With a vote, the answers compete first: by count, or by the
sum of their numbers (weighted, arXiv 2211.14275).
    choice = best_of_n(prompt, completions, prm, how="min");  completions[choice.index]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch

from reasonrl.answer import ballot
from reasonrl.records import Message, Problem, Rewards, Rollout, Score, scored, unscorable

How = Literal["min", "mean", "last", "prod", "sum"]
TOGETHER: dict[str, Callable[[Sequence[float]], float]] = {
    "min": min,
    "mean": lambda x: math.fsum(x) / len(x),
    "last": lambda x: x[-1],
    "prod": math.prod,
    "sum": math.fsum,
}


class Choice(NamedTuple):
    index: int
    scores: list[Score]  # B, of every completion


def best_of_n(
    prompt: str | Sequence[Message] | Problem,
    completions: Sequence[str],
    scorer: Callable[[Rollout], Rewards],
    *,
    how: How = "min",
    vote: Literal["majority", "weighted"] | None = None,
) -> Choice:
    """The index of the best completion, and all scores; ties go to the first.

    Completions without a score neither win nor vote. With a vote the winner is the best-scored
    completion of the winning answer; a tie between answers goes to the one with the larger sum of
    scores. ValueError: no completions, an unknown `how` or `vote`, or no completion that could be
    scored (with the reasons).
    """
    if how not in TOGETHER:
        raise ValueError(f"how must be one of {', '.join(TOGETHER)}, got {how!r}")
    if vote not in (None, "majority", "weighted"):
        raise ValueError(f"vote must be one of None, majority, weighted, got {vote!r}")
    if isinstance(completions, str) or not completions:
        raise ValueError(f"completions must be a non-empty list of strings, got {completions!r}")
    problem = prompt if isinstance(prompt, Problem) else Problem(id="prompt", prompt=prompt)
    scores = score_each(scorer, [problem] * len(completions), completions, how)
    values = {i: s.value for i, s in enumerate(scores) if s.value is not None}
    if not values:
        reasons = "; ".join(sorted({f"{s.kind}: {s.reason}" for s in scores}))
        raise ValueError(f"no completion could be scored ({reasons})")
    if vote is not None:
        values = _elected(values, completions, vote)
    return Choice(max(values, key=lambda i: (values[i], -i)), scores)


def _scores(rewards: Rewards, how: str, count: int) -> list[Score]:
    if len(rewards.outcome) != count:
        raise ValueError(f"the scorer must give {count} outcomes, got {len(rewards.outcome)}")
    out = []
    for i, outcome in enumerate(rewards.outcome):
        steps = rewards.steps[i] if rewards.steps is not None else ()
        known = [step.reward for step in steps if step.reward is not None]
        if outcome.kind == "scored" and known:
            outcome = scored(TOGETHER[how](known), outcome.reason)
        if outcome.kind == "scored" and not math.isfinite(outcome.value or 0.0):
            outcome = unscorable(f"the score is {outcome.value}")
        out.append(outcome)
    return out


def _elected(values: dict[int, float], completions: Sequence[str], vote: str) -> dict[int, float]:
    """The scored completions that give the winning answer; all of them where nobody gives one."""
    answers: dict[str, list[int]] = {}
    for i in values:
        if (answer := ballot(completions[i])) is not None:
            answers.setdefault(answer, []).append(i)
    if not answers:
        return values

    def weight(answer: str) -> tuple[float, float]:
        total = math.fsum(values[i] for i in answers[answer])
        return (total, 0.0) if vote == "weighted" else (len(answers[answer]), total)

    return {i: values[i] for i in answers[max(answers, key=weight)]}


def score_each(
    scorer: Callable[[Rollout], Rewards],
    problems: Sequence[Problem],
    completions: Sequence[str],  # one for each problem; a problem may stand several times
    how: How = "min",
) -> list[Score]:
    """One number for every completion, as `best_of_n` takes it; prompts may differ."""
    if len(problems) != len(completions):
        raise ValueError(f"completions must be {len(problems)} strings, got {len(completions)}")
    return _scores(scorer(texts(problems, completions)), how, len(completions))


def texts(problems: Sequence[Problem], completions: Sequence[str]) -> Rollout:
    """Texts without tokens, all that a scorer of text needs; equal neighbours form a group."""
    first: list[Problem] = []
    group = []
    for problem in problems:
        if not first or problem != first[-1]:
            first.append(problem)
        group.append(len(first) - 1)
    count = len(completions)
    return Rollout(
        problems=tuple(first),
        prompt_ids=((),) * len(first),
        group=torch.tensor(group, dtype=torch.int64),
        completion_ids=((),) * count,
        text=tuple(completions),
        finished=(True,) * count,
        logp=(torch.empty(0),) * count,
        pieces=((0,),) * count,
    )
