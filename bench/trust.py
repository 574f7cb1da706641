"""`python -m bench trust`: the share of a training step that goes into being able to trust it.

A short run of a recipe, in which every function that exists for trust alone is timed from inside:
verdicts, checks of arguments and of numbers, the ceiling of unknown rewards, what is kept for going
back, metrics rows with their flush to the disk, the completions table. Calls inside one another
count once. Beside the step, because it does not happen in every one: what a save costs, and how
much of that is hashing, flushing and publishing. Filters of secrets are counted too: a step calls
none. The gate: the timed run leaves the weights and rows of one without timers.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from types import FunctionType
from typing import Any

from safetensors.torch import load_file

from bench.machine import machine
from reasonrl import ceiling, checkpoint, checks, keys, log, monitors, train
from reasonrl import config as configs
from reasonrl.algos import base
from reasonrl.cli import _quiet_libraries as quiet_libraries
from reasonrl.draw import Source
from reasonrl.log import read_rows

GOAL = 0.03  # of a step
WARM = 2  # first steps that do not count
SHORT = ["cold_start_steps=20", "eval_problems=0", "eval.at_start=false", "save.every=0"]
KEPT = ("reward", "loss", "grad_norm")  # of a row, compared between the two runs


class Timer:
    """Time and calls by name; a call inside a timed one is part of that."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self.inside = 0
        self.undo: list[tuple[Any, str, Any]] = []

    def watch(self, name: str, owner: Any, *functions: str) -> None:
        for function in functions:
            original = owner.__dict__[function]
            self.undo.append((owner, function, original))
            setattr(owner, function, self._timed(name, original))

    def _timed(self, name: str, original: Callable) -> Callable:
        @functools.wraps(original)
        def timed(*given: Any, **named: Any) -> Any:
            if self.inside:
                return original(*given, **named)
            self.inside += 1
            began = time.perf_counter()
            try:
                return original(*given, **named)
            finally:
                self.seconds[name] += time.perf_counter() - began
                self.calls[name] += 1
                self.inside -= 1

        return timed

    def forget(self) -> None:
        self.seconds.clear()
        self.calls.clear()

    def stop(self) -> None:
        for owner, function, original in reversed(self.undo):
            setattr(owner, function, original)


def watched(timer: Timer) -> None:
    """Everything in a step that would not be there in a trainer that trusts what it is given."""
    here = [
        n
        for n, f in vars(checks).items()
        if isinstance(f, FunctionType) and f.__module__ == checks.__name__
    ]
    timer.watch("checks of arguments and numbers", checks, *here)
    timer.watch("verdicts", base.Algorithm, "outcomes")
    timer.watch("ceiling of unknown rewards", ceiling.Watch, "see")
    timer.watch("monitors", monitors.Live, "see")
    timer.watch("monitors", train, "measured")
    timer.watch("canaries", train, "with_canaries")
    timer.watch("a mark to go back to", Source, "mark")
    timer.watch("rows, flushed to the disk", log.RunLog, "_write")
    timer.watch("completions table", log.RunLog, "completions", "pictures")
    timer.watch("secrets", keys, "hide", "refuse")
    timer.watch("secrets", keys.Hide, "filter")


def measure(recipe: str, changes: Sequence[str], steps: int) -> dict[str, Any]:
    """One row: milliseconds a step, and by name what is for trust."""
    config = configs.load(recipe, [*SHORT, *changes, f"steps={steps + WARM}"])
    with tempfile.TemporaryDirectory() as folder:
        plain, timed = Path(folder) / "plain", Path(folder) / "timed"
        train.train(config, plain, quiet=True)
        timer, whole = Timer(), Counter()
        watched(timer)
        step = train.Run._step_or_save

        def counted(run: train.Run) -> None:
            if run.step == WARM:
                timer.forget()
                whole.clear()
            began = time.perf_counter()
            step(run)
            whole["step"] += time.perf_counter() - began
            if run.step == steps + WARM:  # what comes behind is the save
                whole["seconds"], whole["calls"] = dict(timer.seconds), dict(timer.calls)

        train.Run._step_or_save = counted
        try:
            train.train(config, timed, quiet=True)
        finally:
            train.Run._step_or_save = step
            timer.stop()
        same = _same(plain, timed, steps + WARM)
        save = saving(config, timed)
    parts = {
        name: {"ms": 1000 * whole["seconds"][name] / steps, "calls": whole["calls"][name] / steps}
        for name in sorted(whole["seconds"], key=lambda n: -whole["seconds"][n])
    }
    parts.setdefault("secrets", {"ms": 0.0, "calls": 0.0})
    total = 1000 * whole["step"] / steps
    share = sum(part["ms"] for part in parts.values()) / total
    found = {"recipe": recipe, "changes": list(changes), "steps": steps, "same": same}
    return found | {"step_ms": total, "share": share, "parts": parts, "save": save}


def saving(config: configs.Config, run: Path) -> dict[str, float]:
    """Milliseconds of one save, and of what in it is not writing the files."""
    timer = Timer()
    timer.watch("whole", train.state, "save")
    inner = Timer()
    inner.watch("safe", checkpoint, "_settle", "_manifest", "_publish", "_retire")
    try:
        longer = config.model_copy(update={"steps": config.steps + 1})
        train.train(longer, run, resume=True, quiet=True)
    finally:
        timer.stop()
        inner.stop()
    return {"ms": 1000 * timer.seconds["whole"], "safe_ms": 1000 * inner.seconds["safe"]}


def _same(a: Path, b: Path, step: int) -> bool:
    weights = [load_file(p / f"checkpoint-{step}" / "model.safetensors") for p in (a, b)]
    rows = [[[r[k] for k in KEPT] for r in read_rows(p / "metrics.jsonl")] for p in (a, b)]
    equal = all(bool((weights[0][n] == weights[1][n]).all()) for n in weights[0])
    return equal and rows[0] == rows[1]


def shown(row: dict[str, Any]) -> str:
    name = " ".join([row["recipe"], *row["changes"]])
    lines = [f"{name}: {row['step_ms']:.1f} ms a step, {100 * row['share']:.2f} % for trust"]
    for part, value in row["parts"].items():
        share = 100 * value["ms"] / row["step_ms"]
        lines.append(
            f"    {value['ms']:8.3f} ms  {share:5.2f} %  {value['calls']:6.1f} calls  {part}"
        )
    save = row["save"]
    lines.append(
        f"    a save: {save['ms']:.1f} ms, of it hashed, flushed, published {save['safe_ms']:.1f}"
    )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench trust", description=__doc__)
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="of the recipe")
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--steps", type=int, default=10, help=f"timed ones, after {WARM}")
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    options = parser.parse_args(arguments)
    quiet_libraries()
    about = machine() | {"load": os.getloadavg()}
    row = measure(options.recipe, options.overrides, options.steps)
    print(shown(row))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stamp = datetime.now(timezone.utc).strftime("%Y%m%d-%H%M%S")
        path = options.out / f"trust-{stamp}.json"
        path.write_text(json.dumps({"machine": about, "row": row}, indent=1) + "\n")
    if not row["same"]:
        print("gate: the timed run differs from the plain one", file=sys.stderr)
        return 1
    print(f"goal {100 * GOAL:.0f} %: {'met' if row['share'] <= GOAL else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
