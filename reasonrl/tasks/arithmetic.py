"""Worked arithmetic chains: every step of a completion can be checked by rule.

    prompt      7+1-5-6
    chat        7+1=8 / 8-5=3 / 3-6=-3 / Answer: -3      (one line a step)
    compact     7+1=8;8-5=3;3-6=-3#-3                    (for character-level models)

Chains are evaluated from left to right, `*` included; with `mod` every result is reduced. A step
is right when it applies the prompt's operation at its position to the value *written* in the step
before (the first operand at first) and the result is true: one slip costs one step, not all the
rest. The answer is the last step, right when it repeats the value written last. The outcome is
another question: the strict last answer must be the true value, however it was reached.

    task = make_task("arithmetic", terms=4); p = task.problem("train", 0); task.worked(p)
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from reasonrl.records import InputError, Problem, Score, Step, scored
from reasonrl.reward_spec import Case, Part, RewardSpec
from reasonrl.segment import split_steps
from reasonrl.tasks.base import Draws, GeneratedTask, leading_share, parts_of

NUMBER = r"(?:0|-?[1-9][0-9]*)"
STEP = re.compile(rf"({NUMBER})([+*-])({NUMBER})=({NUMBER})")
ANSWER = {"chat": re.compile(rf"Answer: ({NUMBER})"), "compact": re.compile(rf"#({NUMBER})")}
MARK = {"chat": "Answer:", "compact": "#"}
END = {"chat": "\n", "compact": ";"}
DIGITS = 18  # a number longer than this is never right, and is not parsed


@dataclass(frozen=True)
class Arithmetic(GeneratedTask):
    """Chains of `terms` operands in [low, high] joined by `ops`; see the head of this file."""

    name: ClassVar[str] = "arithmetic"
    terms: int = 4
    ops: str = "+-"
    mod: int | None = None
    low: int = 1
    high: int = 9
    style: Literal["chat", "compact"] = "chat"

    def __post_init__(self) -> None:
        rules = [
            ("terms", 2 <= self.terms <= 32, "2 to 32", self.terms),
            ("ops", bool(self.ops) and set(self.ops) <= set("+-*"), "some of + - *", self.ops),
            ("mod", self.mod is None or self.mod >= 2, "null or >= 2", self.mod),
            ("low", 0 <= self.low <= self.high <= 10**6, "0 <= low <= high <= 1000000", self.low),
            ("style", self.style in ANSWER, "chat or compact", self.style),
        ]
        for knob, holds, expected, got in rules:
            if not holds:
                raise InputError(f"task arithmetic: {knob}: expected {expected}, got {got!r}")
        if "*" in self.ops and self.mod is None and self.high**self.terms > 10**15:
            raise InputError("task arithmetic: mod: expected a modulus for such products, got None")

    @property
    def alphabet(self) -> str:
        rest = "Answer:\n (left to right, mod)" if self.style == "chat" else ";#:%"
        return "".join(sorted(set("0123456789+-*=" + rest)))

    @property
    def delimiter(self) -> str:
        return END[self.style]

    def candidate(self, draws: Draws, id: str) -> tuple[str, Problem]:
        operands = [draws.between(self.low, self.high) for _ in range(self.terms)]
        ops = [draws.choice(self.ops) for _ in range(self.terms - 1)]
        chain, answer = str(operands[0]), operands[0]
        for op, operand in zip(ops, operands[1:], strict=True):
            chain, answer = f"{chain}{op}{operand}", self.apply(answer, op, operand)
        extra = {"operands": tuple(operands), "ops": tuple(ops)}
        prompt = self._prompt(chain)
        return chain, Problem(id, prompt, str(answer), "numerical", self.name, extra=extra)

    def _prompt(self, chain: str) -> str | list[dict[str, str]]:
        if self.style == "compact":
            return chain + (f"%{self.mod}" if self.mod else "") + ":"
        notes = ["left to right"] * ("*" in self.ops) + [f"mod {self.mod}"] * bool(self.mod)
        return [{"role": "user", "content": chain + (f" ({', '.join(notes)})" if notes else "")}]

    def apply(self, left: int, op: str, right: int) -> int:
        value = left + right if op == "+" else left - right if op == "-" else left * right
        return value % self.mod if self.mod else value

    def worked(self, problem: Problem) -> str:
        value = problem.extra["operands"][0]
        lines = []
        for op, operand in self._links(problem):
            left, value = value, self.apply(value, op, operand)
            lines.append(f"{left}{op}{operand}={value}")
        if self.style == "chat":
            return "\n".join([*lines, f"Answer: {value}"])
        return ";".join(lines) + f"#{value}"

    def check(self, problem: Problem, response: str) -> str:
        """The chain worked anew, then the true answer minus the stated one: 0 where it is right. A
        small model takes long to learn whether two numbers are equal; subtraction it knows."""
        pieces, own = self._pieces(response), int(problem.answer or 0)
        stated = self._answer(response, pieces[-1]) if pieces else None
        said = "none" if stated is None else f"{own}-{stated}={self.apply(own, '-', stated)}"
        mark = "~" if self.style == "compact" else "\nCheck: "
        return f"{self.worked(problem)}{mark}{said}"

    def _links(self, problem: Problem) -> list[tuple[str, int]]:
        return list(zip(problem.extra["ops"], problem.extra["operands"][1:], strict=True))

    def grade(self, problem: Problem, completion: str) -> Score:
        """1 when the last step is a well-formed answer, the only one, and true; else 0."""
        pieces = self._pieces(completion)
        if completion.count(MARK[self.style]) != 1 or not pieces:
            return scored(0.0, f"expected one answer, got {completion.count(MARK[self.style])}")
        value = self._answer(completion, pieces[-1])
        if value is None:
            return scored(0.0, "the last step is not a well-formed answer")
        right = str(value) == problem.answer
        return scored(float(right), "" if right else f"answer {value}, expected {problem.answer}")

    def reward_spec(self) -> RewardSpec:
        where = "the last line, Answer:" if self.style == "chat" else "the part behind the mark"
        right = lambda completion, problem: self.grade(problem, completion).value == 1.0  # noqa: E731
        case = Case(1.0, f"{where} gives the true value of the chain, once and well-formed", right)
        return RewardSpec((Part("answer", (case, Case(0.0))),))

    def steps(self, problem: Problem, completion: str) -> list[Step]:
        """One step a line (or a `;` part); parts beyond the chain and a premature answer get 0."""
        links = self._links(problem)
        written: int | None = problem.extra["operands"][0]
        out = []
        for i, piece in enumerate(self._pieces(completion)):
            right = False
            if i < len(links):
                text = completion[piece.start : piece.end]
                right, written = self._check(text, written, *links[i])
            elif i == len(links):
                right = written is not None and self._answer(completion, piece) == written
            out.append(Step(piece.start, piece.end, float(right)))
        return out

    def prefix_correct(self, problem: Problem, completion: str) -> float:
        """Leading right steps over the steps expected, the answer among them."""
        return leading_share(self.steps(problem, completion), len(problem.extra["operands"]))

    def thinking(self, problem: Problem, completion: str) -> str:
        """All lines before the answer."""
        return completion.partition(MARK[self.style])[0].rstrip("\n")

    def _check(
        self, text: str, written: int | None, op: str, operand: int
    ) -> tuple[bool, int | None]:
        """Whether a part is the right next step, and the value it writes, if any."""
        match = STEP.fullmatch(text.rstrip(END[self.style]))
        if not match or max(map(len, match.groups())) > DIGITS:
            return False, None
        left, right, value = int(match[1]), int(match[3]), int(match[4])
        holds = left == written and match[2] == op and right == operand
        return holds and value == self.apply(left, op, operand), value

    def _answer(self, text: str, piece: Step) -> int | None:
        match = ANSWER[self.style].fullmatch(text[piece.start : piece.end].rstrip("\n"))
        return int(match[1]) if match and len(match[1]) <= DIGITS else None

    def _pieces(self, text: str) -> Sequence[Step]:
        return split_steps(text, "\n") if self.style == "chat" else parts_of(text)
