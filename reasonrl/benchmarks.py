"""Evaluation of process reward models in two benchmarks' own formats, from local JSONL files.

ProcessBench (arXiv 2412.06559): `problem`, `steps`, `label` = the first wrong step or -1. A model
points at the first step whose score is below a threshold. F1 is the harmonic mean of the accuracy
on wrong and on right solutions; the threshold is the best on a half of the rows chosen by a hash
of their ids and the figures are those of the other half.
PRMBench (arXiv 2501.03124): `question`, `modified_process` and `error_steps` (counted from 1). The
PRMScore is the mean of the F1 of right and of wrong steps at threshold 0.5, per class and overall.
Both come with a calibration table: mean score against share of right steps, in tenths.
    run(prm, "processbench", "gsm8k.jsonl")
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reasonrl.prm import PRM, Scored
from reasonrl.records import InputError
from reasonrl.rows import Refused, brief, field_of, read_rows
from reasonrl.stepwise import Trace, trace_of
from reasonrl.tasks.base import content_share

THRESHOLDS = [i / 100 for i in range(1, 100)]
BINS = 10


def run(prm: PRM, name: str, path: str | Path) -> dict[str, Any]:
    """The metrics of one benchmark file; InputError for an unknown name or a bad row."""
    if name not in READERS:
        raise InputError(f"--benchmark: expected {' or '.join(READERS)}, got {name!r}")
    rows = [(number, _row(name, row, f"{path}: row {number}")) for number, row in read_rows(path)]
    traces = [trace for _, (trace, _) in rows]
    scores = prm.score(traces)
    unread = [
        f"row {number}: {found.reason}"
        for (number, _), found in zip(rows, scores, strict=True)
        if found.reason
    ]
    known = [(t, e, s) for (_, (t, e)), s in zip(rows, scores, strict=True) if not s.reason]
    if not known:
        raise InputError(f"{path}: no row could be scored ({unread[0]})")
    about = {"benchmark": name, "rows": len(rows), "unscored": len(unread), "reasons": unread[:10]}
    return about | READERS[name][1](known)


def _row(name: str, row: Mapping[str, Any], where: str) -> tuple[Trace, list[int]]:
    try:
        return READERS[name][0](row, where)
    except Refused as error:
        raise InputError(f"{where}: {error}") from None


def _processbench_row(row: Mapping[str, Any], where: str) -> tuple[Trace, list[int]]:
    label = row.get("label")
    trace = _trace(row, "problem", "steps", where)
    if type(label) is not int or not -1 <= label < len(trace.steps):
        raise Refused(f"field 'label': expected -1..{len(trace.steps) - 1}, got {brief(label)}")
    return trace, [] if label < 0 else [label]


def _prmbench_row(row: Mapping[str, Any], where: str) -> tuple[Trace, list[int]]:
    question = "modified_question" if row.get("modified_question") else "question"
    trace = _trace(row, question, "modified_process", where)
    errors = field_of(row, "error_steps", list, "a list of step numbers from 1")
    for at in errors or ():
        if type(at) is not int or not 1 <= at <= len(trace.steps):
            raise Refused(f"field 'error_steps': expected 1..{len(trace.steps)}, got {brief(at)}")
    return trace, [at - 1 for at in errors or ()]


def _trace(row: Mapping[str, Any], prompt: str, steps: str, where: str) -> Trace:
    for key in (prompt, steps):
        if row.get(key) is None:
            raise Refused(f"field {key!r}: expected a value, got nothing")
    own = {"prompt": row[prompt], "completions": row[steps]}
    if isinstance(row.get("id", row.get("idx")), str | int):
        own["id"] = row.get("id", row.get("idx"))
    trace = trace_of(own, where, False, "\n", where)
    last = len(trace.steps) - 1
    # the steps come without what stood between them
    cut = [s if i == last or s.endswith("\n") else f"{s}\n" for i, s in enumerate(trace.steps)]
    return Trace(trace.id, trace.prompt, cut, extra=dict(row), where=where)


Known = Sequence[tuple[Trace, list[int], Scored]]


def _processbench(known: Known) -> dict[str, Any]:
    """F1 on the rows that did not choose the threshold."""
    choosing = [k for k in known if content_share(k[0].id) < 0.5]
    judged = [k for k in known if content_share(k[0].id) >= 0.5]
    if not choosing or not judged:
        choosing = judged = list(known)
    threshold = max(THRESHOLDS, key=lambda t: _f1(choosing, t)["f1"])
    return {
        "threshold": threshold,
        "threshold_rows": len(choosing),
        "same_rows": choosing is judged or choosing == judged,
        **_f1(judged, threshold),
        "calibration": _calibration([(s, t, [e[0]] if e else []) for t, e, s in known], True),
    }


def _f1(known: Known, threshold: float) -> dict[str, float]:
    """Accuracy on solutions with and without an error, and their harmonic mean."""
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for _, errors, scored in known:
        found = next((i for i, v in enumerate(scored.steps) if v < threshold), -1)
        hits[bool(errors)].append(found == (errors[0] if errors else -1))
    wrong, right = (sum(h) / len(h) if h else 0.0 for h in (hits[True], hits[False]))
    f1 = 2 * wrong * right / (wrong + right) if wrong + right else 0.0
    return {"error_accuracy": wrong, "correct_accuracy": right, "f1": f1}


def _prmbench(known: Known) -> dict[str, Any]:
    groups: dict[str, list] = {}
    for item in known:
        groups.setdefault(str(item[0].extra.get("classification", "all")), []).append(item)
    return {
        **_prm_score(known),
        "classes": {name: _prm_score(rows) for name, rows in sorted(groups.items())},
        "calibration": _calibration([(s, t, e) for t, e, s in known], False),
    }


def _prm_score(known: Known) -> dict[str, float]:
    """F1 of right steps, of wrong steps, and their mean; the accuracy of a step."""
    counts = {(a, b): 0 for a in (True, False) for b in (True, False)}
    for _, errors, scored in known:
        for i, value in enumerate(scored.steps):
            counts[value >= 0.5, i not in errors] += 1
    right = _harmonic(counts[True, True], counts[True, False], counts[False, True])
    wrong = _harmonic(counts[False, False], counts[False, True], counts[True, False])
    total = sum(counts.values())
    return {
        "prm_score": (right + wrong) / 2,
        "f1": right,
        "negative_f1": wrong,
        "step_accuracy": (counts[True, True] + counts[False, False]) / total,
    }


def _harmonic(hit: int, false: int, missed: int) -> float:
    return 2 * hit / (2 * hit + false + missed) if hit else 0.0


def _calibration(items: Sequence[tuple[Scored, Trace, list[int]]], until: bool) -> dict[str, Any]:
    """Tenths of the score: steps, mean score, share right; and the expected calibration error.

    until: steps after the first error have no label.
    """
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(BINS)]
    for scored, _, errors in items:
        stop = errors[0] + 1 if until and errors else len(scored.steps)
        for i, value in enumerate(scored.steps[:stop]):
            at = min(BINS - 1, max(0, int(value * BINS)))
            bins[at].append((value, i not in errors))
    total = sum(map(len, bins))
    table, error = [], 0.0
    for i, inside in enumerate(bins):
        mean = math.fsum(v for v, _ in inside) / len(inside) if inside else None
        share = sum(right for _, right in inside) / len(inside) if inside else None
        table.append({"from": i / BINS, "steps": len(inside), "score": mean, "right": share})
        if mean is not None and share is not None:
            error += abs(mean - share) * len(inside) / total
    return {"bins": table, "expected_error": error}


READERS = {
    "processbench": (_processbench_row, _processbench),
    "prmbench": (_prmbench_row, _prmbench),
}
