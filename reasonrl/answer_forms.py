"""Answers as numbers, as letters of a choice, as words: what graders compare. Parsed by pattern and
by `Decimal`, never evaluated.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal, InvalidOperation
from fractions import Fraction

NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")
RATIO = re.compile(r"([-+]?[0-9]+)\s*/\s*([0-9]+)")
LETTERS = re.compile(r"\(?([A-Za-z])\)?[.:]?(?:\s*,\s*\(?([A-Za-z])\)?[.:]?)*")
OPTION = re.compile(r"\(?([A-Za-z])(?:\)|[.:])[)]?\s+\S.*", re.DOTALL)  # "B. Paris", "(B) Paris"
LONGEST = 60  # characters of a number that is looked at


def parse_number(text: str) -> Fraction | None:
    """A number as it stands in text (1,234.5  3e-5  -7/2  40%), exactly; None where it is none."""
    text = text.strip().strip("$").strip().rstrip(".")
    if len(text) > LONGEST:
        return None
    text = text.replace("\u2212", "-")
    percent = text.endswith(("%", "\\%"))
    text = text.rstrip("%\\").rstrip()
    if ratio := RATIO.fullmatch(text):
        value = Fraction(int(ratio[1]), int(ratio[2])) if int(ratio[2]) else None
    elif NUMBER.fullmatch(text):
        try:
            value = Fraction(Decimal(text.replace(",", "")))
        except InvalidOperation:
            return None
    else:
        return None
    return value / 100 if value is not None and percent else value


def parse_choice(text: str) -> frozenset[str] | None:
    """The letters of "B", "(b)", "B. Paris" or "A, C"; None where the text is no such thing."""
    text = text.strip().strip("$").strip()
    if option := OPTION.fullmatch(text):
        return frozenset(option[1].upper())
    if not LETTERS.fullmatch(text):
        return None
    return frozenset(re.findall(r"[A-Z]", text.upper()))


def folded(text: str) -> str:
    """Text for comparison: case, width, white space, quotes and end punctuation do not count."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split()).strip("\"'`*$ ").rstrip(".!?,;: ").strip("\"'`*$ ")


def surely_differ(one: str | None, other: str | None, kind: str) -> bool:
    """Whether two gold answers are different for certain: numbers by more than any tolerance, other
    mathematics never."""
    if one is None or other is None:
        return False
    a, b = parse_number(one), parse_number(other)
    if a is not None and b is not None:
        return abs(a - b) > max(abs(a), abs(b)) / 10
    if kind == "choice":
        first, second = parse_choice(one), parse_choice(other)
        return first is not None and second is not None and first != second
    return kind not in ("math", "numerical") and folded(one) != folded(other)
