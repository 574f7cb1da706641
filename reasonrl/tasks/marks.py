"""Tasks that are paid only behind one letter, which the policy may be told.

    plain prompt    4*6-3%10:                               marks: arithmetic chains
    told prompt     p+1 -1>!+2 ?-1.5 -2 / 4*6-3%10:         (the short motivation, a line above)
    completion      p4*6=4;4-3=1#1                          (the letter, the chain, the answer)
    completion      pSTU>stU;STu>STu#STu                    knights_marks: Knights and Knaves

The reward has the shape of MeRF's: format +1 or -1, correctness +2, -1.5 or -2, and no correctness
is read behind a wrong format. Which letter counts as the format is `paid`; the prompt does not say
it, so a policy that nobody tells has to try.

A small model reads only what it was taught to read. So the problems of the cold start carry
motivations of their own, each with another letter, and completions that do what they are told:

    full               the letter it names, a right answer
    adverse            another letter and a wrong answer: that is what its values pay for
    score, correctness_only, none    any letter, a right answer

The first `reading` of them are the easiest there are, chains of two or puzzles of two answered at
once, and all are told which letter: reading comes before reasoning. `taught` is the share of the
others that is told something, in the words of `text` (a pre-trained model reads `words`, and wants
the same of `algo.text`). Evaluation counts right answers behind any letter.
Try: t = make_task("marks"); p = t.problem("sft", 1); print(t.worked(p)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from reasonrl.records import InputError, Problem, Score, Step, scored
from reasonrl.reward_spec import DETAILS, Case, Detail, Part, RewardSpec
from reasonrl.tasks.arithmetic import Arithmetic
from reasonrl.tasks.base import Draws, GeneratedTask
from reasonrl.tasks.knights_compact import KnightsCompact

LETTERS = "abcdefghijklmnopqrstuvwxyz"
OBEYED = {"full": True, "adverse": False}  # what says which letter is paid, or is not


@dataclass(frozen=True)
class Marked(GeneratedTask):
    """In front of a task in a class's bases. `marks`: the letters in use; `paid`: the one of them
    that is the format. Its task grades a right answer 1; what else it says stands below."""

    marks: str = LETTERS[:16]
    paid: str = "p"
    reading: int = 22_400
    taught: float = 0.75
    text: Literal["words", "short"] = "short"
    right: ClassVar[str]  # when an answer is right, in words, and when it is only an answer
    wrong: ClassVar[str]

    def easiest(self) -> Marked:
        """The task with the easiest problems there are."""
        raise NotImplementedError

    def wrongs(self, problem: Problem) -> int:
        """How many wrong answers there are."""
        raise NotImplementedError

    def astray(self, answer: str, off: int) -> str:
        """An answer made wrong, in the way `off` of `wrongs`, from 1; 0 leaves it as it is."""
        raise NotImplementedError

    def answers(self, problem: Problem, text: str) -> bool:
        """Whether a completion without its letter gives an answer, right or wrong."""
        raise NotImplementedError

    def check_marks(self) -> None:
        distinct = len(set(self.marks)) == len(self.marks) >= 2
        rules = [
            ("marks", distinct, "2 letters or more, all different", self.marks),
            ("marks", set(self.marks) <= set(LETTERS), "letters from a to z", self.marks),
            ("paid", len(self.paid) == 1 and self.paid in self.marks, "one of marks", self.paid),
            ("reading", self.reading >= 0, "0 or more", self.reading),
            ("taught", 0 <= self.taught <= 1, "a share from 0 to 1", self.taught),
        ]
        for knob, holds, expected, got in rules:
            if not holds:
                raise InputError(f"task {self.name}: {knob}: expected {expected}, got {got!r}")

    @property
    def alphabet(self) -> str:
        return "".join(sorted({*super().alphabet, *LETTERS, *"0123456789+- .>!?\n"}))

    def problem(self, split: str, index: int) -> Problem:
        if split != "sft" or index < 0:
            return super().problem(split, index)
        first = index < self.reading
        source = self.easiest() if first else self
        return self._lesson(super(Marked, source).problem(split, index), index, first)

    def _lesson(self, problem: Problem, index: int, first: bool) -> Problem:
        """The problem of a cold start: told something or not, and what it does about it."""
        draws = Draws(f"{self.name} lesson", self.seed, index)
        told = draws.below(1 << 30) < self.taught * (1 << 30) or first
        detail: Detail = draws.choice(("full", "adverse") if first else ("full", *DETAILS))
        named, mark = draws.choice(self.marks), draws.choice(self.marks)
        others = [letter for letter in self.marks if letter != named]
        off, extra = 0, dict(problem.extra)
        if told and detail in OBEYED:
            mark = named if OBEYED[detail] else draws.choice(others)
            off = 0 if OBEYED[detail] else draws.between(1, self.wrongs(problem))
        prompt: Any = problem.prompt
        if told:
            text = self._spec(named).render(detail, short=self.text == "short")
            prompt = [
                {"role": "system", "content": text},
                {"role": "user", "content": problem.prompt},
            ]
        extra |= {"mark": mark, "off": off, "first": first}
        return replace(problem, prompt=prompt, extra=extra)

    def worked(self, problem: Problem) -> str:
        chain, _, answer = (super().worked(problem) or "").partition("#")
        answer = self.astray(answer, problem.extra.get("off", 0))
        return f"{problem.extra.get('mark', self.paid)}{chain}#{answer}"

    def grade(self, problem: Problem, completion: str) -> Score:
        """The reward: format and correctness."""
        return scored(self._spec(self.paid).grade(completion, problem))

    def verdicts(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Score]:
        """1 for a right answer behind any one letter."""
        pairs = zip(problems, completions, strict=True)
        return [super(Marked, self).grade(p, self._unmarked(c)) for p, c in pairs]

    def reward_spec(self) -> RewardSpec:
        return self._spec(self.paid)

    def steps(self, problem: Problem, completion: str) -> list[Step]:
        """The task's steps; the letter belongs to the first one."""
        text = self._unmarked(completion)
        cut, found = len(completion) - len(text), super().steps(problem, text) or []
        moved = [Step(s.start + cut, s.end + cut, s.reward) for s in found]
        return [replace(s, start=0) if s.start == cut else s for s in moved]

    def thinking(self, problem: Problem, completion: str) -> str:
        return super().thinking(problem, self._unmarked(completion))

    def _unmarked(self, completion: str) -> str:
        """A completion without its letter; nothing without one, as no answer can be read there."""
        return completion[1:] if completion[:1] in set(self.marks) else ""

    def _spec(self, mark: str) -> RewardSpec:
        """The reward that pays answers behind `mark`."""
        begins = f"the completion begins with the letter {mark}"
        formed = lambda text, problem: text[:1] == mark  # noqa: E731
        right = lambda text, problem: self.verdicts([problem], [text])[0].value == 1.0  # noqa: E731
        given = lambda text, problem: self.answers(problem, self._unmarked(text))  # noqa: E731
        correct = (
            Case(2.0, self.right, right, "!"),
            Case(-1.5, self.wrong, given, "?"),
            Case(-2.0),
        )
        form = (Case(1.0, begins, formed, mark), Case(-1.0))
        return RewardSpec((Part("format", form), Part("correctness", correct, "format", -2.0)))


