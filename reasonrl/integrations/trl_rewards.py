"""Our verifiers and scorers as TRL's `reward_funcs`.

    GRPOTrainer(..., reward_funcs=[math_reward(), scorer_reward(PRMScorer("runs/prm"))])
    GRPOTrainer(..., reward_funcs=spec_reward(task.reward_spec()))

A reward that is not known (no gold answer, a verifier that died) is None, which TRL leaves out of
its statistics; it is never 0. Column names are those of the dataset. Left out: weights and sums,
which are TRL's (`reward_weights`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from reasonrl.choice import TOGETHER, How, score_each
from reasonrl.integrations.trl_rows import problem_of
from reasonrl.records import Problem, Rewards, Rollout, Score
from reasonrl.reward_spec import RewardSpec
from reasonrl.rewards.code import verify_code
from reasonrl.rewards.verify import verify_math

RewardFunc = Callable[..., list[float | None]]


def math_reward(answer: str = "answer", *, timeout: float = 5.0) -> RewardFunc:
    """1 or 0 by `verify_math` against the column `answer`; ValueError where there is none."""

    def math(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any):
        gold = _column(columns, answer, "math_reward")
        return _values(verify_math(_texts(completions), [str(g) for g in gold], timeout=timeout))

    return math


def code_reward(tests: str = "tests", *, timeout: float = 5.0) -> RewardFunc:
    """The share of tests passed by `verify_code`, from the column `tests`."""

    def code(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any):
        hidden = _column(columns, tests, "code_reward")
        return _values(verify_code(_texts(completions), hidden, timeout=timeout))

    return code


def scorer_reward(scorer: Callable[[Rollout], Rewards], *, how: How = "min") -> RewardFunc:
    """Any scorer of ours: its step rewards put together by `how`, or its outcome."""
    if how not in TOGETHER:
        raise ValueError(f"how must be one of {', '.join(TOGETHER)}, got {how!r}")

    def score(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any):
        problems = [_problem(i, prompt, columns) for i, prompt in enumerate(prompts)]
        return _values(score_each(scorer, problems, _texts(completions), how))

    return score


def spec_reward(spec: RewardSpec, *, problem: Callable[[Problem], Any] | None = None) -> RewardFunc:
    """The grade by a spec that may also be told to the policy (`Motivation`). problem: what its
    conditions are asked about; None = the row, its other columns in `extra`."""
    if not isinstance(spec, RewardSpec):
        raise ValueError(f"spec: expected a RewardSpec, got {type(spec).__name__}")

    def reward_spec(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any):
        rows = [_problem(i, prompt, columns) for i, prompt in enumerate(prompts)]
        asked = rows if problem is None else [problem(row) for row in rows]
        grades: list[float | None] = []
        for text, row in zip(_texts(completions), asked, strict=True):
            grades.append(spec.grade(text, row))
        return grades

    return reward_spec


def _problem(i: int, prompt: Any, columns: dict[str, Any]) -> Problem:
    """The prompt with its row's other columns, which a scorer may want."""
    own = {
        key: values[i]
        for key, values in columns.items()
        if isinstance(values, list | tuple) and i < len(values)
    }
    # completions of one prompt stand next to each other
    return problem_of(f"{prompt!r}", {"prompt": prompt, **own})


def _column(columns: dict[str, Any], name: str, what: str) -> Sequence[Any]:
    if name not in columns:
        known = ", ".join(sorted(columns)) or "none"
        raise ValueError(f"{what}: expected a dataset column {name!r}, got {known}")
    return columns[name]


def _texts(completions: Sequence[Any]) -> list[str]:
    """Completions as text; of a conversation, what the assistant said last."""
    return [c if isinstance(c, str) else str(c[-1]["content"]) for c in completions]


def _values(scores: Sequence[Score]) -> list[float | None]:
    return [score.value for score in scores]
