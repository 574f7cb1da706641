"""Step labels for training a process reward model: completions of a policy, judged step by step.

`rule`: where a task can check its steps (arithmetic, Knights and Knaves) the labels are exact. A
step as the delimiter cuts it may hold several of the rule's steps; it is right when all are. The
label of the whole is the task's outcome. The trajectory-aware targets of ReasonFlux-PRM, for texts
without a rule, are in targets.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from reasonrl.models import Policy
from reasonrl.progress import phase
from reasonrl.prompts import render
from reasonrl.records import InputError, Problem, Rollout, Step
from reasonrl.rollout import Sampling, sample
from reasonrl.segment import split_steps
from reasonrl.tasks import Task

CHUNK = 64  # problems sampled together


def sampled(
    policy: Policy,
    task: Task,
    sampling: Sampling,
    span: tuple[str, int, int],  # split, number of the first problem, how many
    group: int,
    delimiter: str,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Stepwise rows of `group` completions of each problem.

    Rows of one problem share `problem_id`; `final` is missing where the outcome is unknown, and a
    completion without text is left out (it has no steps).
    """
    split, first, problems = span
    with phase("sampling", problems * group, "completions"):
        for start in range(first, first + problems, CHUNK):
            chosen = task.problems(split, start, min(CHUNK, first + problems - start))
            prompts = [render(policy.tokenizer, p.prompt, images=len(p.images)) for p in chosen]
            rollout = sample(policy, chosen, prompts, group, sampling, seed * 1_000_003 + start)
            yield from rows(task, rollout, delimiter)


def rows(task: Task, rollout: Rollout, delimiter: str) -> Iterator[dict[str, Any]]:
    """The completions of a rollout as rows with exact labels; InputError without a rule."""
    problems = [rollout.problems[g] for g in rollout.group.tolist()]
    grades = task.verdicts(problems, rollout.text)
    seen: dict[str, int] = {}
    for problem, text, grade in zip(problems, rollout.text, grades, strict=True):
        number = seen[problem.id] = seen.get(problem.id, -1) + 1
        steps = split_steps(text, delimiter)
        if not steps:
            continue
        row: dict[str, Any] = {
            "id": f"{problem.id}-{number}",
            "problem_id": problem.id,
            "prompt": problem.prompt,
            "completions": [text[s.start : s.end] for s in steps],
            "labels": rule_labels(task, problem, text, steps),
            "answer": problem.answer,
        }
        if grade.value is not None:
            row["final"] = grade.value
        yield row


def rule_labels(task: Task, problem: Problem, text: str, steps: Sequence[Step]) -> list[bool]:
    """Whether every step is right by the task's rule."""
    checked = task.steps(problem, text)
    if checked is None:
        raise InputError(f"task {task.name}: has no rule for its steps; label them another way")
    out = []
    for step in steps:
        inside = [c for c in checked if c.start < step.end and c.end > step.start]
        out.append(bool(inside) and all(c.reward == 1.0 for c in inside))
    return out
