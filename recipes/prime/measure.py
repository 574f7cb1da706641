"""PRIME beside outcome-only RLOO over seeds, at equal rollouts and at equal seconds.

    python recipes/prime/measure.py --seeds 1 2 3 4 5

A seed: one cold-started policy, then both arms from it with the same filter, loss and rate.
Held-out test problems are judged every few steps. Equal rollouts: both after STEPS steps. Equal
seconds: the outcome arm runs on, and is read at its last evaluation within the time that PRIME's
steps took (by each arm's median step). Finished arms are not run again. Writes results.json (every
seed), results.md (means, 95 % t-intervals of the paired difference) and curve.svg.
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
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # two-sided, n seeds
STEPS, EVERY, PROBLEMS = 80, 20, 500
LONGER = 2.0  # how many times PRIME's steps the outcome arm runs, for equal seconds
TASK = "task_options={terms: 4, ops: '+-*', mod: 5, low: 0, high: 4, style: compact}"
COLD = [
    "model_options={width: 64, layers: 2, heads: 2}",
    "cold_start_steps=350",
    "cold_start.learning_rate=3e-3",
    "steps=0",
    "eval_problems=0",
]
RL = [
    "cold_start_steps=0",
    "learning_rate=3e-4",
    "optim.schedule=constant",
    f"eval_problems={PROBLEMS}",
    f"eval.every={EVERY}",
    "log.completions_every=0",
]
ARMS = {
    "outcome": ["algorithm=grpo", "algo={kind: rloo}", f"steps={int(STEPS * LONGER)}"],
    "prime": [f"steps={STEPS}"],  # PRIME's own keys are added by --prime
}
PRIME = "algo={beta: 1.0, prm_learning_rate: 1.0e-5, whiten: false}"  # the best of the search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, default=Path("runs/prime"))
    parser.add_argument("--prime", default=PRIME, help="PRIME's own keys")
    parser.add_argument("--only-run", action="store_true", help="leave the tables alone")
    options = parser.parse_args()
    results = [seed_of(seed, options) for seed in options.seeds]
    if options.only_run:
        return
    whole = {
        "prime": options.prime,
        "steps": STEPS,
        "problems": PROBLEMS,
        "seeds": results,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, no GPU, one thread a run",
        "versions": {n: version(n) for n in ("reasonrl", "torch", "transformers")},
    }
    (HERE / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    (HERE / "results.md").write_text(table(whole))
    picture(results, HERE / "curve.svg")
    print(table(whole))


def seed_of(seed: int, options: argparse.Namespace) -> dict:
    """Both arms of one seed; what is finished is read, not run."""
    base = options.runs / f"base-{seed}"
    run(base, ["tiny", TASK, *COLD, f"seed={seed}", "threads=1"])
    model = f"model={base}/checkpoint-0"
    found: dict = {"seed": seed}
    for arm, keys in ARMS.items():
        own = [options.prime] if arm == "prime" else []
        out = options.runs / f"{arm}-{seed}"
        words = ["prime", TASK, model, f"seed={seed}", "threads=1", *RL, *keys, *own]
        found[arm] = run(out, words)
    return found


def run(out: Path, words: list[str]) -> dict:
    """One training run, unless it is finished: its evaluations, steps and processor seconds."""
    done = out / "measured.json"
    if done.exists():
        return json.loads(done.read_text())
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
    names += ("process/return_std", "filter/kept", "entropy", "time/eval")
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
    """Seconds of the median step, which holds no evaluation."""
    return statistics.median(row["step_time"] for row in arm["steps"])


def interval(values: list[float]) -> str:
    """Mean and 95 % t-interval in points of percent."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return f"{100 * mean:.1f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = T95[n] * spread / math.sqrt(n)
    return f"{100 * mean:+.1f} ({100 * (mean - half):+.1f}..{100 * (mean + half):+.1f})"


def table(whole: dict) -> str:
    results, steps = whole["seeds"], whole["steps"]
    lines = [
        f"Held-out greedy accuracy on {whole['problems']} test problems a seed, in percent;"
        f" {steps} steps of PRIME.",
        "",
        "| seed | cold start | outcome, equal rollouts | outcome, equal seconds | PRIME"
        " | median seconds a step, outcome / PRIME | peak RSS MiB |",
        "|---|---|---|---|---|---|---|",
    ]
    rollouts, seconds = [], []
    for row in results:
        outcome, prime = row["outcome"], row["prime"]
        reach = steps * per_step(prime) / per_step(outcome)
        values = [at(prime, 0), at(outcome, steps), at(outcome, reach), at(prime, steps)]
        rollouts.append(values[3] - values[1])
        seconds.append(values[3] - values[2])
        cells = " | ".join(f"{100 * v:.1f}" for v in values)
        lines.append(
            f"| {row['seed']} | {cells} | {per_step(outcome):.2f} / {per_step(prime):.2f}"
            f" | {outcome['peak_rss_mib']} / {prime['peak_rss_mib']} |"
        )
    loads = ", ".join(str(r[arm]["load_before"]) for r in results for arm in ARMS)
    lines += [
        "",
        f"PRIME minus outcome-only at equal rollouts: **{interval(rollouts)}**; at equal seconds:"
        f" **{interval(seconds)}** (mean and 95 % t-interval of the paired difference).",
        f"PRIME: `{whole['prime']}`.",
        f"Measured {whole['date']}, {whole['machine']}; load before each run {loads}.",
    ]
    return "\n".join(lines) + "\n"


def picture(results: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    for i, arm in enumerate(ARMS):
        for row in results:
            x = [e["step"] for e in row[arm]["evals"]]
            y = [100 * e["accuracy"] for e in row[arm]["evals"]]
            axes.plot(x, y, color=f"C{i}", alpha=0.25)
        x = [e["step"] for e in results[0][arm]["evals"]]
        axes.plot(x, mean_curve(results, arm), color=f"C{i}", lw=2, label=arm)
    axes.set(xlabel="RL step", ylabel="test problems right (%)")
    axes.legend(fontsize=8)
    figure.savefig(path, metadata={"Date": None})


def mean_curve(results: list[dict], arm: str) -> list[float]:
    columns = zip(*([e["accuracy"] for e in row[arm]["evals"]] for row in results), strict=True)
    return [100 * sum(column) / len(results) for column in columns]


if __name__ == "__main__":
    main()
