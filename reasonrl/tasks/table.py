"""The table of built-in tasks, and a task from its name (or data file) and knobs."""

from __future__ import annotations

import difflib
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from reasonrl.records import InputError
from reasonrl.tasks.arithmetic import Arithmetic
from reasonrl.tasks.base import Task
from reasonrl.tasks.charts import Charts
from reasonrl.tasks.code import Code
from reasonrl.tasks.guesses import Guesses
from reasonrl.tasks.gym import Gym
from reasonrl.tasks.jsonl import Jsonl, is_data_file
from reasonrl.tasks.judging import Judging
from reasonrl.tasks.knights import Knights
from reasonrl.tasks.knights_compact import KnightsCompact
from reasonrl.tasks.marks import KnightsMarks, Marks

TASKS: dict[str, type[Task]] = {
    "arithmetic": Arithmetic,
    "knights": Knights,
    "knights_compact": KnightsCompact,
    "charts": Charts,
    "code": Code,
    "gym": Gym,
    "judging": Judging,
    "marks": Marks,
    "guesses": Guesses,
    "knights_marks": KnightsMarks,
}


def make_task(name: str, *, seed: int = 0, **options: Any) -> Task:
    """A task by built-in name, or from a data file by its path.

    Unknown names and options are an InputError with the nearest known one; so are wrong types.
    """
    if is_data_file(name):
        return Jsonl(seed=seed, path=name, **_checked(Jsonl, name, options))
    if name not in TASKS:
        near = difflib.get_close_matches(name, TASKS, 1, 0.5)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(
            f"task: unknown task {name!r}{hint} (known: {', '.join(sorted(TASKS))}, "
            f"or a .jsonl, .json or .parquet file)"
        )
    kind = TASKS[name]
    return kind(seed=seed, **_checked(kind, name, options))


def _checked(kind: type[Task], name: str, options: dict[str, Any]) -> dict[str, Any]:
    """The options, each of its declared type."""
    hints = get_type_hints(kind)
    knobs = [f.name for f in fields(kind) if f.init and f.name not in ("seed", "path")]
    out = {}
    for key, value in options.items():
        if key not in knobs:
            near = difflib.get_close_matches(key, knobs, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise InputError(
                f"task {name}: unknown option {key!r}{hint} (known: {', '.join(knobs)})"
            )
        adapter = TypeAdapter(hints[key], config=ConfigDict(strict=True))
        try:
            out[key] = adapter.validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise InputError(f"task {name}: {key}: {reason}, got {value!r}") from None
    return out
