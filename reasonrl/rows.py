"""Rows of a JSONL, JSON or parquet file, read and checked at the border.

Every fault is one InputError line: "file: row N: field 'x': expected ..., got ...". Rows count
from 1; in JSONL a row is a line, and empty lines count but hold nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from reasonrl.records import InputError


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


def prompt_of(row: Mapping[str, Any]) -> str | list[dict[str, Any]]:
    """The prompt of a row: some text, or chat messages."""
    prompt = row.get("prompt")
    if prompt is None:
        raise Refused("field 'prompt': expected a string or chat messages, got nothing")
    if isinstance(prompt, str):
        clean("prompt", prompt)
        if not prompt.strip():
            raise Refused("field 'prompt': expected some text, got an empty string")
        return prompt
    if not isinstance(prompt, list) or not prompt:
        raise Refused(f"field 'prompt': expected a string or chat messages, got {brief(prompt)}")
    for i, message in enumerate(prompt):
        whole = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not whole or not isinstance(message.get("content"), str | list):
            raise Refused(
                f"field 'prompt': message {i}: expected role and content, got {brief(message)}"
            )
        clean("prompt", json.dumps(message, ensure_ascii=False, default=str))
    return prompt


def field_of(row: Mapping[str, Any], name: str, kind: type, expected: str) -> Any:
    """A field of one type, or None where the row has none."""
    value = row.get(name)
    if value is not None and not isinstance(value, kind):
        raise Refused(f"field {name!r}: expected {expected}, got {brief(value)}")
    return value


def clean(name: str, value: str) -> str:
    """The value, if it is text that can be written down."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise Refused(f"field {name!r}: half a character at {error.start}") from None
    return value


def brief(value: Any) -> str:
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
        raise InputError(f"{where}: expected an object with fields, got {brief(row)}")
    return row


def _parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            rows = pyarrow.parquet.read_table(file).to_pylist()
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path}: not parquet ({reason})") from None
    yield from enumerate(rows, 1)
