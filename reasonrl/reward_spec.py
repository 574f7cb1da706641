"""One object that states a reward in words and computes it, so that text and number cannot drift.

A reward is a sum of parts; a part has cases, the first that applies gives its value; a part may be
gated by an earlier one and then has a fixed value while the gate is closed (MeRF, arXiv 2506.18485,
tells the policy its scoring rules; a gated and a plain sum are the two readings of its text):

    total = sum over parts of ( value of its first case that holds | its closed value )

What could make the text lie is refused when the spec is built: a part without an "otherwise", cases
behind it, one condition with two values, a gate that is no earlier part, digits in the wording.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from reasonrl.records import InputError

Detail = Literal["full", "score", "correctness_only", "adverse"]
DETAILS = ("full", "score", "correctness_only", "adverse")
DIGIT = re.compile(r"[0-9]")


@dataclass(frozen=True)
class Case:
    """A value and when it is given. `holds(completion, problem)`; None = in every other case."""

    value: float
    when: str = "otherwise"
    holds: Callable[[str, Any], bool] | None = None
    short: str = ""  # the condition in the short text


@dataclass(frozen=True)
class Part:
    """One summand. The gate is open when the first case of the part named `gate` applies."""

    name: str
    cases: tuple[Case, ...]
    gate: str | None = None
    closed: float | None = None  # the part's value while the gate is closed


@dataclass(frozen=True)
class RewardSpec:
    """Parts in order. `main`: the part that "correctness_only" keeps (the last one by default)."""

    parts: tuple[Part, ...]
    main: str = ""
    title: str = "How your answer is scored"

    def __post_init__(self) -> None:
        if not self.parts:
            raise InputError("reward spec: expected at least one part, got none")
        if not self.main:
            object.__setattr__(self, "main", self.parts[-1].name)
        names = [part.name for part in self.parts]
        if len(set(names)) != len(names):
            raise InputError(f"reward spec: part names must differ, got {', '.join(names)}")
        if self.main not in names:
            raise InputError(f"reward spec: main: expected one of {names}, got {self.main!r}")
        for i, part in enumerate(self.parts):
            _check_part(part, names[:i])
        _check_conditions(self)
        if DIGIT.search(self.title):
            raise InputError(f"reward spec: the title states a number: {self.title!r}")

    def grade(self, completion: str, problem: Any) -> float:
        """The total of one completion."""
        return _total(self.part_values(completion, problem).values())

    def part_values(self, completion: str, problem: Any) -> dict[str, float]:
        """Every part's value for one completion."""
        first: dict[str, bool] = {}
        values: dict[str, float] = {}
        for part in self.parts:
            chosen = next(
                i for i, c in enumerate(part.cases) if not c.holds or c.holds(completion, problem)
            )
            is_open = part.gate is None or first[part.gate]
            first[part.name] = chosen == 0 and is_open
            values[part.name] = part.cases[chosen].value if is_open else _closed(part)
        return values

    def totals(self) -> tuple[float, ...]:
        """Every reachable total, the highest first."""
        found = set()
        for choice in itertools.product(*(range(len(part.cases)) for part in self.parts)):
            first: dict[str, bool] = {}
            values = []
            for part, chosen in zip(self.parts, choice, strict=True):
                is_open = part.gate is None or first[part.gate]
                first[part.name] = chosen == 0 and is_open
                values.append(part.cases[chosen].value if is_open else _closed(part))
            found.add(_total(values))
        return tuple(sorted(found, reverse=True))

    def render(self, detail: Detail = "full", short: bool = False) -> str:
        """The motivation text.

        full: parts, conditions, numbers and every total. score: the numbers without the conditions.
        correctness_only: the main part alone. adverse: the full text with every value negated.
        short: one line for models of single characters, "q+1 -1>ok+2 no-1.5 -2": the cases of a
        part, `short` before each value; a part behind ">" counts only where the best case of its
        gate holds, one behind ";" always. It leaves out titles, closed values and totals.
        """
        if detail not in DETAILS:
            raise InputError(f"reward spec: detail: expected {', '.join(DETAILS)}, got {detail!r}")
        sign = -1.0 if detail == "adverse" else 1.0
        parts = [p for p in self.parts if detail != "correctness_only" or p.name == self.main]
        if short:
            return _short_text(parts, sign, conditions=detail != "score")
        lines = [f"{self.title}:"]
        for part in parts:
            alone = len(parts) == 1
            lines += _part_lines(part, sign, conditions=detail != "score", gated=not alone)
        if detail != "correctness_only":
            totals = ", ".join(_number(sign * total) for total in self.totals())
            summed = "The total is the sum of the parts. " if len(parts) > 1 else ""
            lines.append(f"{summed}Possible totals: {totals}.")
        return "\n".join(lines)


