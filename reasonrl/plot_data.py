"""Numbers of runs, scores and reports as panels of lines: what plots.py draws.

A `Panel` is one pair of axes. Curves come from metrics.jsonl and evals.jsonl; a torn last line (a
run that is still writing, or was killed) is left out and said, other damage is an InputError. Runs
that differ only in what `over` names are one line: their mean at the steps that all of them have,
with Student's 95 % interval over the runs. Whatever is asked for and not there is an InputError
that lists what is.
"""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from reasonrl import config as configs
from reasonrl.log import read_rows
from reasonrl.records import InputError

# two-sided 95 % quantiles of Student's t for 1..30 degrees of freedom
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)
NORMAL95 = 1.960
UNEQUAL = ("threads", "log", "save")  # config keys that say nothing about a run's numbers


@dataclass(frozen=True)
class Line:
    """Points in order of x; NaN in y is a gap. low and high: the interval, where there is one."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False  # a baseline


@dataclass(frozen=True)
class Panel:
    """One pair of axes. form: line, step (histogram: x are left edges, `width` the last bin's)."""

    xlabel: str
    ylabel: str
    lines: Sequence[Line]
    form: str = "line"
    width: float = 0.0
    log2: bool = False  # x in powers of two
    diagonal: bool = False  # y = x for comparison
    limits: tuple[float, float] | None = None  # of both axes


@dataclass(frozen=True)
class History:
    """A run's numbers: metric -> {step: value}, NaN where a value was not finite."""

    name: str
    path: Path
    values: dict[str, dict[int, float]]
    notes: Sequence[str] = field(default=())


def expand(names: Sequence[str]) -> list[Path]:
    """Paths as given; a pattern (runs/a-*) that is no path stands for what it matches."""
    found: list[Path] = []
    for name in names:
        if Path(name).exists() or not glob.has_magic(name):
            found.append(Path(name))
            continue
        matched = sorted(Path(p) for p in glob.glob(name))
        if not matched:
            raise InputError(f"{name}: matches nothing")
        found += matched
    return list(dict.fromkeys(found))


def history(path: Path) -> History:
    """A run's metrics by name; InputError where the folder holds no step."""
    if not path.is_dir():
        raise InputError(f"{path}: no such run folder; give the --out folder of `reasonrl train`")
    file = path / "metrics.jsonl"
    if not file.is_file():
        have = ", ".join(sorted(p.name for p in path.iterdir())) or "nothing"
        raise InputError(f"{path}: expected a run with metrics.jsonl, the folder has {have}")
    values: dict[str, dict[int, float]] = {}
    notes = []
    for source in (file, path / "evals.jsonl"):
        rows = read_rows(source)
        if torn(source, len(rows)):
            notes.append(f"{source}: the last row is torn and left out")
        if source == file and not rows:
            raise InputError(f"{file}: expected at least one whole step, got none")
        for row in rows:
            lost = row.get("nonfinite_metrics") or ()
            for key, value in row.items():
                if key in lost:
                    value = math.nan
                if isinstance(value, int | float) and not isinstance(value, bool):
                    values.setdefault(key, {})[row["step"]] = float(value)
    values.pop("step")
    return History(path.resolve().name, path, values, notes)


def torn(path: Path, whole: int) -> bool:
    """Whether a file of JSON lines holds more than its whole rows."""
    return path.is_file() and sum(1 for s in path.read_bytes().split(b"\n") if s.strip()) > whole


def curves(
    runs: Sequence[History],
    metrics: Sequence[str],
    *,
    by: Sequence[str] = (),
    over: Sequence[str] = ("seed",),
    smooth: int = 1,
) -> list[Panel]:
    """A panel a metric, a line a run; with `by` (config keys) a line a set of runs equal in them.
    smooth: steps of a trailing mean; evaluations are never smoothed.

    InputError where a metric is missing, or where runs of one set differ in a key outside `over`.
    """
    groups = _groups(runs, by, over) if by else [(label, [run]) for label, run in _named(runs)]
    panels = []
    for metric in metrics:
        window = 1 if metric.startswith("eval/") else smooth  # evaluations are few and far between
        lines = [_line(label, members, metric, window) for label, members in groups]
        panels.append(Panel("step", metric + (f", mean of {window}" if window > 1 else ""), lines))
    return panels


def trailing_mean(values: Sequence[float], n: int) -> list[float]:
    """The mean of each value and the n - 1 before it (fewer at the start); NaN are passed over."""
    out = []
    for i in range(len(values)):
        known = [v for v in values[max(0, i - n + 1) : i + 1] if math.isfinite(v)]
        out.append(math.fsum(known) / len(known) if known else math.nan)
    return out


def trailing_error(errors: Sequence[float], n: int) -> list[float]:
    """Standard errors of the trailing means of values that are independent of one another."""
    squares = trailing_mean([e * e for e in errors], n)
    windows = [errors[max(0, i - n + 1) : i + 1] for i in range(len(errors))]
    counts = [sum(map(math.isfinite, window)) for window in windows]
    return [math.sqrt(s / c) if c else math.nan for s, c in zip(squares, counts, strict=True)]


def spread95(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of Student's 95 % interval of it; NaN half for one value."""
    n = len(values)
    mean = math.fsum(values) / n
    if n < 2:
        return mean, math.nan
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return mean, (T95[n - 2] if n - 2 < len(T95) else NORMAL95) * deviation / math.sqrt(n)


def mean_line(
    label: str, x: Sequence[float], curves: Sequence[Sequence[float]], *, dashed: bool = False
) -> Line:
    """The mean of some curves, e.g. of several seeds, with its 95 % interval at every place."""
    pairs = [spread95(values) for values in zip(*curves, strict=True)]
    low, high = [m - h for m, h in pairs], [m + h for m, h in pairs]
    return Line(label, list(x), [m for m, _ in pairs], low, high, dashed)


def _line(label: str, runs: Sequence[History], metric: str, smooth: int) -> Line:
    for run in runs:
        if metric not in run.values:
            known = ", ".join(sorted(run.values))
            raise InputError(f"{run.path}: metric {metric!r}: not in this run; it has {known}")
    series = []
    for run in runs:
        steps = sorted(run.values[metric])
        smoothed = trailing_mean([run.values[metric][s] for s in steps], smooth)
        series.append(dict(zip(steps, smoothed, strict=True)))
    shared = sorted(set.intersection(*(set(s) for s in series)))
    if not shared:
        names = ", ".join(str(run.path) for run in runs)
        raise InputError(f"metric {metric!r}: no step that all of {names} have")
    if len(runs) == 1:
        y = [series[0][s] for s in shared]
        error = runs[0].values.get(f"{metric}_se")
        if error is None:
            return Line(label, shared, y)
        half = [error.get(s, math.nan) for s in shared]
        if not metric.startswith("eval/"):  # whose problems are the same at every step
            half = trailing_error(half, smooth)
        half = [NORMAL95 * h for h in half]
    else:
        return mean_line(label, shared, [[s[at] for at in shared] for s in series])
    low = [m - h for m, h in zip(y, half, strict=True)]
    high = [m + h for m, h in zip(y, half, strict=True)]
    return Line(label, shared, y, low, high)


def _named(runs: Sequence[History]) -> list[tuple[str, History]]:
    """Folder names as labels; whole paths where two runs share a name."""
    names = [run.name for run in runs]
    return [(r.name if names.count(r.name) == 1 else str(r.path), r) for r in runs]


def _groups(runs: Sequence[History], by: Sequence[str], over: Sequence[str]):
    """[(label, runs)] in the order of first appearance."""
    found = [configs.read(run.path / "config.yaml") for run in runs]
    sets: dict[str, list[int]] = {}
    for i, config in enumerate(found):
        values = config.model_dump(mode="json")
        label = ", ".join(f"{key}={_at(values, key, runs[i].path)}" for key in by)
        sets.setdefault(label, []).append(i)
    free = (*over, *by, *UNEQUAL)
    for members in sets.values():
        first = members[0]
        for other in members[1:]:
            for key in configs.diff(found[first], found[other]):
                if not any(f"{key}.".startswith(f"{f}.") for f in free):
                    raise InputError(
                        f"--by {','.join(by)}: {runs[first].path} and {runs[other].path} differ in"
                        f" {key!r} as well; add it to --by, or to --over to average over it"
                    )
    return [
        (
            f"{label} ({len(members)} runs)" if len(members) > 1 else label,
            [runs[i] for i in members],
        )
        for label, members in sets.items()
    ]


def _at(values: Any, key: str, path: Path) -> Any:
    """The value of a dotted config key; `unset` for an option that the run leaves to its owner."""
    top, *rest = key.split(".")
    if top not in values:
        raise InputError(f"--by {key}: no such config key in {path}; it has {', '.join(values)}")
    value = values[top]
    for name in rest:
        if not isinstance(value, dict):
            raise InputError(f"--by {key}: {top} is a value in {path}, not a section")
        value = value.get(name, "unset")
    return value


def histogram(values: Sequence[float], edges: np.ndarray) -> list[float]:
    return np.histogram(np.asarray(values, dtype=np.float64), bins=edges)[0].tolist()


def mean_lines(
    label: str, rows: Sequence[Sequence[float | None]], map_: Callable[[float], float] = float
) -> Line:
    """The mean at each place of ragged rows with its 95 % interval; places seen once are left out.

    rows: one list a completion, None where a value is unknown.
    """
    x, y, low, high = [], [], [], []
    for place in range(max(map(len, rows), default=0)):
        seen = [map_(v) for row in rows if place < len(row) and (v := row[place]) is not None]
        if len(seen) < 2:
            continue
        mean, half = spread95(seen)
        x.append(place + 1)
        y.append(mean)
        low.append(mean - half)
        high.append(mean + half)
    return Line(label, x, y, low, high)
