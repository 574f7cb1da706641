"""Verifiable judging (V2V, arXiv 2507.21645): data for judges from problems that a verifier grades.

Several generators answer problems; every answer becomes a row whose label is the verifier's, right
and wrong ones balanced for each generator. The rows' fields: cases.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from reasonrl.models import Policy
from reasonrl.progress import phase
from reasonrl.prompts import plain, render
from reasonrl.rewards.judge import without_thinking
from reasonrl.rollout import Sampling, sample
from reasonrl.tasks import Task
from reasonrl.tasks.base import Draws


def make_cases(
    generators: Mapping[str, Policy],
    task: Task,
    sampling: Sampling,
    span: tuple[str, int, int],  # split, number of the first problem, how many
    samples: int,
    seed: int,
    top_up: bool = False,  # worked answers among the right ones, for problems nobody got right
) -> Iterator[dict[str, Any]]:
    """Rows of judging data, as many right as wrong ones for each generator."""
    split, first, count = span
    problems = task.problems(split, first, count)
    index = 0
    for name, policy in generators.items():
        prompts = [render(policy.tokenizer, p.prompt, images=len(p.images)) for p in problems]
        with phase(f"sampling {list(generators).index(name) + 1}/{len(generators)}"):
            rollout = sample(policy, problems, prompts, samples, sampling, seed)
        asked = [rollout.problems[g] for g in rollout.group.tolist()]
        grades = task.verdicts(asked, rollout.text)
        answers = [
            (problem, text, int(grade.value))
            for problem, text, grade in zip(asked, rollout.text, grades, strict=True)
            if grade.value in (0.0, 1.0) and text.strip()
        ]
        if top_up:
            solved = {problem.id for problem, _, label in answers if label}
            gold = [(p, task.worked(p)) for p in problems if p.id not in solved]
            answers += [(p, text, 1) for p, text in gold if text is not None]
        sides = [[i for i, a in enumerate(answers) if a[2] == label] for label in (0, 1)]
        draws = Draws("judge", seed, name)
        size = min(map(len, sides))
        chosen = sorted(i for side in sides for i in draws.shuffled(side)[:size])
        for problem, text, label in (answers[i] for i in chosen):
            check = task.check(problem, without_thinking(text))
            yield {
                "index": index,
                "question": plain(problem.prompt),
                "response": without_thinking(text),
                "label": label,
                "model": name,
                "reference": problem.answer,
                "subset": str(problem.extra.get("subset", task.name)),
                "response_with_cot": text,
            } | ({} if check is None else {"check": check})
            index += 1
