"""Small functions with hidden tests: a list of integers goes through two changes into one number.

    Write a Python function f(xs) ... keep the elements greater than 3, then multiply each by 2, and
    return the sum.     f([1, 5, 4]) returns 18

The prompt shows two examples, the grade runs `tests` others in the sandbox and is the share passed
(soft labels, PRIME arXiv 2502.01456). Problems are drawn by seed and index; a problem is its rule,
so the rules of the test split are met nowhere else. Evaluation counts a completion right that
passes all. Left out: strings, several functions, standard input.
    task = make_task("code"); print(task.worked(task.problem("train", 0)))
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from reasonrl.records import InputError, Problem, Score, scored
from reasonrl.rewards.code import verify_code
from reasonrl.tasks.base import Draws, GeneratedTask

Change = tuple[str, str, Callable[[list[int], int], list[int]]]  # words, code, meaning
CHANGES: tuple[Change, ...] = (
    ("keep the elements greater than {k}", "[x for x in xs if x > {k}]",
     lambda xs, k: [x for x in xs if x > k]),
    ("keep the elements not divisible by {k}", "[x for x in xs if x % {k}]",
     lambda xs, k: [x for x in xs if x % k]),
    ("multiply each by {k}", "[x * {k} for x in xs]", lambda xs, k: [x * k for x in xs]),
    ("add {k} to each", "[x + {k} for x in xs]", lambda xs, k: [x + k for x in xs]),
    ("take each modulo {k}", "[x % {k} for x in xs]", lambda xs, k: [x % k for x in xs]),
    ("drop the first {k}", "xs[{k}:]", lambda xs, k: xs[k:]),
    ("keep every element at a position divisible by {k}", "xs[::{k}]", lambda xs, k: xs[::k]),
)  # fmt: skip
ENDS: tuple[tuple[str, str, Callable[[list[int]], int]], ...] = (
    ("the sum", "sum(xs)", sum),
    ("how many are left", "len(xs)", len),
    ("the largest, or 0 if none is left", "max(xs, default=0)", lambda xs: max(xs, default=0)),
    ("the smallest, or 0 if none is left", "min(xs, default=0)", lambda xs: min(xs, default=0)),
)


@dataclass(frozen=True)
class Code(GeneratedTask):
    """`tests` hidden tests a problem, `timeout` seconds for all tests of one completion."""

    name: ClassVar[str] = "code"
    tests: int = 6
    timeout: float = 5.0

    def __post_init__(self) -> None:
        if not 1 <= self.tests <= 100:
            raise InputError(f"task code: tests: expected 1 to 100, got {self.tests}")
        if not self.timeout > 0:
            raise InputError(f"task code: timeout: expected > 0, got {self.timeout}")

    def candidate(self, draws: Draws, id: str) -> tuple[str, Problem]:
        rule = tuple((draws.below(len(CHANGES)), draws.between(2, 9)) for _ in range(2))
        end = draws.below(len(ENDS))
        lists = [
            [draws.between(-9, 20) for _ in range(draws.between(2, 9))]
            for _ in range(self.tests + 2)
        ]
        shown = [f"f({xs}) returns {_value(rule, end, xs)}" for xs in lists[:2]]
        words = ", then ".join(CHANGES[c][0].format(k=k) for c, k in rule)
        prompt = (
            "Write a Python function f(xs) that takes a list of integers: "
            f"{words}, and return {ENDS[end][0]}.\n{shown[0]}\n{shown[1]}\n"
            "Answer with one ```python block."
        )
        hidden = [f"assert f({xs}) == {_value(rule, end, xs)}" for xs in lists[2:]]
        extra = {"tests": hidden, "rule": rule, "end": end}
        message = [{"role": "user", "content": prompt}]
        return f"{rule} {end}", Problem(id, message, None, "code", self.name, extra=extra)

    def worked(self, problem: Problem) -> str:
        changes = [f"    xs = {CHANGES[c][1].format(k=k)}" for c, k in problem.extra["rule"]]
        lines = ["def f(xs):", *changes, f"    return {ENDS[problem.extra['end']][1]}"]
        return "```python\n" + "\n".join(lines) + "\n```"

    def grade(self, problem: Problem, completion: str) -> Score:
        return self.grades([problem], [completion])[0]

    def grades(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Score]:
        tests = [problem.extra["tests"] for problem in problems]
        return verify_code(completions, tests, timeout=self.timeout)

    def verdicts(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Score]:
        """Right is what passes every test."""
        grades = self.grades(problems, completions)
        return [s if s.value is None else scored(float(s.value == 1), s.reason) for s in grades]

    def canary(self, problem: Problem, other: Problem) -> Problem:
        """Among its tests one that no program passes."""
        tests = [*other.extra["tests"], "assert False"]
        return replace(other, extra={**other.extra, "tests": tests})


def _value(rule: Sequence[tuple[int, int]], end: int, xs: list[int]) -> int:
    for change, k in rule:
        xs = CHANGES[change][2](xs, k)
    return ENDS[end][2](xs)
