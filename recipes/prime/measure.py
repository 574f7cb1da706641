"""PRIME beside outcome-only RLOO over seeds, at equal rollouts and at equal seconds.

    python recipes/prime/measure.py --seeds 1 2 3

A seed: one cold-started policy of the recipe `prime_guesses`, then every arm from it with the same
prompts, loss and number of completions, once with the recipe's steps of 16 prompts x 8 and once
with steps of 2 x 4. What is compared is the mean over the evaluations of an arm's steps (500
held-out test problems each, greedy), paired by seed: how much of the way is done how early,
without a step chosen afterwards. Equal seconds (16 x 8 only): PRIME after s steps against the
outcome arm's last evaluation within the time that s steps of PRIME took (each arm's median step).
Finished arms are not run again. Writes results.json, results.md and curve.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reasonrl.plot_data import T95 as QUANTILES
from reasonrl.plot_data import Line, Panel
from reasonrl.plots import draw

HERE = Path(__file__).resolve().parent
T95 = {n + 1: quantile for n, quantile in enumerate(QUANTILES, 1)}  # by number of seeds
EVERY = 3  # steps between evaluations
GOAL = 0.9  # "reached": the first evaluation at least this good


@dataclass(frozen=True)
class Arm:
    """One way to train: keys on top of the recipe, and the steps that are compared."""

    rate: str
    keys: tuple[str, ...] = ()
    steps: int = 30
    longer: int = 1  # times as many steps are run, for equal seconds


OUTCOME = ("algorithm=grpo", "algo={kind: rloo}")
SMALL = ("prompts_per_step=2", "group=4", "optim.warmup=0")
ARMS = {
    "outcome, 1e-4": Arm("1e-4", OUTCOME, longer=2),
    "PRIME, 1e-4": Arm("1e-4"),
    "outcome, 3e-4": Arm("3e-4", OUTCOME, longer=2),
    "outcome, 1e-4, 2 x 4": Arm("1e-4", SMALL + OUTCOME, 24),
    "PRIME, 1e-4, 2 x 4": Arm("1e-4", SMALL, 24),
    "outcome, 2e-4, 2 x 4": Arm("2e-4", SMALL + OUTCOME, 24),
    "PRIME, 2e-4, 2 x 4": Arm("2e-4", SMALL, 24),
}
PAIRS = [
    ("PRIME, 1e-4", "outcome, 1e-4"),
    ("PRIME, 1e-4", "outcome, 3e-4"),
    ("PRIME, 1e-4, 2 x 4", "outcome, 1e-4, 2 x 4"),
    ("PRIME, 2e-4, 2 x 4", "outcome, 2e-4, 2 x 4"),
    ("PRIME, 1e-4, 2 x 4", "outcome, 2e-4, 2 x 4"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 11)))
    parser.add_argument("--runs", type=Path, default=Path("runs/prime"))
    parser.add_argument("--only-run", action="store_true", help="leave the tables alone")
    options = parser.parse_args()
    results = [seed_of(seed, options.runs) for seed in options.seeds]
    if options.only_run:
        return
    whole = {"seeds": rounded(results)} | about()
    (HERE / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    (HERE / "results.md").write_text(table(whole))
    picture(whole["seeds"], HERE / "curve.svg")
    print(table(whole))


def rounded(value: Any) -> Any:
    """Every number in it to four digits."""
    if isinstance(value, dict):
        return {key: rounded(of) for key, of in value.items()}
    if isinstance(value, list):
        return [rounded(of) for of in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def about() -> dict:
    """When and on what something was measured."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, no GPU, one thread a run",
        "versions": {n: version(n) for n in ("reasonrl", "torch", "transformers")},
    }


def seed_of(seed: int, runs: Path) -> dict:
    """All arms of one seed; what is finished is read, not run."""
    base = runs / f"base-{seed}"
    run(base, ["steps=0", "eval_problems=0", f"seed={seed}", "threads=1"])
    arms = {}
    for name, arm in ARMS.items():
        words = [f"model={base}/checkpoint-0", "cold_start_steps=0"]
        words += [f"learning_rate={float(arm.rate)}", f"steps={arm.steps * arm.longer}"]
        words += [f"eval.every={EVERY}", f"seed={seed}", "threads=1", "log.completions_every=0"]
        out = runs / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        arms[name] = run(out, [*words, *arm.keys])
    return {"seed": seed, "arms": arms}


