"""Trust-GRPO beside its ablations over seeds, with a sound and with a corrupted reward model.

    python recipes/sophia/measure.py --seeds 1 2 3 4 5

The reward model is the task's own rule, the share of right steps: as good as one can be, and with
`inverted` as bad (1 - share: it likes wrong thinking). So what differs between the arms is trust
and annealing, not how well a small reward model happened to learn. A seed: one cold-started policy,
then all arms from it: plain GRPO; with the thinking reward, untrusted; trusted; trusted and
annealed; and the last three with the corrupted reward model.
Held-out pictures are judged at the end. Finished runs are not run again.
Writes results.json (every seed), results.md (means, 95 % t-intervals of paired differences) and
curve.svg. Two runs at a time with --jobs 2.
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
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from reasonrl.plot_data import Line, Panel, trailing_mean
from reasonrl.plots import draw

HERE = Path(__file__).resolve().parent
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}
T95 |= {9: 2.306, 10: 2.262, 11: 2.228, 12: 2.201}  # two-sided, n seeds
STEPS, PROMPTS, PROBLEMS, COLD = 50, 32, 500, 220
ALPHA = 1.0  # the paper has 0.3; a corrupted model must be able to do harm
SHARED = ["threads=1", "eval.batch=128"]
RL = [
    "cold_start_steps=0",
    f"steps={STEPS}",
    f"prompts_per_step={PROMPTS}",
    # plain GRPO: 1e-4 before 3e-5 on a development split; 3e-4 lost 12 test points on seed 1
    "learning_rate=1e-4",
    f"eval_problems={PROBLEMS}",
    "eval.at_start=false",
]
PLAIN = ["algorithm=grpo", "algo={kind: dr_grpo}"]
ARMS = {
    "plain GRPO": None,
    "thinking": {"trust": False, "anneal": False},
    "thinking, trust": {"anneal": False},
    "thinking, trust, annealed": {},
    "corrupted": {"trust": False, "anneal": False, "inverted": True},
    "corrupted, trust": {"anneal": False, "inverted": True},
    "corrupted, trust, annealed": {"inverted": True},
}
MEASURES = {"accuracy": "accuracy", "steps": "right steps", "lucky": "lucky among the right"}
PAIRS = [
    ("corrupted, trust", "corrupted"),
    ("corrupted, trust, annealed", "corrupted"),
    ("corrupted, trust, annealed", "corrupted, trust"),
    ("thinking", "plain GRPO"),
    ("thinking, trust", "thinking"),
    ("thinking, trust, annealed", "plain GRPO"),
    ("corrupted", "plain GRPO"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, default=Path("runs/sophia-measure"))
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    options = parser.parse_args()
    jobs = [(seed, arm) for seed in options.seeds for arm in ARMS]
    with ThreadPoolExecutor(options.jobs) as pool:
        bases = list(pool.map(lambda seed: base(options.runs, seed), options.seeds))
        done = list(pool.map(lambda job: run_arm(options.runs, *job), jobs))
    found: dict[int, dict] = {seed: {} for seed in options.seeds}
    for (seed, arm), row in zip(jobs, done, strict=True):
        found[seed][arm] = row
    whole = {
        "steps": STEPS,
        "prompts": PROMPTS,
        "problems": PROBLEMS,
        "alpha": ALPHA,
        "seeds": [
            {"seed": seed, "base": row, **found[seed]}
            for seed, row in zip(options.seeds, bases, strict=True)
        ],
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, no GPU, one thread a run",
        "versions": {n: version(n) for n in ("reasonrl", "torch", "transformers")},
    }
    (HERE / "results.json").write_text(json.dumps(rounded(whole)) + "\n")
    (HERE / "results.md").write_text(table(whole))
    picture(whole, HERE / "curve.svg")
    print(table(whole))


def rounded(value):
    """Nested values with four digits behind the point: more is noise."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


def base(runs: Path, seed: int) -> dict:
    """A cold-started policy of a seed, judged."""
    words = ["sophia", *PLAIN, f"seed={seed}", f"cold_start_steps={COLD}", "steps=0"]
    return run(runs / f"base-{seed}", [*words, f"eval_problems={PROBLEMS}", *SHARED])


def run_arm(runs: Path, seed: int, arm: str) -> dict:
    name = arm.replace(", ", "-").replace(" ", "-")
    knobs = ARMS[arm]
    algo = PLAIN
    if knobs is not None:
        algo = ["algo=" + json.dumps({"kind": "dr_grpo", "alpha": ALPHA, "scorer": "rule"} | knobs)]
    model = f"model={runs}/base-{seed}/checkpoint-0"
    words = ["sophia", model, f"seed={seed}", *RL, *SHARED, *algo, "log.completions_every=0"]
    return run(runs / f"{name}-{seed}", words)


