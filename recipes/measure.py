"""Run a recipe over seeds and write what was measured: JSON, a table, a curve.

    python recipes/measure.py quickstart --seeds 1 2 3 [key.path=value ...]

One `reasonrl train` after the other, each a process of its own; a finished seed is not run again.
Writes recipes/NAME/results.json (per seed: evaluations, training curve, wall time, peak memory),
recipes/NAME/results.md and recipes/NAME/curve.svg. The gain is accuracy after RL minus accuracy
after the cold start on the same held-out problems; its standard error treats the two as
independent, which overstates it. Needs matplotlib for the curve.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

from reasonrl import __version__

HERE = Path(__file__).resolve().parent
WINDOW = 5  # steps averaged in the training curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/measure"))
    options = parser.parse_intermixed_args()
    folder = HERE / options.recipe
    folder.mkdir(exist_ok=True)
    results = [_seed(options, seed) for seed in options.seeds]
    command = " ".join(["python recipes/measure.py", options.recipe, *options.overrides])
    whole = {"command": command, "seeds": results} | _machine()
    (folder / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    (folder / "results.md").write_text(_table(whole))
    _curve(whole, folder / "curve.svg")
    print(_table(whole))


def _seed(options: argparse.Namespace, seed: int) -> dict:
    name = "-".join([options.recipe, *options.overrides, f"seed={seed}"]).replace("/", "_")
    out = options.runs / name
    measured = out / "measured.json"
    if measured.exists():
        return json.loads(measured.read_text())
    command = [sys.executable, "-m", "reasonrl.cli", "train", options.recipe, f"seed={seed}"]
    command += [*options.overrides, "--out", str(out)]
    load, began = os.getloadavg()[0], time.time()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    seconds = time.time() - began
    if status:
        raise SystemExit(f"seed {seed} failed: {' '.join(command)}")
    evals = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "reward", "process/step_reward_mean", "completions/mean_length", "entropy")
    names += ("grad_norm", "step_time", "time/rollout", "time/update")
    row = {
        "seed": seed,
        "seconds": round(seconds, 1),
        "peak_rss_gib": round(usage.ru_maxrss / 2**20, 2),
        "load_before": round(load, 2),
        "evals": evals,
        "steps": [{k: r.get(k) for k in names} for r in rows],
    }
    measured.write_text(json.dumps(row))
    return row


def _machine() -> dict:
    packages = ("torch", "transformers", "accelerate")
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cores": os.cpu_count(),
        "cpu_flags": sorted(_flags() & {"avx2", "avx512f", "avx512_bf16", "amx_bf16"}),
        "python": platform.python_version(),
        "versions": {"reasonrl": __version__} | {name: version(name) for name in packages},
    }


def _flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split(":")[1].split())
    return set()


def _gain(row: dict) -> tuple[float, float, float, float]:
    """Accuracy before, after, the gain and its standard error, in points."""
    before, after = row["evals"][0], row["evals"][-1]
    error = math.hypot(before["eval/accuracy_se"], after["eval/accuracy_se"])
    a, b = 100 * before["eval/accuracy"], 100 * after["eval/accuracy"]
    return a, b, b - a, 100 * error


def _table(whole: dict) -> str:
    problems = whole["seeds"][0]["evals"][0]["eval/problems"]
    lines = [
        f"Held-out greedy accuracy, {problems} problems a seed, in percent.",
        "",
        "| seed | after the cold start | after RL | gain (SE) | right leading steps"
        " | seconds, whole run | peak RSS, GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    gains = []
    for row in whole["seeds"]:
        before, after, gain, error = _gain(row)
        gains.append((gain, error))
        prefix = " -> ".join(f"{100 * row['evals'][i]['eval/prefix']:.1f}" for i in (0, -1))
        lines.append(
            f"| {row['seed']} | {before:.1f} | {after:.1f} | {gain:+.1f} ({error:.1f}) | {prefix}"
            f" | {row['seconds']:.0f} | {row['peak_rss_gib']:.2f} |"
        )
    mean = sum(g for g, _ in gains) / len(gains)
    error = math.sqrt(sum(e * e for _, e in gains)) / len(gains)
    versions = ", ".join(f"{k} {v}" for k, v in whole["versions"].items())
    lines += [
        "",
        f"Mean gain {mean:+.1f} points, pooled standard error {error:.1f}"
        f" ({mean / error:.1f} standard errors); smallest {min(g for g, _ in gains):+.1f}.",
        f"Measured {whole['date']} on {whole['cores']} CPU cores ({', '.join(whole['cpu_flags'])}),"
        f" Python {whole['python']}, {versions}; load before each run"
        f" {', '.join(str(r['load_before']) for r in whole['seeds'])}.",
        f"Command: `{whole['command']}`",
    ]
    return "\n".join(lines) + "\n"


def _curve(whole: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    for i, row in enumerate(whole["seeds"]):
        reward = [r["reward"] for r in row["steps"] if r["reward"] is not None]
        windows = [reward[max(0, t - WINDOW + 1) : t + 1] for t in range(len(reward))]
        smooth = [sum(window) / len(window) for window in windows]
        axes.plot(range(1, len(smooth) + 1), smooth, color=f"C{i}", alpha=0.45, lw=1)
        steps = [e["step"] for e in row["evals"]]
        accuracy = [e["eval/accuracy"] for e in row["evals"]]
        error = [e["eval/accuracy_se"] for e in row["evals"]]
        axes.errorbar(
            steps, accuracy, error, color=f"C{i}", marker="o", ls="", label=f"seed {row['seed']}"
        )
    axes.set_xlabel("RL step")
    axes.set_ylabel("accuracy")
    axes.set_title(f"dots: held-out, greedy; lines: sampled, mean of {WINDOW}", fontsize=9)
    axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
