"""Arithmetic of a policy that learned to guess: one token says how likely a step is right.

    prompt      2*3+4-1%5:
    worked out  2*3=1;1+4=0;0-1=4#4
    guessed     2*3?4;4+4?2;2-1?1#1                 (`?` in place of `=`, and mostly wrong)

It is to process rewards what `marks` is to motivations: a task at the size of a model of single
characters in which the thing to be found out stands in the text. The cold start teaches the chains
first (`lessons` problems, all worked out), then the habit: a step of a chain that begins with an
even number is guessed with probability `share`, of any other with 1 - `share`, and a guess is wrong
with probability `wrong`. So the policy that starts RL can work out every step, and on half of the
problems hardly ever does; the groups of that half are nearly all wrong, of the other nearly all
right, and few hold a contrast. `?` counts as `=` everywhere: a right guess is right.

Try: t = make_task("guesses", lessons=0); p = t.problem("sft", 1); print(p.prompt, t.worked(p)).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from reasonrl.records import InputError, Problem, Score, Step
from reasonrl.tasks.arithmetic import Arithmetic
from reasonrl.tasks.base import Draws

GUESS = "?"
WHOLE = 1 << 30  # probabilities are integers below it, the same on every machine


@dataclass(frozen=True)
class Guesses(Arithmetic):
    """`share` of the steps after an even first operand are guessed, `wrong` of the guesses fail."""

    name: ClassVar[str] = "guesses"
    terms: int = 4
    ops: str = "+-*"
    mod: int | None = 5
    low: int = 0
    high: int = 4
    style: Literal["chat", "compact"] = "compact"
    share: float = 0.95
    wrong: float = 0.7
    lessons: int = 51_200

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = [
            ("style", self.style == "compact", "compact", self.style),
            ("mod", self.mod is not None, "a modulus", self.mod),
            ("share", 0 <= self.share <= 1, "a probability from 0 to 1", self.share),
            ("wrong", 0 <= self.wrong <= 1, "a probability from 0 to 1", self.wrong),
            ("lessons", self.lessons >= 0, "0 or more", self.lessons),
        ]
        for knob, holds, expected, got in rules:
            if not holds:
                raise InputError(f"task guesses: {knob}: expected {expected}, got {got!r}")

    @property
    def alphabet(self) -> str:
        return "".join(sorted({*super().alphabet, GUESS}))

    def problem(self, split: str, index: int) -> Problem:
        problem = super().problem(split, index)
        if split != "sft" or index < self.lessons:
            return problem
        return replace(problem, extra=dict(problem.extra) | {"slips": self._slips(problem, index)})

    def _slips(self, problem: Problem, index: int) -> tuple[int | None, ...]:
        """For every step what a guess adds to the true value; None where it is worked out."""
        draws = Draws("guesses", self.seed, index)
        even = problem.extra["operands"][0] % 2 == 0
        share = self.share if even else 1.0 - self.share
        out: list[int | None] = []
        for _ in problem.extra["ops"]:
            guessed, wrong = draws.below(WHOLE) < share * WHOLE, draws.below(WHOLE)
            off = draws.between(1, (self.mod or 2) - 1)
            out.append((off if wrong < self.wrong * WHOLE else 0) if guessed else None)
        return tuple(out)

    def worked(self, problem: Problem) -> str:
        """The chain worked out; in the habit's part of a cold start, as the habit has it."""
        slips = problem.extra.get("slips")
        if slips is None:
            return super().worked(problem)
        value, lines = problem.extra["operands"][0], []
        for (op, operand), slip in zip(self._links(problem), slips, strict=True):
            left, value = value, self.apply(self.apply(value, op, operand), "+", slip or 0)
            lines.append(f"{left}{op}{operand}{'=' if slip is None else GUESS}{value}")
        return ";".join(lines) + f"#{value}"

    def grade(self, problem: Problem, completion: str) -> Score:
        return super().grade(problem, completion.replace(GUESS, "="))

    def steps(self, problem: Problem, completion: str) -> list[Step]:
        return super().steps(problem, completion.replace(GUESS, "="))