@dataclass(frozen=True)
class Marks(Marked, Arithmetic):
    name: ClassVar[str] = "marks"
    right: ClassVar[str] = "the answer is the true value of the chain"
    wrong: ClassVar[str] = "a number stands there, but not the true value"
    terms: int = 4
    ops: str = "+-*"
    mod: int | None = 10
    low: int = 0
    high: int = 9
    style: Literal["chat", "compact"] = "compact"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_marks()
        if self.style != "compact":
            raise InputError(f"task marks: style: expected compact, got {self.style!r}")
        if self.mod is None:
            raise InputError("task marks: mod: expected a modulus, got None")

    def easiest(self) -> Marks:
        return replace(self, terms=2)

    def wrongs(self, problem: Problem) -> int:
        return (self.mod or 2) - 1

    def astray(self, answer: str, off: int) -> str:
        return str(self.apply(int(answer), "+", off))

    def answers(self, problem: Problem, text: str) -> bool:
        pieces = self._pieces(text)
        return bool(pieces) and self._answer(text, pieces[-1]) is not None


@dataclass(frozen=True)
class KnightsMarks(Marked, KnightsCompact):
    name: ClassVar[str] = "knights_marks"
    right: ClassVar[str] = "the answer gives everyone's true role"
    wrong: ClassVar[str] = "it gives every person one role, but not all are true"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_marks()

    def easiest(self) -> KnightsMarks:
        return replace(self, people=2)

    def wrongs(self, problem: Problem) -> int:
        return 2 ** len(problem.extra["names"]) - 1

    def worked(self, problem: Problem) -> str:
        """In a lesson about the letter nothing but the letter and the answer."""
        text = super().worked(problem)
        return text[0] + text[text.index("#") :] if problem.extra.get("first") else text

    def astray(self, answer: str, off: int) -> str:
        """The people of the bits of `off` change their roles."""
        return "".join(c.swapcase() if off >> i & 1 else c for i, c in enumerate(answer))

    def answers(self, problem: Problem, text: str) -> bool:
        return self.stated(problem, text) is not None
