"""reasoning-gym's generators as a task: `task=gym task_options.dataset=knights_knaves`.

An extra (pip install reasoning-gym), imported when a task is made. A problem is drawn by giving its
generator a seed of its own and taking the first item, so positions stay integers and splits stay
apart. The outcome is the generator's own score, between 0 and 1. Generators whose scorer turns the
completion into code are refused: model text is never evaluated here. Left out: curricula.
"""

from __future__ import annotations

import ast
import inspect
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar

from reasonrl.records import InputError, Problem, Score, scored, unscorable
from reasonrl.segment import answer_span
from reasonrl.tasks.base import Draws, GeneratedTask

EVALUATES = {"eval", "exec", "parse_expr", "sympify"}
ASK = "Give your final answer between <answer> and </answer>."


@dataclass(frozen=True)
class Gym(GeneratedTask):
    """dataset: the generator's name. options: its own settings (its `seed` and `size` are ours)."""

    name: ClassVar[str] = "gym"
    dataset: str = "knights_knaves"
    options: dict[str, Any] = field(default_factory=dict)
    _gym: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            import reasoning_gym  # optional
        except ImportError:
            raise InputError(
                "task gym: the package reasoning-gym is not installed (pip install reasoning-gym)"
            ) from None
        object.__setattr__(self, "_gym", reasoning_gym)
        scorer = sys.modules[type(self._generator(0)).score_answer.__module__]
        if found := sorted(EVALUATES & called(scorer)):
            raise InputError(
                f"task gym: dataset {self.dataset!r}: its scorer may evaluate model text as code "
                f"({', '.join(found)} in {scorer.__name__})"
            )

    def _generator(self, seed: int) -> Any:
        try:
            return self._gym.create_dataset(self.dataset, seed=seed, size=1, **self.options)
        except (ValueError, TypeError, AssertionError, KeyError) as error:
            raise InputError(f"task gym: dataset {self.dataset!r}: {error}") from None

    def candidate(self, draws: Draws, id: str) -> tuple[str, Problem]:
        item = self._generator(draws.next64() >> 33)[0]
        message = {"role": "user", "content": f"{item['question']}\n{ASK}"}
        extra = {"entry": item}
        answer = None if item.get("answer") is None else str(item["answer"])
        problem = Problem(id, [message], answer, "text", f"gym/{self.dataset}", extra=extra)
        return str(item["question"]), problem

    def grade(self, problem: Problem, completion: str) -> Score:
        span = answer_span(completion)
        if span is None:
            return scored(0.0, "no answer between <answer> and </answer>")
        stated = completion[slice(*span)].strip()
        value = self._generator(0).score_answer(answer=stated, entry=problem.extra["entry"])
        if not isinstance(value, int | float):
            return unscorable(f"the generator's score is {value!r}")
        return scored(float(value))


def called(module: Any) -> set[str]:
    """The names of all functions that the source of a module calls."""
    tree = ast.parse(inspect.getsource(module))
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    plain = {func.id for func in calls if isinstance(func, ast.Name)}
    return plain | {func.attr for func in calls if isinstance(func, ast.Attribute)}
