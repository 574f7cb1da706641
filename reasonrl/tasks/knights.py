"""Knights and Knaves: generator, perturbations, grader, and a search trace that a rule can check.

Knights always tell the truth, knaves always lie; everyone makes one statement, and exactly one
assignment of roles fits them all (brute force over 2^n worlds, knights_logic.py). The reward of
Logic-RL and MeRF (arXiv 2506.18485) is `reward_spec(how)`:

    format        +1 each of the four tags once and in order, else -1
    correctness   +2 all roles right, -1.5 understandable but wrong, -2 otherwise
    "gated"       correctness counts as -2 where the format is wrong: totals 3, -0.5, -1, -3
    "sum"         both parts always: 3, 1, -0.5, -1, -2.5, -3

Left out: the phrasings and names of the published data. Try: print(generate(0, 0, 3).prompt).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from reasonrl.records import InputError, Problem, Score, Step, scored
from reasonrl.reward_spec import Case, Part, RewardSpec
from reasonrl.tasks import knights_logic as logic
from reasonrl.tasks import knights_trace as trace
from reasonrl.tasks.base import PATIENCE, Draws, GeneratedTask, leading_share
from reasonrl.tasks.knights_words import NAMES, OTHER_NAMES, prompt_text

How = Literal["gated", "sum"]
TRIES = 2000  # draws before a perturbation is given up
KEPT = ("names", "solution", "statements", "flipped")  # of a puzzle in its problem's `extra`
ROLE = re.compile(r"\b(?:knight|knave)s?\b", re.IGNORECASE)


@dataclass(frozen=True)
class Puzzle:
    """A puzzle with one solution. `flipped`: on this island knights lie and knaves tell the truth.

    Refused when built (InputError): names that contain one another, and statements with no or
    several solutions or another one than `solution`. Without statements nothing is solved.
    """

    names: tuple[str, ...]
    solution: tuple[bool, ...]  # True = knight
    statements: tuple[logic.Statement, ...]
    prompt: str
    flipped: bool = False

    def __post_init__(self) -> None:
        people = len(self.names)
        if not 2 <= people <= 8:
            raise InputError(f"puzzle: expected 2 to 8 people, got {people}")
        check_names(self.names)
        if len(self.solution) != people or len(self.statements) not in (0, people):
            raise InputError(f"puzzle: expected a role and a statement for each of {people} people")
        statements = tuple(logic.canonical(s, people) for s in self.statements)
        object.__setattr__(self, "names", tuple(self.names))
        object.__setattr__(self, "solution", tuple(bool(knight) for knight in self.solution))
        object.__setattr__(self, "statements", statements)
        if statements and solve(statements, self.flipped) != self.solution:
            raise InputError("puzzle: the solution given does not fit the statements")


def check_names(names: Sequence[str]) -> None:
    """InputError where a name is empty, holds a role word, or stands inside another name."""
    for i, name in enumerate(names):
        if not isinstance(name, str) or not name.strip() or ROLE.search(name):
            raise InputError(f"puzzle: expected a name without role words, got {name!r}")
        for j, other in enumerate(names):
            if i != j and name.lower() in other.lower():
                raise InputError(f"puzzle: the name {name!r} is part of the name {other!r}")


def solve(statements: Sequence[logic.Statement], flipped: bool = False) -> tuple[bool, ...]:
    """The only assignment of roles that fits; InputError with the count where it is not one."""
    found = logic.solutions(statements)
    if len(found) != 1:
        raise InputError(f"puzzle: expected one solution, got {len(found)}")
    return tuple(truthful != flipped for truthful in found[0])


def generate(seed: int, index: int, people: int, *, depth: int = 2, width: int = 2) -> Puzzle:
    """Puzzle number `index` of a seed; statements of at most `depth` levels and `width` parts."""
    if not 2 <= people <= 8:
        raise InputError(f"people: expected 2 to 8, got {people}")
    _check_shape(depth, width)
    return draw_puzzle(Draws("knights", seed, index, people, depth, width), people, depth, width)


def draw_puzzle(draws: Draws, people: int, depth: int, width: int) -> Puzzle:
    names = tuple(draws.shuffled(NAMES)[:people])
    for _ in range(PATIENCE):
        statements = tuple(
            logic.draw_statement(draws, i, people, depth, width) for i in range(people)
        )
        if len(set(statements)) == people and len(logic.solutions(statements)) == 1:
            return _build(names, statements, draws)
    raise InputError(
        f"puzzle: none with one solution in {PATIENCE} draws for {people} people, depth {depth}, "
        f"width {width}"
    )


def perturb(puzzle: Puzzle, how: str, seed: int = 0) -> Puzzle:
    """A neighbour of a puzzle, itself with exactly one solution.

    statement, leaf: one statement, or one claim in it, is replaced, so that the solution changes
    wherever a neighbour with another one was found.
    order: the people come in another order. names: other names. roles: knights and knaves swap
    their ways, so every role in the solution flips.
    """
    draws = Draws("perturb", how, seed, puzzle.statements, puzzle.names)
    if how == "order":
        return _reordered(puzzle, draws)
    if how == "names":
        free = [n for n in OTHER_NAMES if n not in puzzle.names]
        names = tuple(draws.shuffled(free)[: len(puzzle.names)])
        return _build(names, puzzle.statements, draws, puzzle.flipped)
    if how == "roles":
        return _build(puzzle.names, puzzle.statements, draws, not puzzle.flipped)
    if how not in ("statement", "leaf"):
        known = "statement, leaf, order, names, roles"
        raise InputError(f"perturbation: expected one of {known}, got {how!r}")
    truth = logic.solutions(puzzle.statements)
    same: tuple[logic.Statement, ...] | None = None
    for _ in range(TRIES):
        statements = list(puzzle.statements)
        person = draws.below(len(statements))
        if how == "statement":
            statements[person] = logic.draw_statement(draws, person, len(statements), 2, 2)
        else:
            statements[person] = logic.with_other_leaf(draws, statements[person], len(statements))
        found = logic.solutions(statements)
        if len(found) != 1 or len({*statements, *puzzle.statements}) == len(statements):
            continue
        if found != truth and len(set(statements)) == len(statements):
            return _build(puzzle.names, tuple(statements), draws, puzzle.flipped)
        same = same or tuple(statements)
    if same is None:
        raise InputError(f"perturbation {how!r}: this puzzle has no neighbour with one solution")
    return _build(puzzle.names, same, draws, puzzle.flipped)


def grade(completion: str, puzzle: Puzzle, *, how: How = "gated") -> float:
    """The reward of one completion; see the head of this file for its values."""
    return reward_spec(how).grade(completion, puzzle)


def reward_spec(how: How = "gated") -> RewardSpec:
    """The reward as an object that also states itself in words."""
    if how not in SPECS:
        raise InputError(f"how: expected gated or sum, got {how!r}")
    return SPECS[how]


def tags_hold(completion: str, problem: object = None) -> bool:
    """Each of the four tags exactly once, in order."""
    tags = ("<think>", "</think>", "<answer>", "</answer>")
    places = [completion.find(tag) for tag in tags]
    once = all(completion.count(tag) == 1 for tag in tags)
    return once and places == sorted(places)


def stated_roles(completion: str, names: Sequence[str]) -> tuple[bool, ...] | None:
    """The roles that the answer states, True = knight; None where it is not understandable.

    Read from the answer block, without one from what follows the last opened tag. Every name must
    be given a role, and there must be as many role words as names.
    """
    if "</answer>" in completion and "<answer>" in completion[: completion.rfind("</answer>")]:
        text = completion[: completion.rfind("</answer>")].rpartition("<answer>")[2]
    else:
        text = re.split(r"<answer>|</think>", completion)[-1]
    if len(ROLE.findall(text)) != len(names):
        return None
    roles = []
    for name in names:
        pattern = rf"(?<!\w){re.escape(name)}\s+is\s+a\s+(knight|knave)\b"
        match = re.search(pattern, text, re.IGNORECASE)
        if not match:
            return None
        roles.append(match[1].lower() == "knight")
    return tuple(roles)


def puzzle_of(problem: Puzzle | Problem) -> Puzzle:
    """The puzzle behind a problem of the `knights` task."""
    if isinstance(problem, Puzzle):
        return problem
    return Puzzle(prompt="", **{name: problem.extra[name] for name in KEPT})


def _roles_right(completion: str, problem: Puzzle | Problem) -> bool:
    puzzle = puzzle_of(problem)
    return stated_roles(completion, puzzle.names) == puzzle.solution


def _roles_stated(completion: str, problem: Puzzle | Problem) -> bool:
    return stated_roles(completion, puzzle_of(problem).names) is not None


FORMAT = Part(
    "format",
    (
        Case(1.0, "<think> </think> <answer> </answer> each stand there once, in order", tags_hold),
        Case(-1.0),
    ),
)
CORRECTNESS = (
    Case(2.0, "the answer gives everyone's true role", _roles_right),
    Case(-1.5, "it gives every person one role, but not all are true", _roles_stated),
    Case(-2.0, "otherwise (a role is missing or cannot be read)"),
)
SPECS = {
    "gated": RewardSpec((FORMAT, Part("correctness", CORRECTNESS, "format", -2.0))),
    "sum": RewardSpec((FORMAT, Part("correctness", CORRECTNESS))),
}
BINARY = RewardSpec(
    (
        Part(
            "answer",
            (
                Case(
                    1.0,
                    "<think> </think> <answer> </answer> each stand there once, in order, and the "
                    "answer gives everyone's true role",
                    lambda completion, problem: (
                        tags_hold(completion) and _roles_right(completion, problem)
                    ),
                ),
                Case(0.0),
            ),
        ),
    )
)


@dataclass(frozen=True)
class Knights(GeneratedTask):
    """Puzzles of `people` people. `reward`: the outcome, binary = 1 for a tagged, true answer."""

    name: ClassVar[str] = "knights"
    people: int = 3
    depth: int = 2
    width: int = 2
    reward: Literal["binary", "gated", "sum"] = "binary"

    def __post_init__(self) -> None:
        if not 2 <= self.people <= 8:
            raise InputError(f"task {self.name}: people: expected 2 to 8, got {self.people}")
        _check_shape(self.depth, self.width)

    def candidate(self, draws: Draws, id: str) -> tuple[str, Problem]:
        puzzle = draw_puzzle(draws, self.people, self.depth, self.width)
        extra = {name: getattr(puzzle, name) for name in KEPT}
        message = {"role": "user", "content": puzzle.prompt}
        answer = trace.answer_text(puzzle.names, puzzle.solution)
        problem = Problem(id, [message], answer, "text", self.name, extra=extra)
        return logic.identity(puzzle.statements), problem

    def worked(self, problem: Problem) -> str:
        return trace.worked(puzzle_of(problem))

    def grade(self, problem: Problem, completion: str) -> Score:
        if self.reward != "binary":
            return scored(grade(completion, puzzle_of(problem), how=self.reward))
        return self._right(problem, completion)

    def verdicts(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Score]:
        return [self._right(p, c) for p, c in zip(problems, completions, strict=True)]

    def _right(self, problem: Problem, completion: str) -> Score:
        if not tags_hold(completion):
            return scored(0.0, "the tags are not each there once and in order")
        right = _roles_right(completion, problem)
        return scored(float(right), "" if right else "a role is wrong, missing or unreadable")

    def reward_spec(self) -> RewardSpec:
        return BINARY if self.reward == "binary" else reward_spec(self.reward)

    def steps(self, problem: Problem, completion: str) -> list[Step]:
        puzzle = puzzle_of(problem)
        roles = stated_roles(completion, puzzle.names) if tags_hold(completion) else None
        return trace.check(puzzle, completion, roles)

    def prefix_correct(self, problem: Problem, completion: str) -> float:
        expected = len(trace.search(puzzle_of(problem))) + 1
        return leading_share(self.steps(problem, completion), expected)


def _check_shape(depth: int, width: int) -> None:
    if not 1 <= depth <= 4:
        raise InputError(f"depth: expected 1 to 4, got {depth}")
    if not 1 <= width <= 4:
        raise InputError(f"width: expected 1 to 4, got {width}")


def _build(
    names: tuple[str, ...], statements: tuple, draws: Draws, flipped: bool = False
) -> Puzzle:
    prompt = prompt_text(names, statements, draws, flipped)
    return Puzzle(names, solve(statements, flipped), statements, prompt, flipped)


def _reordered(puzzle: Puzzle, draws: Draws) -> Puzzle:
    """The same puzzle told in another order of people; indices in the statements follow."""
    people = range(len(puzzle.names))
    order = list(people)
    while order == list(people):
        order = draws.shuffled(people)
    place = {old: new for new, old in enumerate(order)}
    statements = tuple(logic.renumbered(puzzle.statements[old], place) for old in order)
    names = tuple(puzzle.names[old] for old in order)
    return _build(names, statements, draws, puzzle.flipped)
