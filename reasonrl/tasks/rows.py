"""Rows of a JSONL, JSON or parquet file, checked at the border.

Every fault is one InputError line: "file: row N: field 'x': expected ..., got ...". Rows count
from 1; in JSONL a row is a line, and empty lines count but hold nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from reasonrl.records import InputError, Problem
from reasonrl.rewards.verify import verify_math

ANSWER_TYPES = ("numerical", "choice", "ocr", "text", "math", "code")
FIELDS = ("id", "prompt", "answer", "answer_type", "task", "images")
NUMBER = re.compile(r"[-+]?(?:[0-9]+(?:,[0-9]{3})*(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][-+]?[0-9]{1,3})?")
RATIO = re.compile(r"([-+]?[0-9]+)\s*/\s*([0-9]+)")
LETTERS = re.compile(r"\(?([A-Za-z])\)?[.:]?(?:\s*,\s*\(?([A-Za-z])\)?[.:]?)*")
OPTION = re.compile(r"\(?([A-Za-z])(?:\)|[.:])[)]?\s+\S.*", re.DOTALL)  # "B. Paris", "(B) Paris"
LONGEST = 60  # characters of a number that is looked at
MATHS = 500  # gold answers that are tried at most when a file is read


class Refused(ValueError):
    """What a field holds and what it should: the end of the error line."""


def read_rows(path: str | Path) -> list[tuple[int, dict[str, Any]]]:
    """(row number, fields) of every row; InputError where the file is not what its name says."""
    path = Path(path)
    try:
        rows = list(_parquet(path) if path.suffix == ".parquet" else _json(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None
    if not rows:
        raise InputError(f"{path}: expected at least one row, got an empty file")
    return rows


def read_problems(path: str | Path) -> list[Problem]:
    """The problems of a data file in order; ids are the rows' own or "<file>-<row number>"."""
    path = Path(path)
    seen: dict[str, int] = {}
    problems = []
    for number, row in read_rows(path):
        try:
            problem = _problem(row, path, f"{path.stem}-{number}")
        except Refused as error:
            raise InputError(f"{path}: row {number}: {error}") from None
        if problem.id in seen:
            raise InputError(
                f"{path}: row {number}: field 'id': expected a new one, "
                f"got {problem.id!r} as in row {seen[problem.id]}"
            )
        seen[problem.id] = number
        problems.append(problem)
    _check_maths(path, problems, seen)
    return problems


def _check_maths(path: Path, problems: list[Problem], rows: Mapping[str, int]) -> None:
    """InputError for the first gold answer that the verifier cannot read.

    Plain numbers need no look, and of very many others only some get one: the rest turn up as
    unscorable when they are graded.
    """
    gold = [(p.answer, rows[p.id]) for p in problems if p.answer_type == "math" and p.answer]
    gold = [(answer, row) for answer, row in gold if parse_number(answer) is None]
    gold = gold[:: 1 + len(gold) // MATHS]
    answers = [answer for answer, _ in gold]
    for (answer, row), score in zip(gold, verify_math(answers, answers), strict=True):
        if score.kind == "unscorable":
            raise InputError(
                f"{path}: row {row}: field 'answer': expected mathematics, got {_brief(answer)}"
            )


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


def _problem(row: Mapping[str, Any], path: Path, default_id: str) -> Problem:
    kind = _field(row, "answer_type", str, "a string") or "text"
    if kind not in ANSWER_TYPES:
        raise Refused(f"field 'answer_type': expected {', '.join(ANSWER_TYPES)}, got {kind!r}")
    images = _field(row, "images", list, "a list of paths") or []
    own = row.get("id")
    if own is not None and (isinstance(own, bool) or not isinstance(own, str | int)):
        raise Refused(f"field 'id': expected a string or an integer, got {_brief(own)}")
    return Problem(
        id=default_id if own is None else str(own),
        prompt=_prompt(row),
        answer=_answer(row, kind),
        answer_type=kind,
        task=_field(row, "task", str, "a string") or "jsonl",
        images=tuple(_image(image, path.parent) for image in images),
        extra={key: value for key, value in row.items() if key not in FIELDS},
    )


def _prompt(row: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    prompt = row.get("prompt")
    if prompt is None:
        raise Refused("field 'prompt': expected a string or chat messages, got nothing")
    if isinstance(prompt, str):
        _text("prompt", prompt)
        if not prompt.strip():
            raise Refused("field 'prompt': expected some text, got an empty string")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise Refused(f"field 'prompt': expected a string or chat messages, got {_brief(prompt)}")
    for i, message in enumerate(prompt):
        whole = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not whole or not isinstance(message.get("content"), str | list):
            raise Refused(
                f"field 'prompt': message {i}: expected role and content, got {_brief(message)}"
            )
        _text("prompt", json.dumps(message, ensure_ascii=False, default=str))
    return prompt


def _answer(row: Mapping[str, Any], kind: str) -> str | None:
    answer = row.get("answer")
    if answer is None:
        if kind in ("numerical", "choice"):
            raise Refused(f"field 'answer': expected a {kind} answer, got nothing")
        return None
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise Refused(f"field 'answer': expected a string or a number, got {_brief(answer)}")
    text = _text("answer", str(answer))
    if kind != "code" and not text.strip():
        raise Refused("field 'answer': expected some text, got an empty string")
    if kind == "numerical" and parse_number(text) is None:
        raise Refused(f"field 'answer': expected a number, got {_brief(answer)}")
    if kind == "choice" and parse_choice(text) is None:
        raise Refused(f"field 'answer': expected letters such as B or A, C, got {_brief(answer)}")
    if kind == "math" and text.count("{") != text.count("}"):
        raise Refused(f"field 'answer': expected closed braces, got {_brief(answer)}")
    return text


def _image(image: Any, folder: Path) -> str:
    """The path of an image, inside the data folder even after following links."""
    if not isinstance(image, str) or not image or "\0" in image:
        raise Refused(f"field 'images': expected a path, got {_brief(image)}")
    root = folder.resolve()
    target = (root / image).resolve()
    if Path(image).is_absolute() or not target.is_relative_to(root):
        raise Refused(f"field 'images': expected a path inside {folder}, got {_brief(image)}")
    if not target.is_file():
        raise Refused(f"field 'images': expected a file, got {_brief(image)}, which is none")
    return str(target)


def _field(row: Mapping[str, Any], name: str, kind: type, expected: str) -> Any:
    value = row.get(name)
    if value is not None and not isinstance(value, kind):
        raise Refused(f"field {name!r}: expected {expected}, got {_brief(value)}")
    return value


def _text(name: str, value: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(f"field {name!r}: half a character at {error.start}") from None
    return value


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _json(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    if path.suffix == ".json":
        rows = _parsed(path.read_bytes(), str(path))
        if not isinstance(rows, list):
            raise InputError(f"{path}: expected a list of rows, got {type(rows).__name__}")
        for number, row in enumerate(rows, 1):
            yield number, _object(row, f"{path}: row {number}")
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                where = f"{path}: row {number}"
                yield number, _object(_parsed(line, where), where)


def _parsed(data: bytes, where: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"), object_pairs_hook=_once)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 (byte {error.start})") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from None
    except Refused as error:
        raise InputError(f"{where}: {error}") from None
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else "a number too long"
        raise InputError(f"{where}: not JSON ({reason})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
        raise Refused(f"field {twice!r}: stands twice")
    return out


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: expected an object with fields, got {_brief(row)}")
    return row


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not parquet ({reason})") from None
    yield from enumerate(rows, 1)
