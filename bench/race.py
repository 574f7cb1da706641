"""Sides of one task against each other: gate first, then interleaved rounds in shuffled order.

A side is a function of the task's inputs that returns its outputs (values, gradients). Its numbers
count only behind a green gate: each output against float64, ours by the stratified rule's factors
(2 times the stock error forward, 3 times for gradients), rivals by what separates a slow side from
a wrong one. Times are medians of rounds with their range, ratios medians of each round's ratio.
On a GPU inputs are moved there, a round's time is that of Triton's do_bench, and no CPU goal is
judged.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

ULP = torch.finfo(torch.float32).eps
LONG = 0.02  # seconds that one timing lasts, at least
Side = Callable[[dict[str, Any]], Sequence[Tensor]]


@dataclass(frozen=True)
class Goal:
    """A figure to reach: `value` of the measured row against `target`, by `sign` (<= or >=)."""

    text: str
    value: Callable[[Mapping[str, Any]], float | None]
    sign: str
    target: float

    def met(self, found: float) -> bool:
        return found <= self.target if self.sign == "<=" else found >= self.target


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    key: str
    title: str
    make: Callable[[], dict[str, Any]]
    sides: Mapping[str, Side]  # "ours" first
    truth: Side | None = None  # in float64; None: the outputs of `stock`
    truths: Mapping[str, Side] = field(default_factory=dict)  # sides that have one of their own
    stock: str = "torch"  # whose error is the yardstick
    gradients: int = 0  # how many of the outputs, the last ones, are gradients
    tolerance: float = 1e-3  # of rivals, relative to each output's norm
    floors: Mapping[str, Side] = field(default_factory=dict)  # least work, no outputs to compare
    goals: Sequence[Goal] = ()
    rounds: int = 7
    memory: Sequence[str] = ()  # sides whose peak memory is taken, each in its own process


def run(
    case: Case, rounds: int | None = None, seed: int = 0, device: str = "cpu"
) -> dict[str, Any]:
    """The row of a case: gates, times, ratios, errors, goals."""
    case, x = on_device(case, device)
    verdicts = gates(case, x)
    green = [name for name in case.sides if not verdicts[name]["reason"]]
    times = race(
        {n: case.sides[n] for n in green} | dict(case.floors), x, rounds or case.rounds, seed
    )
    row: dict[str, Any] = {"key": case.key, "title": case.title, "sides": {}, "floors": {}}
    for name in case.sides:
        row["sides"][name] = verdicts[name] | summary(times.get(name), times.get("ours"))
    for name in case.floors:
        row["floors"][name] = {"label": "floor"} | summary(times[name], times.get("ours"))
    row["goals"] = []
    for goal in case.goals:
        found = goal.value(row)
        met = None if found is None else goal.met(found)
        row["goals"].append({"text": goal.text, "sign": goal.sign, "target": goal.target} | {
            "found": found, "met": met,
        })  # fmt: skip
    del x
    gc.collect()
    return row


def impl_of(x: Tensor) -> str:
    """Which of our implementations a benchmark means for tensors like x."""
    if x.dtype == torch.float64:
        return "reference"
    return "native" if x.device.type == "cpu" else "auto"


def placed(x: Any, device: str) -> Any:
    """Tensors of a dict or dataclass on the device, everything else as it is."""
    if isinstance(x, Tensor):
        return x.to(device)
    if isinstance(x, dict):
        return {name: placed(value, device) for name, value in x.items()}
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{f.name: placed(getattr(x, f.name), device) for f in fields(x)})
    return x


def on_device(case: Case, device: str) -> tuple[Case, dict[str, Any]]:
    """The case and its inputs there; what its sides make themselves is made there too."""
    x = case.make()
    if device == "cpu":
        return case, x

    def there(side: Side) -> Side:
        def call(x: dict[str, Any], *more: Any) -> Sequence[Tensor]:
            with torch.device(device):
                return side(x, *more)

        return call

    def all_there(sides: Mapping[str, Side]) -> dict[str, Side]:
        return {name: there(side) for name, side in sides.items()}

    case = replace(
        case, sides=all_there(case.sides), floors=all_there(case.floors), goals=(),
        truths=all_there(case.truths), truth=case.truth and there(case.truth),
    )  # fmt: skip
    return case, placed(x, device)


def gpu_seconds(side: Side, x: dict[str, Any]) -> float:
    """One round on a GPU: the median of do_bench's runs, its cache flushed before each."""
    from triton.testing import do_bench

    return float(do_bench(lambda: side(x), return_mode="median")) / 1e3


