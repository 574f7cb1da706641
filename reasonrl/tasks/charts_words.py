"""The questions of the charts task: how they are put, what they need, what follows from numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

NAMES = {
    "r": "red", "g": "green", "b": "blue", "y": "yellow", "c": "cyan", "m": "magenta",
    "w": "width", "h": "height",
}  # fmt: skip
ASKED = {  # kind: what may be asked
    "bars": ("value", "max", "min", "sum", "minus"),
    "count": ("value", "sum", "minus"),
    "compare": ("more",),
    "box": ("per", "area"),
}
COMPACT = {"value": "{0}:", "minus": "{0}-{1}:", "more": "{0}?{1}:"}  # the others: their own names
ABOUT = {
    "bars": "Every bar is a whole number of cells high; the picture is 8 cells high. ",
    "count": "The picture shows coloured shapes. ",
    "compare": "The picture shows coloured shapes. ",
    "box": "The picture shows a filled rectangle on a grid of 8 by 8 cells. ",
}
WORDS = {
    ("bars", "value"): "How high is the {0} bar?",
    ("bars", "max"): "How high is the highest bar?",
    ("bars", "min"): "How high is the lowest bar?",
    ("bars", "sum"): "How high are all bars together?",
    ("bars", "minus"): "By how many cells is the {0} bar higher than the {1} one?",
    ("count", "value"): "How many shapes are {0}?",
    ("count", "sum"): "How many shapes are there?",
    ("count", "minus"): "How many more {0} than {1} shapes are there?",
    ("compare", "more"): "Are there more {0} or more {1} shapes? Answer with the colour.",
    ("box", "per"): "What is its perimeter, in cells?",
    ("box", "area"): "What is its area, in cells?",
}
HOW = (
    " Think between <think> and </think>: write what you read off as 'name: number', a line each,"
    " then every calculation as 'a + b = c'. Then give the answer between <answer> and </answer>."
)


Link = tuple[int | None, str, int | None]  # left, operation, right; None: the result before


class Question(NamedTuple):
    ask: str  # one of ASKED
    letters: tuple[str, ...]  # what must be read off to answer it, in the order of the question


def question_text(kind: str, question: Question, style: str) -> str:
    if style == "compact":
        return COMPACT.get(question.ask, f"{question.ask}:").format(*question.letters)
    names = [NAMES[letter] for letter in question.letters]
    return ABOUT[kind] + WORDS[kind, question.ask].format(*names) + HOW


def links(question: Question, values: Mapping[str, int]) -> list[Link]:
    """The calculations that lead to the answer, on values in the order in which they were
    written."""
    written = list(values.values())
    if question.ask == "sum":
        return [(written[0], "+", written[1]), *((None, "+", value) for value in written[2:])]
    if question.ask == "minus":
        return [(values[question.letters[0]], "-", values[question.letters[1]])]
    if question.ask == "area":
        return [(written[0], "*", written[1])]
    if question.ask == "per":
        return [(written[0], "+", written[1]), (None, "+", None)]
    return []


def operands(link: Link, before: int | None) -> tuple[int, str, int]:
    """A calculation with the result before put in."""
    left, op, right = link
    if before is None:
        assert left is not None and right is not None
        return left, op, right
    return before if left is None else left, op, before if right is None else right


def apply(left: int, op: str, right: int) -> int:
    return left + right if op == "+" else left - right if op == "-" else left * right


def answer(question: Question, values: Mapping[str, int], result: int | None) -> str | None:
    """What follows from the values and the last calculation's result, as text; None where nothing
    does (as many of one colour as of the other)."""
    if result is not None:
        return str(result)
    numbers = [values[letter] for letter in question.letters]
    if question.ask in ("max", "min"):
        return str(max(numbers) if question.ask == "max" else min(numbers))
    if question.ask == "more":
        first, second = numbers
        return None if first == second else question.letters[first < second]
    return str(numbers[0])
