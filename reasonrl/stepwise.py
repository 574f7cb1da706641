"""Traces: a prompt and its answer cut into steps, with a label for each step where it is known.

A row is `prompt`, `completions` (the steps, in order), `labels` (bool or a number in [0, 1] each)
and optionally `final` (the label of the whole), `id` and anything else; this is the stepwise format
of TRL. Rows that are to be scored may bring one string `completion` in place of the steps, with its
spans in `steps` (a run's completions table) or to be cut at a delimiter. Rows of Math-Shepherd and
PRM800K are read as they are published (stepwise_formats.py).
    for trace in read_traces("rows.jsonl"): trace.steps, trace.labels
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reasonrl import keys
from reasonrl.records import InputError, Message
from reasonrl.redact import Redact, redacted
from reasonrl.rows import Refused, brief, clean, field_of, prompt_of, read_rows
from reasonrl.segment import split_steps
from reasonrl.stepwise_formats import stepwise

logger = keys.logger("reasonrl")
OWN = ("id", "prompt", "completions", "completion", "steps", "labels", "final")


@dataclass(frozen=True)
class Trace:
    """One answer in steps; `where` names the row it came from in error messages."""

    id: str
    prompt: str | Sequence[Message]
    steps: Sequence[str]  # S texts; end to end they are the completion
    labels: Sequence[float] | None = None  # S, in [0, 1]
    final: float | None = None  # of the whole answer, in [0, 1]
    boolean: bool = False  # whether the labels are yes or no
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def text(self) -> str:
        return "".join(self.steps)


def read_traces(
    path: str | Path,
    *,
    labelled: bool = True,
    delimiter: str = "\n",
    redact: Redact | None = None,
) -> list[Trace]:
    """The traces of a file in order; InputError names the row and the field of the first fault.

    labelled: every row must have labels. delimiter: where a plain `completion` is cut. redact: run
    on every text of a row as soon as it is read.
    """
    path = Path(path)
    seen: dict[str, int] = {}
    traces = []
    empty: list[int] = []
    for number, row in read_rows(path):
        where = f"{path}: row {number}"
        try:
            known = stepwise(redacted(row, redact))
            if known is None:
                empty.append(number)
                continue
            trace = trace_of(known, f"{path.stem}-{number}", labelled, delimiter, where)
        except Refused as error:
            raise InputError(f"{where}: {error}") from None
        if trace.id in seen:
            raise InputError(
                f"{where}: field 'id': expected a new one, got {trace.id!r} as in row"
                f" {seen[trace.id]}"
            )
        seen[trace.id] = number
        traces.append(trace)
    if empty:
        logger.warning("%s: %d rows hold no rated step (row %d ...)", path, len(empty), empty[0])
    return traces


def trace_of(
    row: Mapping[str, Any], default_id: str, labelled: bool, delimiter: str, where: str = ""
) -> Trace:
    """One row as a trace; Refused says which field is wrong."""
    own = row.get("id")
    if own is not None and (isinstance(own, bool) or not isinstance(own, str | int)):
        raise Refused(f"field 'id': expected a string or an integer, got {brief(own)}")
    steps = _steps(row, delimiter)
    labels, boolean = _labels(row, len(steps))
    if labelled and labels is None:
        raise Refused(
            "field 'labels': expected one label for each step, got nothing (`reasonrl prm label`"
            " writes such rows)"
        )
    final = row.get("final")
    return Trace(
        id=default_id if own is None else str(own),
        prompt=prompt_of(row),
        steps=steps,
        labels=labels,
        final=None if final is None else _share("final", final),
        boolean=boolean,
        extra={key: value for key, value in row.items() if key not in OWN},
        where=where or default_id,
    )


def write_rows(path: str | Path, rows: Iterable[Mapping[str, Any]]) -> int:
    """Rows as JSONL, the file all at once or not at all; how many there were."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.tmp")
    count = 0
    with aside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n")
            count += 1
    aside.replace(path)
    return count


def trace_row(trace: Trace) -> dict[str, Any]:
    """A trace as a row that `read_traces` reads back; what is unknown is left out."""
    row: dict[str, Any] = {"id": trace.id, "prompt": _plain(trace.prompt)}
    row["completions"] = list(trace.steps)
    if trace.labels is not None:
        row["labels"] = [x >= 0.5 if trace.boolean else x for x in trace.labels]
    if trace.final is not None:
        row["final"] = trace.final
    return row | dict(trace.extra)


def _plain(prompt: str | Sequence[Message]) -> Any:
    return prompt if isinstance(prompt, str) else [dict(message) for message in prompt]


def _steps(row: Mapping[str, Any], delimiter: str) -> list[str]:
    steps = field_of(row, "completions", list, "a list of steps")
    if steps is None:
        return _cut(row, delimiter)
    if not steps:
        raise Refused("field 'completions': expected at least one step, got an empty list")
    for i, step in enumerate(steps):
        if not isinstance(step, str) or not step.strip():
            raise Refused(f"field 'completions': step {i}: expected some text, got {brief(step)}")
        clean("completions", step)
    return steps


def _cut(row: Mapping[str, Any], delimiter: str) -> list[str]:
    """The steps of a row with one text: by its own spans, or at the delimiter."""
    text = field_of(row, "completion", str, "a string")
    if text is None:
        raise Refused("field 'completions': expected a list of steps, got nothing")
    clean("completion", text)
    spans = field_of(row, "steps", list, "a list of [start, end]")
    if not spans:
        spans = [(s.start, s.end) for s in split_steps(text, delimiter)]
    at = 0
    for i, span in enumerate(spans):
        whole = isinstance(span, list | tuple) and len(span) == 2
        if not whole or not all(type(x) is int for x in span) or span[0] != at:
            raise Refused(f"field 'steps': span {i}: expected [{at}, end], got {brief(span)}")
        if not at < span[1] <= len(text):
            raise Refused(
                f"field 'steps': span {i}: expected an end in {at + 1}..{len(text)}, got {span[1]}"
            )
        at = span[1]
    if at != len(text):
        if not spans:
            raise Refused(f"field 'completion': expected some text, got {brief(text)}")
        raise Refused(f"field 'steps': expected spans up to {len(text)}, got up to {at}")
    return [text[a:b] for a, b in spans]


def _labels(row: Mapping[str, Any], steps: int) -> tuple[list[float] | None, bool]:
    labels = field_of(row, "labels", list, "a list of labels")
    if labels is None:
        return None, False
    if len(labels) != steps:
        raise Refused(f"field 'labels': expected {steps}, one for each step, got {len(labels)}")
    values = [_share(f"labels[{i}]", label) for i, label in enumerate(labels)]
    return values, all(isinstance(label, bool) for label in labels)


def _share(name: str, value: Any) -> float:
    if not isinstance(value, bool | int | float) or not (math.isfinite(value) and 0 <= value <= 1):
        got = brief(value)
        raise Refused(f"field '{name}': expected true, false or a number in 0..1, got {got}")
    return float(value)
