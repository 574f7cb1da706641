"""Asking people: the steps a reward model is least sure of go to a file, their answers come back.

A question is a row with the prompt, the steps before, the step, the model's score and `answer`:
null until somebody writes true or false there (or a number in [0, 1]). Read back, an answer becomes
the label of its step; the other steps keep the label they had, or the model's score. Questions
without an answer are left open. A step whose text differs from the one asked about is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reasonrl.prm import Scored
from reasonrl.records import InputError
from reasonrl.rows import brief, read_rows
from reasonrl.stepwise import Trace


def questions(
    traces: Sequence[Trace], scores: Sequence[Scored], count: int
) -> list[dict[str, Any]]:
    """The `count` steps whose scores are nearest to one half, the least sure first; fewer where
    there are fewer scored steps."""
    found = [
        (abs(value - 0.5), i, s)
        for i, scored in enumerate(scores)
        for s, value in enumerate(scored.steps)
    ]
    out = []
    for _, i, s in sorted(found)[:count]:
        trace = traces[i]
        row: dict[str, Any] = {"id": trace.id, "step": s, "prompt": trace.prompt}
        row |= {"before": list(trace.steps[:s]), "text": trace.steps[s]}
        out.append(row | {"score": scores[i].steps[s], "answer": None})
    return out


def answered(
    traces: Sequence[Trace], scores: Sequence[Scored], path: str | Path
) -> tuple[list[Trace], int]:
    """The traces with at least one answer, labelled; and how many questions are still open."""
    where = {trace.id: i for i, trace in enumerate(traces)}
    given: dict[int, dict[int, float]] = {}
    open_questions = 0
    for number, row in read_rows(path):
        i, s = _asked(row, where, traces, f"{path}: row {number}")
        answer = row.get("answer")
        if answer is None:
            open_questions += 1
            continue
        if not isinstance(answer, bool | int | float) or not 0 <= answer <= 1:
            raise InputError(
                f"{path}: row {number}: field 'answer': expected true, false or a number in 0..1,"
                f" got {brief(answer)}"
            )
        given.setdefault(i, {})[s] = float(answer)
    out = []
    for i, known in sorted(given.items()):
        labels = list(traces[i].labels or scores[i].steps)
        if len(labels) != len(traces[i].steps):
            raise InputError(
                f"{traces[i].where}: its other steps have no score ({scores[i].reason})"
            )
        for s, value in known.items():
            labels[s] = value
        out.append(replace(traces[i], labels=labels, boolean=set(labels) <= {0.0, 1.0}))
    return out, open_questions


def _asked(
    row: Mapping[str, Any], where: Mapping[str, int], traces: Sequence[Trace], place: str
) -> tuple[int, int]:
    """Which trace and step a question is about."""
    key, s = str(row.get("id")), row.get("step")
    if key not in where:
        raise InputError(f"{place}: field 'id': no such trace in the data: {key!r}")
    steps = traces[where[key]].steps
    if type(s) is not int or not 0 <= s < len(steps):
        raise InputError(f"{place}: field 'step': expected 0..{len(steps) - 1}, got {brief(s)}")
    if row.get("text") != steps[s]:
        got = brief(row.get("text"))
        raise InputError(f"{place}: field 'text': expected {brief(steps[s])}, got {got}")
    return where[key], s