def _check_part(part: Part, earlier: list[str]) -> None:
    where = f"reward spec: part {part.name!r}"
    if not part.name.strip() or DIGIT.search(part.name):
        raise InputError(f"{where}: expected a name in words without digits")
    if not part.cases or part.cases[-1].holds is not None:
        raise InputError(f"{where}: the last case must hold in every other case (holds=None)")
    for case in part.cases[:-1]:
        if case.holds is None:
            raise InputError(f"{where}: no case can be reached behind {case.when!r}")
    for case in part.cases:
        if not math.isfinite(case.value):
            raise InputError(f"{where}: {case.when!r}: expected a finite value, got {case.value}")
        if not case.when.strip() or DIGIT.search(case.when + case.short):
            raise InputError(f"{where}: a condition in words without digits, got {case.when!r}")
    if (part.gate is None) != (part.closed is None):
        raise InputError(f"{where}: a gate and a closed value come together or not at all")
    if part.gate is not None and part.gate not in earlier:
        known = ", ".join(earlier) or "none"
        raise InputError(f"{where}: gate {part.gate!r} is no earlier part (earlier: {known})")
    if part.closed is not None and not math.isfinite(part.closed):
        raise InputError(f"{where}: expected a finite closed value, got {part.closed}")


def _check_conditions(spec: RewardSpec) -> None:
    """One condition has one value: stated twice with two values, the text contradicts itself."""
    stated: dict[str, tuple[str, float]] = {}
    for part in spec.parts:
        for case in part.cases[:-1]:
            name, value = stated.setdefault(case.when, (part.name, case.value))
            if (name, value) != (part.name, case.value):
                raise InputError(
                    f"reward spec: {case.when!r} has two values: {_number(value, True)} in part "
                    f"{name!r} and {_number(case.value, True)} in part {part.name!r}"
                )
        wordings = [case.when for case in part.cases]
        if len(set(wordings)) != len(wordings):
            raise InputError(f"reward spec: part {part.name!r}: a condition stands twice")


def _part_lines(part: Part, sign: float, conditions: bool, gated: bool) -> list[str]:
    head = part.name[:1].upper() + part.name[1:]
    values = [_number(sign * case.value, True) for case in part.cases]
    closed = _number(sign * _closed(part), True) if part.gate else ""
    if not conditions:
        return [f"* {head}: {', '.join(dict.fromkeys([*values, closed] if closed else values))}"]
    lines = [f"{head}:"]
    if part.gate and gated:
        lines.append(f"* {closed} unless the best score for {part.gate} was reached; if it was:")
    for value, case in zip(values, part.cases, strict=True):
        lines.append(f"* {value} {'' if case.holds is None else 'if '}{case.when}")
    return lines


def _short_text(parts: Sequence[Part], sign: float, conditions: bool) -> str:
    out = ""
    for part in parts:
        for case in part.cases[:-1]:
            if not case.short:
                raise InputError(
                    f"reward spec: part {part.name!r}: {case.when!r} has no short form"
                )
        cases = [
            f"{case.short if conditions else ''}{_number(sign * case.value, True)}"
            for case in part.cases
        ]
        out += f"{'' if not out else '>' if part.gate else ';'}{' '.join(cases)}"
    return out


def _closed(part: Part) -> float:
    assert part.closed is not None
    return part.closed


def _total(values: Any) -> float:
    """The sum, free of binary dust in its tenth decimal, and never -0."""
    return round(math.fsum(values), 10) + 0.0


def _number(value: float, signed: bool = False) -> str:
    value = round(value, 10) + 0.0
    return f"{value:+.10g}" if signed and value else f"{value:.10g}"
