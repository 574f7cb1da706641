"""Statements of Knights and Knaves as nested tuples: truth, solutions, random draws, wording.

    ("telling-truth", i)  ("lying", i)  ("not", s)  ("and"|"or"|"implies"|"iff", s, s, ...)

Person i is truthful or not; a puzzle says for everyone: truthful(i) <-> statement(i). A statement's
truth over all 2^n worlds is one integer, bit w for the world w whose bit i is truthful(i), so brute
force is a handful of integer operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations
from typing import Any

from reasonrl.records import InputError
from reasonrl.tasks.base import Draws

Statement = tuple  # nested, see above
LEAVES = ("telling-truth", "lying")
ARITY = {"not": (1, 1), "and": (2, 8), "or": (2, 8), "implies": (2, 2), "iff": (2, 2)}
ALIASES = {"->": "implies", "<=>": "iff", "T": "telling-truth", "L": "lying"}


def canonical(statement: Any, people: int) -> Statement:
    """A statement with lists made tuples and other names for the connectives replaced; checked."""
    if not isinstance(statement, list | tuple) or not statement:
        raise InputError(f"puzzle: expected a statement as a nested tuple, got {statement!r}")
    head = ALIASES.get(statement[0], statement[0]) if isinstance(statement[0], str) else None
    rest = statement[1:]
    if head in LEAVES:
        if len(rest) != 1 or type(rest[0]) is not int or not 0 <= rest[0] < people:
            raise InputError(f"puzzle: expected a person 0 to {people - 1}, got {statement!r}")
        return (head, rest[0])
    if head not in ARITY or not ARITY[head][0] <= len(rest) <= ARITY[head][1]:
        raise InputError(f"puzzle: expected a known connective and its parts, got {statement!r}")
    return (head, *(canonical(part, people) for part in rest))


@lru_cache(maxsize=16)
def _truthful(people: int) -> tuple[int, tuple[int, ...]]:
    """The set of all worlds, and for each person the worlds in which they are truthful."""
    worlds = range(1 << people)
    masks = tuple(sum(1 << w for w in worlds if w >> i & 1) for i in range(people))
    return (1 << (1 << people)) - 1, masks


def worlds_where(statement: Statement, people: int) -> int:
    """The worlds in which a statement is true, as a bit set."""
    everything, truthful = _truthful(people)
    return _worlds(statement, everything, truthful)


def _worlds(statement: Statement, everything: int, truthful: tuple[int, ...]) -> int:
    head = statement[0]
    if head == "telling-truth":
        return truthful[statement[1]]
    if head == "lying":
        return everything ^ truthful[statement[1]]
    parts = [_worlds(part, everything, truthful) for part in statement[1:]]
    out = parts[0]
    if head == "not":
        return everything ^ out
    for part in parts[1:]:
        if head == "and":
            out &= part
        elif head == "or":
            out |= part
        elif head == "implies":
            out = (everything ^ out) | part
        else:
            out = everything ^ out ^ part
    return out


def solutions(statements: Sequence[Statement]) -> list[tuple[bool, ...]]:
    """Every assignment of truthfulness under which exactly the truthful people speak the truth."""
    people = len(statements)
    everything, truthful = _truthful(people)
    left = everything
    for person, statement in enumerate(statements):
        left &= everything ^ truthful[person] ^ _worlds(statement, everything, truthful)
    found = []
    while left:
        world = (left & -left).bit_length() - 1
        found.append(tuple(bool(world >> i & 1) for i in range(people)))
        left &= left - 1
    return found


def partial_truth(statement: Statement, known: Sequence[bool]) -> bool | None:
    """A statement's truth when only the first len(known) people are known; None = still open."""
    head = statement[0]
    if head in LEAVES:
        if statement[1] >= len(known):
            return None
        return known[statement[1]] == (head == "telling-truth")
    parts = [partial_truth(part, known) for part in statement[1:]]
    if head == "not":
        return None if parts[0] is None else not parts[0]
    if head == "iff":
        return None if None in parts else parts[0] == parts[1]
    if head == "implies":
        parts = [None if parts[0] is None else not parts[0], parts[1]]
    decisive = head != "and"  # one true part decides an "or", one false part an "and"
    if decisive in parts:
        return decisive
    return None if None in parts else not decisive


def draw_statement(draws: Draws, speaker: int, people: int, depth: int, width: int) -> Statement:
    """A random statement of at most `depth` levels (a leaf is one) and `width` parts a level.

    A bare statement about the speaker's own truthfulness is empty or a contradiction and not drawn.
    """
    while True:
        statement = _draw(draws, people, depth, width)
        if statement[0] not in LEAVES or statement[1] != speaker:
            return statement


def _draw(draws: Draws, people: int, depth: int, width: int) -> Statement:
    kinds = ["leaf"]
    if depth > 1:
        kinds += ["not", "and", "or", "implies", "iff"] if width > 1 else ["not"]
    kind = draws.choice(kinds)
    if kind == "leaf":
        return draw_leaf(draws, people)
    if kind == "not":
        return ("not", _draw(draws, people, depth - 1, width))
    most = min(width, people, ARITY[kind][1])
    count = draws.between(2, most) if most > 2 else 2
    while True:
        parts = tuple(_draw(draws, people, depth - 1, width) for _ in range(count))
        apart = {part[1] if part[0] in LEAVES else part for part in parts}
        if len(apart) == count:  # no two bare claims about one person
            return (kind, *parts)


def draw_leaf(draws: Draws, people: int) -> Statement:
    return (draws.choice(LEAVES), draws.below(people))


def wording(statement: Statement, names: Sequence[str], true_word: str, false_word: str) -> str:
    """A statement in English; the words are the roles of the truthful and of the liars."""
    head = statement[0]
    if head in LEAVES:
        return f"{names[statement[1]]} is a {true_word if head == 'telling-truth' else false_word}"
    told = [wording(part, names, true_word, false_word) for part in statement[1:]]
    simple = [part[0] in LEAVES for part in statement[1:]]
    parts = [t if plain else f"({t})" for t, plain in zip(told, simple, strict=True)]
    if head == "not":
        return f"it is not the case that {parts[0]}"
    if head == "implies":
        return f"if {parts[0]} then {parts[1]}"
    return {"and": " and ", "or": " or ", "iff": " if and only if "}[head].join(parts)


def identity(statements: Sequence[Statement]) -> str:
    """A text that two puzzles share when only the names differ, up to 4 people also the order."""
    people = range(len(statements))
    if len(statements) > 4:  # so many that a chance meeting of two orders is out of the question
        return repr(tuple(statements))
    orders = [(order, dict(zip(order, people, strict=True))) for order in permutations(people)]
    return min(
        repr(tuple(renumbered(statements[old], place) for old in order)) for order, place in orders
    )


def renumbered(statement: Statement, place: dict[int, int]) -> Statement:
    """The statement with person i called place[i]."""
    if statement[0] in LEAVES:
        return (statement[0], place[statement[1]])
    return (statement[0], *(renumbered(part, place) for part in statement[1:]))


def with_other_leaf(draws: Draws, statement: Statement, people: int) -> Statement:
    """The statement with one of its claims, drawn at random, replaced by another."""
    if statement[0] in LEAVES:
        while True:
            leaf = draw_leaf(draws, people)
            if leaf != statement:
                return leaf
    at = 1 + draws.below(len(statement) - 1)
    changed = with_other_leaf(draws, statement[at], people)
    return (*statement[:at], changed, *statement[at + 1 :])
