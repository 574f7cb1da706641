"""Judged answers in Libra Bench's format (arXiv 2507.21645): a question, a response, its label.

Fields: index, question, response, label (0 or 1), model, reference, subset, response_with_cot; ours
beside them: check, a judgement by rule up to its verdict, where a task can write one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reasonrl.records import InputError
from reasonrl.rows import Refused, brief, field_of, read_rows


@dataclass(frozen=True)
class Case:
    """One row of a judging benchmark."""

    index: str
    question: str
    response: str
    with_cot: str
    label: int
    model: str
    subset: str
    check: str | None = None  # a judgement by rule, up to its verdict


def read_cases(path: str | Path) -> list[Case]:
    """The rows of a file in Libra Bench's format; InputError names row and field."""
    out = []
    for number, row in read_rows(path):
        try:
            out.append(case_of(row, number))
        except Refused as error:
            raise InputError(f"{path}: row {number}: {error}") from None
    return out


def case_of(row: Mapping[str, Any], number: int = 0) -> Case:
    """One row; Refused says which field is wrong."""
    texts = {}
    for name in ("question", "response"):
        texts[name] = field_of(row, name, str, "a string")
        if not texts[name] or not texts[name].strip():
            raise Refused(
                f"field {name!r}: expected some text, got {brief(texts[name])}; `reasonrl judge"
                " data` writes such rows"
            )
    label = row.get("label")
    if label not in (0, 1):
        raise Refused(f"field 'label': expected 0 or 1, got {brief(label)}")
    return Case(
        index=str(row.get("index", number)),
        question=texts["question"],
        response=texts["response"],
        with_cot=field_of(row, "response_with_cot", str, "a string") or texts["response"],
        label=int(label),
        model=str(row.get("model", "unknown")),
        subset=str(row.get("subset", "all")),
        check=field_of(row, "check", str, "a string"),
    )