def run(out: Path, words: list[str]) -> dict:
    """One training run, unless it is finished: evaluations and steps."""
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
    rows, steps = read(out / "evals.jsonl"), read(out / "metrics.jsonl")
    names = ("step", "reward", "step_time", "time/score", "process/gamma", "process/outcome_mean")
    names += ("process/thinking_right", "process/thinking_wrong", "process/thinking_weight")
    names += ("process/no_contrast", "process/thinking_unscorable", "process/lucky")
    names += ("process/step_reward_mean", "loss")
    row = {
        "command": " ".join(words),
        "seconds": round(time.time() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_mib": usage.ru_maxrss >> 10,
        "load_before": round(load, 2),
        "evals": [{k.removeprefix("eval/"): v for k, v in r.items()} for r in rows],
        "steps": [{k: r.get(k) for k in names if k in r} for r in steps],
    }
    done.write_text(json.dumps(row))
    return row


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def last(row: dict, measure: str) -> float:
    return row["evals"][-1][measure]


def mean(row: dict, name: str) -> float:
    """Of a training metric over the run's steps, where it is known."""
    values = [s[name] for s in row["steps"] if s.get(name) is not None]
    return sum(values) / len(values) if values else math.nan


def interval(values: list[float], sign: str = "") -> str:
    """Mean and 95 % t-interval in points of percent."""
    n = len(values)
    middle = sum(values) / n
    if n < 2:
        return f"{100 * middle:{sign}.1f}"
    spread = math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1))
    half = T95[n] * spread / math.sqrt(n)
    low, high = 100 * (middle - half), 100 * (middle + half)
    return f"{100 * middle:{sign}.1f} ({low:{sign}.1f} to {high:{sign}.1f})"


def table(whole: dict) -> str:
    seeds = whole["seeds"]
    lines = [
        f"{len(seeds)} seeds, {whole['steps']} steps of {whole['prompts']} pictures x 8"
        f" completions, alpha {whole['alpha']:g}; {whole['problems']} held-out pictures a seed,"
        " greedy. Percent, mean and 95 % t-interval over seeds.",
        "",
        "| arm | "
        + " | ".join(MEASURES.values())
        + " | gamma | score of the thinking, right / wrong |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ("base", *ARMS):
        rows = [seed[arm] for seed in seeds]
        cells = [interval([last(r, m) for r in rows]) for m in MEASURES]
        more = ["", ""]
        if arm != "base" and ARMS[arm] is not None:
            shown = [
                sum(mean(r, f"process/{name}") for r in rows) / len(rows)
                for name in ("gamma", "thinking_right", "thinking_wrong")
            ]
            more = [f"{shown[0]:.2f}", f"{shown[1]:.2f} / {shown[2]:.2f}"]
        name = "cold start" if arm == "base" else arm
        lines.append(f"| {name} | " + " | ".join([*cells, *more]) + " |")
    lines += ["", "| difference, paired by seed | " + " | ".join(MEASURES.values()) + " |"]
    lines.append("|---|---|---|---|")
    for one, other in PAIRS:
        gaps = [[last(s[one], m) - last(s[other], m) for s in seeds] for m in MEASURES]
        lines.append(f"| {one} - {other} | " + " | ".join(interval(g, "+") for g in gaps) + " |")
    versions = ", ".join(f"{k} {v}" for k, v in whole["versions"].items())
    loads = [seed[arm]["load_before"] for seed in seeds for arm in ARMS]
    lines += [
        "",
        f"Measured {whole['date']}, {whole['machine']}, {versions}; load before a run"
        f" {min(loads)} to {max(loads)}.",
    ]
    return "\n".join(lines) + "\n"


def picture(whole: dict, path: Path) -> None:
    """Mean over seeds, each smoothed over five steps; the table has the intervals."""
    panels = []
    for name, label in (
        ("process/outcome_mean", "sampled outcome"), ("process/step_reward_mean", "right steps")
    ):  # fmt: skip
        lines = []
        for arm in ARMS:
            steps = [seed[arm]["steps"] for seed in whole["seeds"]]
            curves = [trailing_mean([s.get(name, s["reward"]) for s in one], 5) for one in steps]
            mean = [sum(column) / len(column) for column in zip(*curves, strict=True)]
            lines.append(Line(arm, range(1, len(mean) + 1), mean))
        panels.append(Panel("RL step", label, lines))
    draw(panels, path)


if __name__ == "__main__":
    main()