def where_of(x: Any) -> str:
    """The device type of the first tensor."""
    for value in x.values() if isinstance(x, dict) else ():
        if isinstance(value, Tensor):
            return value.device.type
    return "cpu"


def race(
    sides: Mapping[str, Side], x: dict[str, Any], rounds: int, seed: int
) -> dict[str, list[float]]:
    """Seconds of every side in every round; the order is drawn anew for each round."""
    gpu = where_of(x) != "cpu"
    repeats = {}
    for name, side in sides.items():
        side(x)
        began = time.perf_counter()
        side(x)
        spent = time.perf_counter() - began
        repeats[name] = max(1, math.ceil(LONG / max(spent, 1e-7)))
    order, draw = list(sides), random.Random(seed)
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        draw.shuffle(order)
        for name in order:
            if gpu:
                times[name].append(gpu_seconds(sides[name], x))
                continue
            began = time.perf_counter()
            for _ in range(repeats[name]):
                sides[name](x)
            times[name].append((time.perf_counter() - began) / repeats[name])
    return times


def summary(times: list[float] | None, ours: list[float] | None) -> dict[str, Any]:
    if not times:
        return {"median": None}
    found = {"median": statistics.median(times), "range": [min(times), max(times)], "times": times}
    if ours:
        ratios = [t / o for t, o in zip(times, ours, strict=True)]
        found |= {"ratio": statistics.median(ratios), "ratio_range": [min(ratios), max(ratios)]}
    return found


def gates(case: Case, x: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For every side the largest error of each output, and the reason where it may not be shown."""
    found: dict[str, dict[str, Any]] = {}
    outputs: dict[str, list[Tensor]] = {}
    for name, side in case.sides.items():
        try:
            outputs[name] = [v.detach().clone() for v in side(x)]
        except Exception as error:
            if name in ("ours", case.stock):
                raise
            found[name] = {"label": "measured", "reason": f"did not run: {first_line(error)}"}
    common = case.truth(x) if case.truth else outputs.get(case.stock, [])
    common = [v.detach().double() for v in common]
    yard = errors(outputs[case.stock], common) if case.stock in outputs else None
    for name, out in outputs.items():
        own = case.truths.get(name)
        truth = [v.detach().double() for v in own(x)] if own else common
        mine = errors(out, truth)
        reason = ""
        for k, (error, true) in enumerate(zip(mine, truth, strict=True)):
            norm, size = float(true.norm()), float(true.abs().max()) if true.numel() else 0.0
            gradient = k >= len(truth) - case.gradients
            if name == "ours" and case.truth and yard:
                allowed = (3 if gradient else 2) * yard[k]["max"] + 4 * ULP * size
                if not error["max"] <= allowed:
                    reason = f"output {k}: error {error['max']:.2g} above {allowed:.2g}"
            elif not error["norm"] <= case.tolerance * norm + 1e-12:
                reason = f"output {k}: relative error {error['norm'] / max(norm, 1e-30):.2g}"
            if size == 0.0 and true.numel():
                reason = f"output {k} is nothing but zeros: nothing was compared"
        found[name] = {"label": "measured", "reason": reason, "errors": mine}
    return found


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def errors(out: Sequence[Tensor], truth: Sequence[Tensor]) -> list[dict[str, float]]:
    gaps = [(a.double() - b) for a, b in zip(out, truth, strict=True)]
    return [
        {"max": float(g.abs().max()) if g.numel() else 0.0, "norm": float(g.norm())} for g in gaps
    ]


def against(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    """How many times as long as ours `name` takes, in one run."""
    return lambda row: row["sides"].get(name, {}).get("ratio")


def over_floor(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    """How many times as long as the floor `name` ours takes."""

    def value(row: Mapping[str, Any]) -> float | None:
        ratio = row["floors"].get(name, {}).get("ratio")
        return 1 / ratio if ratio else None

    return value


def best_rival(row: Mapping[str, Any]) -> float | None:
    ratios = [s["ratio"] for n, s in row["sides"].items() if n != "ours" and s.get("ratio")]
    return min(ratios, default=None)
