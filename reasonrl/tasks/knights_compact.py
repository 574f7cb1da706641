"""Knights and Knaves in single characters, at a size that a model from scratch learns.

    prompt        S:t&U;T:~S;U:s|T?     S says: T is a knave and U a knight
    completion    STU>stU;STu>stU;StU>Stu;Stu>stu;sTU>sTU#sTU

A person as a capital letter is a knight, as a small one a knave. ~ not, & and, | or, > if then,
= exactly if; a part of a part stands in brackets. A completion goes through worlds until one holds:
a part supposes a world and says who would then speak the truth and thus be a knight. A world that
comes back is the answer. Worlds are counted down from all knights, the last person first. A part is
right when it supposes the world behind the one *written* before and its speakers are true. The
reward is 1 for the true roles behind the only `#`.

    task = make_task("knights_compact", joins="&|"); task.worked(task.problem("train", 0))
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from reasonrl.records import InputError, Problem, Score, Step, scored
from reasonrl.reward_spec import Case, Part, RewardSpec
from reasonrl.tasks.base import PATIENCE, Draws, leading_share, parts_of
from reasonrl.tasks.knights import Knights
from reasonrl.tasks.knights_logic import LEAVES, Statement, partial_truth

NAMES = "STUVWXYZ"
SIGNS = {"and": "&", "or": "|", "implies": ">", "iff": "="}
ALPHABET = NAMES + NAMES.lower() + ":;?#~()" + "".join(SIGNS.values())
PART = re.compile(r"([A-Za-z]+)>([A-Za-z]+);?")
Roles = tuple[bool, ...]  # True = knight


def prompt_text(statements: Sequence[Statement]) -> str:
    said = zip(NAMES, statements, strict=False)
    return ";".join(f"{name}:{_wording(statement)}" for name, statement in said) + "?"


def _wording(statement: Statement) -> str:
    head = statement[0]
    if head in LEAVES:
        return _one(NAMES[statement[1]], head == "telling-truth")
    parts = [_wording(part) for part in statement[1:]]
    parts = [f"({part})" if len(part) > 1 else part for part in parts]
    return f"~{parts[0]}" if head == "not" else SIGNS[head].join(parts)


def roles_text(names: Sequence[str], roles: Sequence[bool]) -> str:
    return "".join(_one(name, knight) for name, knight in zip(names, roles, strict=False))


def read_roles(text: str, names: Sequence[str]) -> Roles | None:
    """Everyone's role; None where somebody's is missing or another letter stands there."""
    if len(text) != len(names):
        return None
    roles = tuple(c == name for c, name in zip(text, names, strict=True))
    return roles if roles_text(names, roles) == text else None


def worlds(people: int) -> list[Roles]:
    """All worlds, counted down from all knights."""
    return list(itertools.product((True, False), repeat=people))


def behind(world: Roles) -> Roles | None:
    """The next world; None behind the one of knaves only."""
    order = worlds(len(world))
    after = order.index(world) + 1
    return order[after] if after < len(order) else None


def speakers(problem: Problem, world: Roles) -> Roles:
    """Who speaks the truth in a world."""
    return tuple(bool(partial_truth(s, world)) for s in problem.extra["statements"])


def _one(name: str, knight: bool) -> str:
    return name if knight else name.lower()


@dataclass(frozen=True)
class KnightsCompact(Knights):
    """`joins`: the connectives in use."""

    name: ClassVar[str] = "knights_compact"
    joins: str = "&|>="

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.joins or not set(self.joins) <= set(SIGNS.values()):
            raise InputError(
                f"task {self.name}: joins: expected some of & | > =, got {self.joins!r}"
            )
        if self.reward != "binary":
            raise InputError(
                f"task {self.name}: reward: expected binary, there are no tags, got {self.reward!r}"
            )

    @property
    def alphabet(self) -> str:
        return ALPHABET

    @property
    def delimiter(self) -> str:
        return ";"

    def candidate(self, draws: Draws, id: str) -> tuple[str, Problem]:
        unwanted = {*SIGNS.values()} - {*self.joins}
        for _ in range(PATIENCE):
            content, problem = super().candidate(draws, id)
            if not unwanted & {*prompt_text(problem.extra["statements"])}:
                break
        else:
            raise InputError(
                f"task {self.name}: joins: no puzzle with {self.joins} alone was found"
            )
        extra = {**problem.extra, "names": tuple(NAMES[: self.people])}
        answer = roles_text(extra["names"], extra["solution"])
        prompt = prompt_text(extra["statements"])
        return content, replace(problem, prompt=prompt, answer=answer, extra=extra)

    def worked(self, problem: Problem) -> str:
        """The worlds up to the solution, then the answer."""
        names, solution = problem.extra["names"], tuple(problem.extra["solution"])
        parts = []
        for world in worlds(len(names)):
            told = speakers(problem, world)
            parts.append(f"{roles_text(names, world)}>{roles_text(names, told)}")
            if world == solution:
                break
        return f"{';'.join(parts)}#{problem.answer}"

    def grade(self, problem: Problem, completion: str) -> Score:
        right = self.stated(problem, completion) == tuple(problem.extra["solution"])
        return scored(float(right), "" if right else "a role is wrong, missing or unreadable")

    def verdicts(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Score]:
        return self.grades(problems, completions)

    def stated(self, problem: Problem, completion: str) -> Roles | None:
        """Everyone's role behind the only `#`, True = knight, or None."""
        _, mark, answer = completion.partition("#")
        return read_roles(answer, problem.extra["names"]) if mark else None

    def reward_spec(self) -> RewardSpec:
        right = lambda completion, problem: self.grade(problem, completion).value == 1.0  # noqa: E731
        case = Case(1.0, "the part behind the only mark gives everyone's true role", right)
        return RewardSpec((Part("answer", (case, Case(0.0))),))

    def steps(self, problem: Problem, completion: str) -> list[Step]:
        """The worlds; everything from `#` on is the last step."""
        names, (thinking, mark, _) = problem.extra["names"], completion.partition("#")
        steps, final = [], None
        expected: Roles | None = (True,) * len(names)
        for part in parts_of(thinking):
            match = PART.fullmatch(thinking[part.start : part.end])
            world = read_roles(match[1], names) if match else None
            told = read_roles(match[2], names) if match else None
            right = world is not None and world == expected and told == speakers(problem, world)
            steps.append(Step(part.start, part.end, float(right)))
            final = world if world == told else None
            expected = None if world is None or final else behind(world)
        if mark:
            right = final is not None and self.stated(problem, completion) == final
            steps.append(Step(len(thinking), len(completion), float(right)))
        return steps

    def prefix_correct(self, problem: Problem, completion: str) -> float:
        expected = self.worked(problem).count(">") + 1
        return leading_share(self.steps(problem, completion), expected)

    def thinking(self, problem: Problem, completion: str) -> str:
        return completion.partition("#")[0]
