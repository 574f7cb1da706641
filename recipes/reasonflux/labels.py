"""How many labelled traces a process reward model needs: 10, 100, 1,000, measured and drawn.

    python recipes/reasonflux/labels.py --seeds 1 2 3

One cold-started policy writes traces of the arithmetic task, whose rule labels every step. A model
is trained on the first 10, 100 and 1,000 traces of a seed, the same number of steps each time, and
judged on completions of TEST problems of the test split: steps told right from wrong (area under
the curve, and accuracy beside always saying the commoner), and first errors found at their place.
Finished pieces are not run again. Writes labels.json, labels.md, labels.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from reasonrl.plot_data import Line, Panel, mean_line
from reasonrl.plots import draw
from reasonrl.prm import PRM
from reasonrl.prm_train import PRMConfig, train
from reasonrl.stepwise import Trace, read_traces

HERE = Path(__file__).resolve().parent
SIZES = (10, 100, 1000)
TEST = 250  # problems of the test split, two completions each
STEPS = 150
POLICY = [
    "tiny",
    "task_options={terms: 4, ops: '+-*', mod: 5, low: 0, high: 4, style: compact}",
    "model_options={width: 64, layers: 2, heads: 2}",
    "cold_start_steps=350",
    "cold_start.learning_rate=3e-3",
    "seed=11",
    "threads=1",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/labels"))
    options = parser.parse_args()
    out: Path = options.runs
    base = out / "base"
    if not (base / "checkpoint-0").exists():
        command("train", *POLICY, "steps=0", "eval_problems=0", "--out", base, "--quiet")
    test = labelled(base, out / "test.jsonl", "test", 0, TEST, 2)
    rows = [one(base, out, seed, test) for seed in options.seeds]
    right = sum(x for t in test for x in t.labels or ()) / sum(len(t.steps) for t in test)
    whole = {
        "sizes": SIZES,
        "steps": STEPS,
        "test_traces": len(test),
        "test_steps": sum(len(t.steps) for t in test),
        "commoner": max(right, 1 - right),
        "seeds": rows,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, no GPU, one thread",
        "versions": {n: version(n) for n in ("reasonrl", "torch", "transformers")},
    }
    (HERE / "labels.json").write_text(json.dumps(whole, indent=1) + "\n")
    (HERE / "labels.md").write_text(table(whole))
    picture(whole, HERE / "labels.svg")
    print(table(whole))


def labelled(base: Path, path: Path, split: str, first: int, problems: int, group: int):
    if not path.exists():
        words = ["--split", split, "--first", first, "--problems", problems, "--group", group]
        model = f"model={base}/checkpoint-0"
        keys = [k for k in POLICY if not k.startswith(("model_options", "cold_start"))]
        command("prm", "label", *keys, model, *words, "--out", path)
    return read_traces(path)


def one(base: Path, out: Path, seed: int, test: list[Trace]) -> dict:
    """Scores of the three sizes of one seed, each on traces of problems of its own."""
    done = out / f"seed-{seed}.json"
    if done.exists():
        return json.loads(done.read_text())
    traces = labelled(base, out / f"train-{seed}.jsonl", "train", 5000 * seed, max(SIZES), 1)
    found = {}
    for size in SIZES:
        config = PRMConfig(
            model=f"{base}/checkpoint-0",
            steps=STEPS,
            batch_traces=16,
            learning_rate=5e-4,
            delimiter=";",
            held_out=0.0,
            seed=seed,
            dtype="fp32",
            threads=1,
        )
        learned = train(traces[:size], config, None, note=lambda text: None)
        found[str(size)] = judged(learned.prm, test)
    row = {"seed": seed, "load": os.getloadavg()[0], "found": found}
    done.write_text(json.dumps(row))
    return row


def judged(prm: PRM, test: list[Trace]) -> dict[str, float]:
    """Numbers over all steps of the test traces, and over its traces with an error."""
    scores = [s.steps for s in prm.score(test)]
    pairs = [
        (value, label) for s, t in zip(scores, test, strict=True)
        for value, label in zip(s, t.labels or (), strict=True)
    ]  # fmt: skip
    wrong = [(s, t.labels) for s, t in zip(scores, test, strict=True) if 0.0 in (t.labels or ())]
    place = [
        next((i for i, v in enumerate(s) if v < 0.5), -1) == labels.index(0.0)
        for s, labels in wrong
        if labels is not None
    ]
    return {
        "auc": auc(pairs),
        "accuracy": sum((v >= 0.5) == (label == 1.0) for v, label in pairs) / len(pairs),
        "first_error": sum(place) / len(place),
    }


def auc(pairs: list[tuple[float, float]]) -> float:
    """How often a right step scores above a wrong one; ties count half."""
    ranked = sorted(pairs)
    total, below, at = 0.0, 0, 0
    while at < len(ranked):
        end = at
        while end < len(ranked) and ranked[end][0] == ranked[at][0]:
            end += 1
        wrong = sum(label == 0.0 for _, label in ranked[at:end])
        total += (end - at - wrong) * (below + wrong / 2)
        below, at = below + wrong, end
    return total / max(1, below * (len(ranked) - below))


def command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "reasonrl.cli", *map(str, words)], check=True)


def table(whole: dict) -> str:
    rows, names = whole["seeds"], ("auc", "accuracy", "first_error")
    lines = [
        f"{len(rows)} seeds; mean and range, percent; {whole['test_traces']} test traces with"
        f" {whole['test_steps']} steps, {100 * whole['commoner']:.1f} % of them of the commoner"
        f" label; {whole['steps']} optimiser steps at every size.",
        "",
        "| labelled traces | area under the curve | steps judged right | first error found |",
        "|---|---|---|---|",
    ]
    for size in whole["sizes"]:
        cells = []
        for name in names:
            values = [100 * row["found"][str(size)][name] for row in rows]
            mean = sum(values) / len(values)
            cells.append(f"{mean:.1f} ({min(values):.1f}..{max(values):.1f})")
        lines.append(f"| {size} | {' | '.join(cells)} |")
    lines += ["", f"Measured {whole['date']}, {whole['machine']}."]
    return "\n".join(lines) + "\n"


def picture(whole: dict, path: Path) -> None:
    """Mean over seeds with its 95 % t-interval."""
    sizes, seeds, lines = whole["sizes"], whole["seeds"], []
    for name, label in (
        ("auc", "area under the curve"), ("accuracy", "steps right"), ("first_error", "first error")
    ):  # fmt: skip
        curves = [[100 * row["found"][str(size)][name] for size in sizes] for row in seeds]
        lines.append(mean_line(label, sizes, curves))
    commoner = [100 * whole["commoner"]] * len(sizes)
    lines.append(Line("always the commoner", sizes, commoner, dashed=True))
    draw([Panel("labelled traces", "percent", lines, log2=True)], path)


if __name__ == "__main__":
    main()
