"""Panels of step credit, Best-of-N, calibration and selection, from the files commands leave.

    credit       RUN/completions/*.parquet: mean step reward and step advantage by place
    best_of_n    the JSON of `reasonrl best-of-n --out`, or rows of `reasonrl score` with outcomes
    calibration  rows of `reasonrl score` whose labels are known
    selection    the JSON of `reasonrl select --report`

Calibration: scores in ten equal bins of [0, 1]; in each the mean score stands against the share of
right ones, and ECE = sum over bins of n_bin / n * |share right - mean score| (arXiv 1706.04599,
eq. 3). What has no score is counted in the label, never taken for 0.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from reasonrl.choice import TOGETHER
from reasonrl.curves import Candidate, candidate
from reasonrl.curves import curves as best_of_n_curves
from reasonrl.plot_data import Line, Panel, histogram, mean_lines
from reasonrl.records import InputError
from reasonrl.report.gather import completion_files, read_table
from reasonrl.stepwise import Trace, read_traces

BINS = 10
HOWS = ("min", "mean", "last", "prod")


def credit(runs: Sequence[Path]) -> tuple[list[Panel], list[dict[str, Any]]]:
    """Two panels, the first and the last quarter of each run as lines, and a table of statistics.

    InputError where a run has no completions with steps.
    """
    rewards, advantages, table = [], [], []
    for run in runs:
        if not run.is_dir():
            raise InputError(
                f"{run}: no such run folder; give the --out folder of `reasonrl train`"
            )
        files = completion_files(run)
        if not files:
            raise InputError(
                f"{run}: expected completions/completions_*.parquet, found none (config key"
                " log.completions_every)"
            )
        steps = sorted(files)
        quarter = max(1, len(steps) // 4)
        parts = [steps[:quarter], steps[-quarter:]] if len(steps) > 1 else [steps]
        for part in parts:
            rows = [row for step in part for row in read_table(files[step])]
            rows = [row for row in rows if row.get("step_rewards")]
            if not rows:
                raise InputError(
                    f"{run}: no completion of steps {part[0]}..{part[-1]} has step rewards"
                    " (algorithms process and reasonflux give them)"
                )
            span = f"steps {part[0]} to {part[-1]}" if len(part) > 1 else f"step {part[0]}"
            label = f"{run.resolve().name}, {span}"
            rewards.append(mean_lines(label, [row["step_rewards"] for row in rows]))
            paid = [row.get("step_advantages") or [] for row in rows]
            advantages.append(mean_lines(label, paid))
            table.append({"run": run.resolve().name, "steps": span, **statistics(rows)})
    place = "place of the step in its completion"
    panels = [Panel(place, "step reward", rewards), Panel(place, "step advantage", advantages)]
    return panels, table


def statistics(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of completions with steps: how many steps, how good, and whether credit follows quality.

    right_but_blamed: the share of right steps (reward >= 0.5) with a negative advantage, of those
    with any; wrong_but_paid: of wrong ones with a positive advantage. lucky: of completions with a
    right outcome, those with a wrong step.
    """
    pairs = [
        (reward, advantage)
        for row in rows
        for reward, advantage in zip(
            row["step_rewards"], row["step_advantages"] or (), strict=False
        )
        if reward is not None and advantage
    ]
    good = [a < 0 for r, a in pairs if r >= 0.5]
    bad = [a > 0 for r, a in pairs if r < 0.5]
    known = [[r for r in row["step_rewards"] if r is not None] for row in rows]
    flat = [r for row in known for r in row]
    right = [
        min(k) < 0.5
        for k, row in zip(known, rows, strict=True)
        if k and row.get("outcome") is not None and row["outcome"] >= 0.5
    ]
    return {
        "completions": len(rows),
        "steps_mean": len(flat) / len(rows),
        "reward_mean": _mean(flat),
        "right_but_blamed": _mean(good),
        "wrong_but_paid": _mean(bad),
        "lucky": _mean(right),
    }


def best_of_n(path: Path, how: str = "min") -> list[Panel]:
    """One panel: share of right choices against N, with bootstrap intervals where there are any."""
    if path.suffix == ".json":
        found = _json(path)
        if not isinstance(found, dict) or not {"n", "curves"} <= set(found):
            raise InputError(f"{path}: expected the JSON of `best-of-n --out` (n, curves)")
    else:
        found = best_of_n_curves(_candidates(path), [*HOWS, "total"], how)
    return [best_of_n_panel(found)]


def best_of_n_panel(found: dict[str, Any]) -> Panel:
    """The panel of `curves.curves`' record."""
    lines = []
    for name, points in found["curves"].items():
        y, low, high = ([100 * p[k] for p in points] for k in ("accuracy", "low", "high"))
        lines.append(Line(name, found["n"], y, low, high, dashed=name in ("majority", "oracle")))
    return Panel("completions (N)", "right (%)", lines, log2=True)


