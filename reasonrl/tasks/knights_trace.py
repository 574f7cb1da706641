"""A worked solution of a puzzle as a depth-first search, and the rule that checks it line by line.

    Suppose Ada is a knight: possible.
    Suppose Ada is a knight, Boris is a knight: contradiction.
    Suppose Ada is a knight, Boris is a knave: possible.

A supposition is a contradiction when the people supposed so far already decide a statement
against its speaker. After "possible" the next person is supposed a knight; after "contradiction"
the last knight becomes a knave. A line is right when it supposes what the line *written* before
calls for and its verdict is true, so one slip costs one line. Everything from </think> on is the
last step.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from reasonrl.records import Step
from reasonrl.segment import split_steps
from reasonrl.tasks.knights_logic import partial_truth

if TYPE_CHECKING:
    from reasonrl.tasks.knights import Puzzle

LINE = re.compile(r"Suppose (.+): (possible|contradiction)\.")
Roles = tuple[bool, ...]  # the first people's roles, True = knight


def search(puzzle: Puzzle) -> list[tuple[Roles, bool]]:
    """Every supposition of the search with its verdict, True = possible."""
    lines: list[tuple[Roles, bool]] = []
    roles: Roles | None = (True,)
    while roles is not None:
        possible = _possible(puzzle, roles)
        lines.append((roles, possible))
        roles = _next(roles, possible, len(puzzle.names))
    return lines


def worked(puzzle: Puzzle) -> str:
    """The search as text, then the answer."""
    lines = [
        f"Suppose {_supposed(puzzle.names, roles)}: {'possible' if possible else 'contradiction'}."
        for roles, possible in search(puzzle)
    ]
    thinking = "\n".join(["<think>", *lines, "</think>"])
    return f"{thinking}\n<answer>\n{answer_text(puzzle.names, puzzle.solution)}\n</answer>"


def answer_text(names: Sequence[str], roles: Roles) -> str:
    return "\n".join(f"({i + 1}) {_one(name, roles[i])}" for i, name in enumerate(names))


def check(puzzle: Puzzle, completion: str, stated: Roles | None) -> list[Step]:
    """Steps with reward 1 or 0. `stated`: the roles in a well-formed answer, else None."""
    close = completion.find("</think>")
    thinking = completion if close < 0 else completion[:close]
    spans = split_steps(thinking)
    if len(spans) > 1 and thinking[: spans[0].end].strip() == "<think>":
        spans[:2] = [Step(0, spans[1].end)]
    steps = []
    expected: Roles | None = (True,)
    final: Roles | None = None
    for span in spans:
        line = thinking[span.start : span.end].removeprefix("<think>").strip("\n")
        roles, verdict = _read(line, puzzle.names)
        right = roles is not None and roles == expected and verdict == _possible(puzzle, roles)
        steps.append(Step(span.start, span.end, float(right)))
        expected = None if roles is None else _next(roles, verdict, len(puzzle.names))
        final = roles if roles and verdict and len(roles) == len(puzzle.names) else None
    if close >= 0:
        right = final is not None and stated == final
        steps.append(Step(close, len(completion), float(right)))
    return steps


def _read(line: str, names: Sequence[str]) -> tuple[Roles | None, bool]:
    """The supposition and verdict of a line, or None where it is not one."""
    match = LINE.fullmatch(line)
    parts = match[1].split(", ") if match else []
    if not match or not 1 <= len(parts) <= len(names):
        return None, False
    roles = []
    for name, part in zip(names, parts, strict=False):
        if part not in (_one(name, True), _one(name, False)):
            return None, False
        roles.append(part == _one(name, True))
    return tuple(roles), match[2] == "possible"


def _next(roles: Roles, possible: bool, people: int) -> Roles | None:
    """What to suppose next; None when the search has ended."""
    if possible:
        return None if len(roles) == people else (*roles, True)
    left = list(roles)
    while left and not left[-1]:
        left.pop()
    return (*left[:-1], False) if left else None


def _possible(puzzle: Puzzle, roles: Roles) -> bool:
    truthful = [knight != puzzle.flipped for knight in roles]
    return all(
        partial_truth(puzzle.statements[i], truthful) in (None, truthful[i])
        for i in range(len(truthful))
    )


def _supposed(names: Sequence[str], roles: Roles) -> str:
    return ", ".join(_one(name, knight) for name, knight in zip(names, roles, strict=False))


def _one(name: str, knight: bool) -> str:
    return f"{name} is a {'knight' if knight else 'knave'}"