def run(out: Path, words: list[str]) -> dict:
    """One training run, unless it is finished: its evaluations, steps and processor seconds."""
    done = out / "measured.json"
    if done.exists():
        return json.loads(done.read_text())
    words = ["prime_guesses", *words]
    command = [sys.executable, "-m", "reasonrl.cli", "train", *words, "--out", str(out), "--quiet"]
    if (out / "config.yaml").exists():
        command.append("--resume")
    load, began = os.getloadavg()[0], time.time()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    evals = out / "evals.jsonl"
    rows = [json.loads(line) for line in evals.read_text().splitlines()] if evals.exists() else []
    metrics = out / "metrics.jsonl"
    steps = [json.loads(s) for s in metrics.read_text().splitlines()] if metrics.exists() else []
    names = ("step", "reward", "step_time", "process/prm_accuracy", "process/prm_loss")
    names += ("process/return_std", "frac_reward_zero_std", "entropy", "time/eval")
    row = {
        "command": " ".join(words),
        "seconds": round(time.time() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_mib": usage.ru_maxrss >> 10,
        "load_before": round(load, 2),
        "evals": [{"step": r["step"], "accuracy": r["eval/accuracy"]} for r in rows],
        "steps": [{k: r.get(k) for k in names} for r in steps],
    }
    done.write_text(json.dumps(row))
    return row


def at(arm: dict, step: float) -> float:
    """Accuracy at the last evaluation not after a step."""
    return [e["accuracy"] for e in arm["evals"] if e["step"] <= step][-1]


def per_step(arm: dict) -> float:
    """Seconds of the median step, without its evaluation."""
    return statistics.median(r["step_time"] - (r["time/eval"] or 0.0) for r in arm["steps"])


def area(arm: dict, steps: int, stretch: float = 1.0) -> float:
    """Mean accuracy over the evaluations up to `steps`, each read `stretch` times as late."""
    when = [e["step"] for e in arm["evals"] if 0 < e["step"] <= steps]
    return sum(at(arm, step * stretch) for step in when) / len(when)


def reached(arm: dict) -> str:
    found = [e["step"] for e in arm["evals"] if e["accuracy"] >= GOAL]
    return str(found[0]) if found else "never"


def interval(values: list[float]) -> str:
    """Mean and 95 % t-interval in points of percent, bold where it leaves out zero."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return f"{100 * mean:+.1f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = T95[n] * spread / math.sqrt(n)
    text = f"{100 * mean:+.1f} ({100 * (mean - half):+.1f} to {100 * (mean + half):+.1f})"
    return f"**{text}**" if abs(mean) > half else text


def table(whole: dict) -> str:
    seeds = whole["seeds"]
    lines = [
        "Held-out greedy accuracy, 500 test problems a seed, in percent. Mean: over the"
        " evaluations of the run (10, or 8 of 2 x 4);",
        f"reached: the step of the first evaluation of {100 * GOAL:.0f} % or more.",
        "",
        "| seed | arm | start | mean | last | reached | median seconds a step | peak RSS, MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in seeds:
        for name, arm in row["arms"].items():
            steps = ARMS[name].steps
            shares = at(arm, 0), area(arm, steps), at(arm, steps)
            cells = " | ".join(f"{100 * v:.1f}" for v in shares)
            lines.append(
                f"| {row['seed']} | {name} | {cells} | {reached(arm)}"
                f" | {per_step(arm):.2f} | {arm['peak_rss_mib']} |"
            )
    lines += [
        "",
        "| difference of the means, paired by seed | equal steps | equal seconds |",
        "|---|---|---|",
    ]
    for ours, theirs in PAIRS:
        both = [(row["arms"][ours], row["arms"][theirs]) for row in seeds]
        steps = ARMS[ours].steps
        gaps = [area(a, steps) - area(b, steps) for a, b in both]
        timed = ""
        if ARMS[theirs].longer > 1:
            slower = [per_step(a) / per_step(b) for a, b in both]
            pairs = zip(both, slower, strict=True)
            timed = interval([area(a, steps) - area(b, steps, s) for (a, b), s in pairs])
        lines.append(f"| {ours} - {theirs} | {interval(gaps)} | {timed} |")
    versions = ", ".join(f"{k} {v}" for k, v in whole["versions"].items())
    loads = [arm["load_before"] for row in seeds for arm in row["arms"].values()]
    lines += [
        "",
        f"{len(seeds)} seeds, mean and 95 % t-interval in points. Measured {whole['date']},"
        f" {whole['machine']}, {versions};",
        f"load before a run {min(loads)} to {max(loads)}.",
    ]
    return "\n".join(lines) + "\n"


def picture(results: list[dict], path: Path) -> None:
    """Means over the seeds with 95 % t-intervals, a panel for each size of a step."""
    panels: dict[str, list[Line]] = {"16 prompts x 8": [], "2 prompts x 4": []}
    for name, arm in ARMS.items():
        rows = [row["arms"][name] for row in results]
        x = [e["step"] for e in rows[0]["evals"] if e["step"] <= arm.steps]
        columns = [[100 * at(row, step) for row in rows] for step in x]
        means = [statistics.mean(c) for c in columns]
        half = [T95[len(c)] * statistics.stdev(c) / math.sqrt(len(c)) for c in columns]
        low = [m - h for m, h in zip(means, half, strict=True)]
        high = [m + h for m, h in zip(means, half, strict=True)]
        shown = name.removesuffix(", 2 x 4")
        line = Line(shown, x, means, low, high, dashed=name.startswith("outcome"))
        panels["16 prompts x 8" if shown == name else "2 prompts x 4"].append(line)
    draw(
        [Panel(f"RL step, {size}", "test problems right (%)", of) for size, of in panels.items()],
        path,
    )


if __name__ == "__main__":
    main()