def calibration(paths: Sequence[Path], level: str, how: str = "min") -> list[Panel]:
    """Two panels: the reliability diagram, and the scores of right (solid) and wrong (dashed).

    level: step (step_scores against labels) or answer (`how` of them against the outcome).
    """
    edges = np.linspace(0, 1, BINS + 1)
    curve, shares = [], []
    for path in paths:
        pairs, unscored = scored_pairs(path, level, how)
        found = reliability(pairs)
        missing = f", {unscored} unscored" if unscored else ""
        label = f"{path.stem}: ECE {found['ece']:.3f}, n = {len(pairs)}{missing}"
        bins = found["bins"]
        curve.append(Line(label, [b["score"] for b in bins], [b["right"] for b in bins]))
        for name, wanted in (("right", True), ("wrong", False)):
            values = [s for s, r in pairs if (r >= 0.5) == wanted]
            counts = histogram(values, edges)
            whole = [c / max(1, len(values)) for c in counts]
            one = name if len(paths) == 1 else f"{path.stem}, {name}"
            shares.append(Line(one, edges[:-1].tolist(), whole, dashed=not wanted))
    what = "step" if level == "step" else "answer"
    return [
        Panel(f"score of the {what}", "share right", curve, diagonal=True, limits=(0, 1)),
        Panel(f"score of the {what}", f"share of {what}s", shares, form="step", width=1 / BINS),
    ]


def reliability(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """{"ece", "bins": [{"score", "right", "n"}]} of (score, label) pairs in [0, 1]; empty bins
    are left out, and 1 belongs to the last."""
    bins: list[list[tuple[float, float]]] = [[] for _ in range(BINS)]
    for pair in pairs:
        bins[min(BINS - 1, int(pair[0] * BINS))].append(pair)
    rows = [
        {"score": _mean([s for s, _ in b]), "right": _mean([r for _, r in b]), "n": len(b)}
        for b in bins
        if b
    ]
    ece = math.fsum(b["n"] / len(pairs) * abs(b["right"] - b["score"]) for b in rows)
    return {"ece": ece, "bins": rows}


def scored_pairs(path: Path, level: str, how: str) -> tuple[list[tuple[float, float]], int]:
    """(score, label) of every step or answer of a file, and how many have a label but no score."""
    pairs, unscored, labelled = [], 0, 0
    for trace in read_traces(path, labelled=False):
        scores = _scores(trace)
        labels = trace.labels if level == "step" else _outcome(trace)
        if labels is None:
            continue
        labelled += len(labels)
        if scores is None:
            unscored += len(labels)
            continue
        values = scores if level == "step" else [TOGETHER[how](scores)]
        for value in values:
            if not 0 <= value <= 1:
                raise InputError(f"{trace.where}: expected scores in 0..1, got {value}")
        if len(values) != len(labels):
            raise InputError(
                f"{trace.where}: field 'step_scores': expected {len(labels)}, got {len(values)}"
            )
        pairs += zip(values, labels, strict=True)
    if not pairs:
        field = "labels" if level == "step" else "final"
        have = "no row has a score" if labelled else f"no row has the field {field!r}"
        raise InputError(f"{path}: nothing to calibrate: {have}")
    return pairs, unscored


def selection(paths: Sequence[Path]) -> list[Panel]:
    """A panel a report: how many answers of the pool, and of those kept, lie in each bin."""
    panels = []
    for path in paths:
        report = _json(path)
        bins = report.get("histogram") if isinstance(report, dict) else None
        if not isinstance(bins, list) or not bins:
            raise InputError(f"{path}: expected the JSON of `select --report` with a histogram")
        left = [b["from"] for b in bins]
        width = left[1] - left[0] if len(left) > 1 else 1.0
        lines = []
        for name in ("pool", "kept"):  # the pool: answers with a score, duplicates once
            counts = [b[name] for b in bins]
            lines.append(Line(f"{name} ({sum(counts)})", left, counts, dashed=name == "pool"))
        title = f"score ({path.stem})" if len(paths) > 1 else "score"
        panels.append(Panel(title, "answers", lines, form="step", width=width))
    return panels


def _candidates(path: Path) -> list[list[Candidate]]:
    groups: dict[str, list[Candidate]] = {}
    for trace in read_traces(path, labelled=False):
        outcome, scores = _outcome(trace), _scores(trace) or []
        if outcome is None:
            raise InputError(f"{trace.where}: field 'final': expected the outcome, got nothing")
        total = trace.extra.get("score")
        total = -math.inf if total is None else float(total)
        key = str(trace.extra.get("problem_id", trace.prompt))
        groups.setdefault(key, []).append(candidate(trace.text, outcome[0] >= 0.5, scores, total))
    return list(groups.values())


def _scores(trace: Trace) -> list[float] | None:
    """The step scores of a row of `reasonrl score`; None where it says that there are none."""
    if "step_scores" not in trace.extra:
        raise InputError(
            f"{trace.where}: field 'step_scores': expected a row of `reasonrl score`, got nothing"
        )
    scores = trace.extra["step_scores"]
    if scores is None:
        return None
    if not isinstance(scores, list) or not scores or not all(_number(s) for s in scores):
        raise InputError(f"{trace.where}: field 'step_scores': expected numbers, got {scores!r}")
    return [float(s) for s in scores]


def _outcome(trace: Trace) -> list[float] | None:
    value = trace.final if trace.final is not None else trace.extra.get("reward")
    if value is None:
        return None
    if not _number(value) or not 0 <= value <= 1:
        raise InputError(f"{trace.where}: field 'reward': expected 0 to 1, got {value!r}")
    return [float(value)]


def _number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and math.isfinite(value)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not JSON ({error})") from None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
