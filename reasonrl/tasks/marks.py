"""Arithmetic chains that are paid only behind one letter, which the policy may be told.

    plain prompt    4*6-3%10:
    told prompt     p+1 -1>!+2 ?-1.5 -2 / 4*6-3%10:        (the short motivation, a line above)
    completion      p4*6=4;4-3=1#1                          (the letter, the chain, the answer)

It is to MeRF what Knights and Knaves is, at the size of a model of single characters. The reward
has the same shape: format +1 or -1, correctness +2, -1.5 or -2, and no correctness is read behind
a wrong format. Which letter counts as the format is `paid`; a policy that nobody tells has to try.

A small model reads only what it was taught to read. So the problems of the cold start carry
motivations of their own, each with another letter, and completions that do what they are told:

    full               the letter it names, a right answer
    adverse            another letter and a wrong answer: that is what its values pay for
    score, correctness_only, none    any letter, a right answer

The first `reading` of them are chains of two, and all are told which letter: reading comes before
arithmetic. `taught` is the share of the others that is told something, in the words of `text` (a
pre-trained model reads `words`, and wants the same of `algo.text`). Evaluation counts right answers
behind any letter. Try: t = make_task("marks"); p = t.problem("sft", 1); print(t.worked(p)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from reasonrl.records import InputError, Problem, Score, Step, scored
from reasonrl.reward_spec import DETAILS, Case, Detail, Part, RewardSpec
from reasonrl.tasks.arithmetic import Arithmetic
from reasonrl.tasks.base import Draws

LETTERS = "abcdefghijklmnopqrstuvwxyz"
OBEYED = {"full": True, "adverse": False}  # what says which letter is paid, or is not


@dataclass(frozen=True)
class Marks(Arithmetic):
    """`marks`: the letters in use; `paid`: the one of them that is the format."""

    name: ClassVar[str] = "marks"
    terms: int = 4
    ops: str = "+-*"
    mod: int | None = 10
    low: int = 0
    high: int = 9
    style: Literal["chat", "compact"] = "compact"
    marks: str = LETTERS[:16]
    paid: str = "p"
    reading: int = 22_400
    taught: float = 0.75
    text: Literal["words", "short"] = "short"

    def __post_init__(self) -> None:
        super().__post_init__()
        distinct = len(set(self.marks)) == len(self.marks) >= 2
        rules = [
            ("style", self.style == "compact", "compact", self.style),
            ("mod", self.mod is not None, "a modulus", self.mod),
            ("marks", distinct, "2 letters or more, all different", self.marks),
            ("marks", set(self.marks) <= set(LETTERS), "letters from a to z", self.marks),
            ("paid", len(self.paid) == 1 and self.paid in self.marks, "one of marks", self.paid),
            ("reading", self.reading >= 0, "0 or more", self.reading),
            ("taught", 0 <= self.taught <= 1, "a share from 0 to 1", self.taught),
        ]
        for knob, holds, expected, got in rules:
            if not holds:
                raise InputError(f"task marks: {knob}: expected {expected}, got {got!r}")

    @property
    def alphabet(self) -> str:
        return "".join(sorted({*super().alphabet, *LETTERS, *" .>!?\n"}))

    def problem(self, split: str, index: int) -> Problem:
        if split != "sft" or index < 0:
            return super().problem(split, index)
        first = index < self.reading
        source = replace(self, terms=2) if first else self
        return self._lesson(super(Marks, source).problem(split, index), index, first)

    def _lesson(self, problem: Problem, index: int, first: bool) -> Problem:
        """The problem of a cold start: told something or not, and what it does about it."""
        draws = Draws("marks lesson", self.seed, index)
        told = draws.below(1 << 30) < self.taught * (1 << 30) or first
        detail: Detail = draws.choice(("full", "adverse") if first else ("full", *DETAILS))
        named, mark = draws.choice(self.marks), draws.choice(self.marks)
        others = [letter for letter in self.marks if letter != named]
        off, extra = 0, dict(problem.extra)
        if told and detail in OBEYED:
            mark = named if OBEYED[detail] else draws.choice(others)
            off = 0 if OBEYED[detail] else draws.between(1, (self.mod or 2) - 1)
        prompt: Any = problem.prompt
        if told:
            text = spec_of(self, named).render(detail, short=self.text == "short")
            prompt = [
                {"role": "system", "content": text},
                {"role": "user", "content": problem.prompt},
            ]
        extra |= {"mark": mark, "off": off}
        return replace(problem, prompt=prompt, extra=extra)

    def worked(self, problem: Problem) -> str:
        chain, _, value = super().worked(problem).partition("#")
        stated = self.apply(int(value), "+", problem.extra.get("off", 0))
        return f"{problem.extra.get('mark', self.paid)}{chain}#{stated}"

    def grade(self, problem: Problem, completion: str) -> Score:
        """The reward: format and correctness."""
        return scored(spec_of(self, self.paid).grade(completion, problem))

    def verdicts(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Score]:
        """1 for a right answer behind any one letter."""
        pairs = zip(problems, completions, strict=True)
        return [super(Marks, self).grade(p, self._unmarked(c)) for p, c in pairs]

    def reward_spec(self) -> RewardSpec:
        return spec_of(self, self.paid)

    def steps(self, problem: Problem, completion: str) -> list[Step]:
        """The chain's steps; the letter belongs to the first one."""
        text = self._unmarked(completion)
        cut, found = len(completion) - len(text), super().steps(problem, text)
        moved = [Step(s.start + cut, s.end + cut, s.reward) for s in found]
        return [replace(s, start=0) if s.start == cut else s for s in moved]

    def thinking(self, problem: Problem, completion: str) -> str:
        return super().thinking(problem, self._unmarked(completion))

    def stated(self, completion: str) -> int | None:
        """The number behind the letter and the chain."""
        text = self._unmarked(completion)
        pieces = self._pieces(text)
        return self._answer(text, pieces[-1]) if pieces else None

    def _unmarked(self, completion: str) -> str:
        """A completion without its letter; nothing without one, as no answer can be read there."""
        return completion[1:] if completion[:1] in set(self.marks) else ""


def spec_of(task: Marks, mark: str) -> RewardSpec:
    """The reward that pays answers behind `mark`."""
    right = lambda text, problem: task.verdicts([problem], [text])[0].value == 1.0  # noqa: E731
    number = lambda text, problem: task.stated(text) is not None  # noqa: E731
    formed = lambda text, problem: text[:1] == mark  # noqa: E731
    wrong = "a number stands there, but not the true value"
    form = (Case(1.0, f"the completion begins with the letter {mark}", formed, mark), Case(-1.0))
    correct = (
        Case(2.0, "the answer is the true value of the chain", right, "!"),
        Case(-1.5, wrong, number, "?"),
        Case(-2.0),
    )
    return RewardSpec((Part("format", form), Part("correctness", correct, "format", -2.0)))
