"""GRPO with and without the motivation, and with wrong ones, over seeds.

    python recipes/merf/measure.py --seeds 0 1 2 3 4            # arithmetic behind a letter
    python recipes/merf/measure.py --task knights               # Knights and Knaves behind a letter

A seed: one cold-started policy that was taught to read motivations, then all arms from it, alike in
all but the text: nothing; the whole truth; numbers without conditions; the suboptimal half; the
adverse text. At the end every arm is asked with the plain prompt and with the full text. Finished
runs are not run again, interrupted ones go on. Writes results.json (every seed), results.md (means,
95 % t-intervals of paired differences) and curve.svg, or knights.json, knights.md and knights.svg.
--jobs 2 runs two at a time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # two-sided, n seeds
STEPS, HALF = 50, 25
LOADING = threading.Lock()  # transformers loads one model at a time in a process
SHARED = ["threads=1", "log.completions_every=0"]
RL = ["cold_start_steps=0", f"steps={STEPS}", "eval.at_start=false", f"eval.every={HALF}"]
ARMS = {
    "none": ["algo.motivated=0.0"],
    "full": [],
    "score only": ["algo.variant=score"],
    "suboptimal": ["algo.variant=correctness_only"],
    "adverse": ["algo.variant=adverse"],
}
PAIRS = [
    ("full", "none"),
    ("score only", "none"),
    ("suboptimal", "none"),
    ("full", "suboptimal"),
    ("adverse", "none"),
    ("adverse", "full"),
]
# column: heading, what it is times
MEASURES = {
    "plain": ("right, plain prompt", 100),
    "told": ("right, full text", 100),
    "plain_reward": ("reward, plain prompt", 1),
    "first": (f"sampled reward, steps 1-{HALF}", 1),
    "last": (f"sampled reward, steps {STEPS - HALF + 1}-{STEPS}", 1),
    "run": ("sampled reward, whole run", 1),
}


@dataclass(frozen=True)
class Setting:
    """A recipe, where its results go, and its cold start: `more` steps at a time until `enough` of
    the development problems are right with the plain prompt. From too weak a start outcome rewards
    teach no arm anything."""

    recipe: str
    files: tuple[str, str, str]
    runs: Path
    more: int
    enough: float


SETTINGS = {
    "marks": Setting(
        "merf_tiny", ("results.json", "results.md", "curve.svg"), Path("runs/merf-measure"), 40, 0.5
    ),
    "knights": Setting(
        "merf_knights_tiny",
        ("knights.json", "knights.md", "knights.svg"),
        Path("runs/merf-knights"),
        100,
        0.4,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--task", default="marks", choices=list(SETTINGS))
    parser.add_argument("--runs", type=Path, help="where the runs lie")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    options = parser.parse_args()
    setting = SETTINGS[options.task]
    if options.runs:
        setting = replace(setting, runs=options.runs)
    jobs = [(seed, arm) for arm in options.arms for seed in options.seeds]
    with ThreadPoolExecutor(options.jobs) as pool:
        bases = list(pool.map(lambda seed: base(setting, seed), options.seeds))
        done = list(pool.map(lambda job: run_arm(setting, *job), jobs))
    found: dict[int, dict] = {seed: {} for seed in options.seeds}
    for (seed, arm), row in zip(jobs, done, strict=True):
        found[seed][arm] = row
    whole = {
        "steps": STEPS,
        "seeds": [
            {"seed": seed, "base": row, **found[seed]}
            for seed, row in zip(options.seeds, bases, strict=True)
        ],
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, no GPU, one thread a run",
        "versions": {n: version(n) for n in ("reasonrl", "torch", "transformers")},
    }
    data, text, curve = (HERE / name for name in setting.files)
    data.write_text(json.dumps(rounded(whole)) + "\n")
    text.write_text(table(whole))
    picture(whole, curve)
    print(table(whole))


def rounded(value):
    """Nested values with four digits behind the point: more is noise."""
    if isinstance(value, dict):
        return {key: rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [rounded(inner) for inner in value]
    return round(value, 4) if isinstance(value, float) else value


def base(setting: Setting, seed: int) -> dict:
    """A seed's cold-started policy, judged like the arms: the recipe's cold start, and as many more
    steps as the setting's rule asks for."""
    out = setting.runs / f"base-{seed}"
    dev = ["steps=0", "eval_problems=300", "eval.split=dev", *SHARED]
    found = run(setting, out, [f"seed={seed}", *dev])
    count = 0
    while found["evals"][-1]["accuracy"] < setting.enough and count < 10:
        count += 1
        words = [f"model={out}/checkpoint-0", "model_options={}", f"seed={seed + 1000 * count}"]
        words += [f"cold_start_steps={setting.more}", "task_options.reading=0"]
        out = setting.runs / f"base-{seed}-{count}"
        found = run(setting, out, [*words, *dev])
    judged = [f"model={out}/checkpoint-0", "model_options={}", f"seed={seed}"]
    words = [*judged, "cold_start_steps=0", "steps=0", *SHARED]
    return run(setting, setting.runs / f"start-{seed}", words) | {"more": setting.more * count}


def run_arm(setting: Setting, seed: int, arm: str) -> dict:
    start = setting.runs / f"start-{seed}" / "checkpoint-0"
    model = [f"model={start}", "model_options={}", f"seed={seed}"]
    out = setting.runs / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"
    return run(setting, out, [*model, *RL, *SHARED, *ARMS[arm]])


def run(setting: Setting, out: Path, words: list[str]) -> dict:
    """One training run, unless it is finished: evaluations and steps."""
    done = out / "measured.json"
    if done.exists():
        return json.loads(done.read_text())
    command = [sys.executable, "-m", "reasonrl.cli", "train", setting.recipe, *words]
    command += ["--out", str(out), "--quiet"]
    if (out / "config.yaml").exists():
        command.append("--resume")
    load, began = os.getloadavg()[0], time.time()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    names = ("step", "reward", "entropy", "step_time", "completions/mean_length")
    row = {
        "command": f"reasonrl train {setting.recipe} {' '.join(words)}",
        "seconds": round(time.time() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "load_before": round(load, 2),
        "evals": [
            {k.removeprefix("eval/"): v for k, v in r.items()} for r in read(out / "evals.jsonl")
        ],
        "steps": [{k: r.get(k) for k in names} for r in read(out / "metrics.jsonl")],
        "told": told(out),
    }
    done.write_text(json.dumps(row))
    return row


def told(out: Path) -> dict:
    """The finished policy asked with the full text, whatever it was trained with."""
    from reasonrl import config as configs
    from reasonrl import models
    from reasonrl.algos import Merf
    from reasonrl.algos.base import make
    from reasonrl.evaluate import evaluate
    from reasonrl.tasks import make_task

    config = configs.load(out / "config.yaml")
    folder = max(out.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    with LOADING:
        policy = models.load(str(folder), dtype="fp32", device="cpu", seed=config.seed)
    task = make_task(config.task, seed=config.seed, **config.task_options)
    algo = make(Merf, task, policy, {"text": "short"})
    limits = (config.eval.split, config.eval_problems, config.max_completion_length)
    found, _ = evaluate(algo, *limits, config.eval.batch, trained_prompt=True)
    return {name: found[f"eval/{name}"] for name in ("accuracy", "reward")}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def measure(row: dict, name: str) -> float:
    """One number of a run, in the unit of its column."""
    last, rewards = row["evals"][-1], [s["reward"] for s in row["steps"]]
    parts = {"first": rewards[:HALF], "last": rewards[-HALF:], "run": rewards}
    if name in parts:
        return sum(parts[name]) / len(parts[name]) if rewards else math.nan
    asked = row["told"] or {"accuracy": math.nan}  # None: cut off before it was asked so
    found = {"plain": last["accuracy"], "plain_reward": last["reward"]}
    return MEASURES[name][1] * (found | {"told": asked["accuracy"]})[name]


def interval(values: list[float], name: str, sign: str = "") -> str:
    """Mean and 95 % t-interval; nothing of nothing."""
    if not values:
        return ""
    n, form = len(values), f"{sign}.{1 if MEASURES[name][1] == 100 else 2}f"
    middle = sum(values) / n
    if math.isnan(middle):
        return ""
    if n < 2:
        return f"{middle:{form}}"
    spread = math.sqrt(sum((v - middle) ** 2 for v in values) / (n - 1))
    half = T95[n] * spread / math.sqrt(n)
    return f"{middle:{form}} ({middle - half:{form}} to {middle + half:{form}})"


def table(whole: dict) -> str:
    seeds = whole["seeds"]
    problems = seeds[0]["base"]["evals"][-1]["problems"]
    arms = [arm for arm in ARMS if any(arm in s for s in seeds)]
    halves = () if whole["steps"] > HALF else ("last", "run")  # nothing of their own
    columns = [name for name in MEASURES if name not in halves]
    heads = " | ".join(MEASURES[name][0] for name in columns)
    lines = [
        f"{len(seeds)} seeds, {whole['steps']} steps; {problems} held-out problems a seed, greedy."
        " Right answers in percent, behind any letter; reward from -3 to 3. Mean and 95 %"
        " t-interval over seeds.",
        "",
        f"| arm | {heads} |",
        f"|{'---|' * (1 + len(columns))}",
    ]
    for arm in ("base", *arms):
        there = [s[arm] for s in seeds if arm in s]
        cells = [interval([measure(row, m) for row in there], m) for m in columns]
        few = f", {len(there)} seeds" if len(there) < len(seeds) else ""
        lines.append(f"| {'cold start' if arm == 'base' else arm}{few} | {' | '.join(cells)} |")
    lines += ["", f"| difference, paired by seed | {heads} |", f"|{'---|' * (1 + len(columns))}"]
    for one, other in PAIRS:
        both = [(s[one], s[other]) for s in seeds if {one, other} <= {*s}]
        gaps = {m: [measure(a, m) - measure(b, m) for a, b in both] for m in columns}
        cells = [interval(g, m, "+") for m, g in gaps.items()]
        few = f", {len(both)} seeds" if len(both) < len(seeds) else ""
        if both:
            lines.append(f"| {one} - {other}{few} | {' | '.join(cells)} |")
    lines += ["", "Right answers with the plain prompt, over the run:", ""]
    marks = [e["step"] for e in next(s[arm] for s in seeds for arm in arms if arm in s)["evals"]]
    lines += [
        f"| arm | {' | '.join(f'step {m}' for m in marks)} |",
        f"|{'---|' * (1 + len(marks))}",
    ]
    for arm in arms:
        there = [s[arm]["evals"] for s in seeds if arm in s]
        columns = [[100 * row[i]["accuracy"] for row in there] for i in range(len(marks))]
        lines.append(f"| {arm} | {' | '.join(interval(c, 'plain') for c in columns)} |")
    lines += ["", "Seed by seed, right answers with the plain prompt / the full text:", ""]
    lines += [f"| seed | cold start | {' | '.join(arms)} |", f"|{'---|' * (2 + len(arms))}"]
    for s in seeds:
        both = [
            f"{measure(s[a], 'plain'):.1f} / {measure(s[a], 'told'):.1f}".removesuffix(" / nan")
            if a in s
            else ""
            for a in ("base", *arms)
        ]
        lines.append(f"| {s['seed']} | {' | '.join(both)} |")
    versions = ", ".join(f"{k} {v}" for k, v in whole["versions"].items())
    runs = [s[arm] for s in seeds for arm in arms if arm in s and "cpu_seconds" in s[arm]]
    took = "no run was finished, so none has a time"
    if runs:
        took = (
            f"a run took {min(r['cpu_seconds'] for r in runs):.0f} to"
            f" {max(r['cpu_seconds'] for r in runs):.0f} processor seconds, load before a run"
            f" {min(r['load_before'] for r in runs)} to {max(r['load_before'] for r in runs)}"
        )
    lines += ["", f"Measured {whole['date']}, {whole['machine']}, {versions}; {took}."]
    return "\n".join(lines) + "\n"


def picture(whole: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for i, arm in enumerate(a for a in ARMS if any(a in seed for seed in whole["seeds"])):
        rows = [seed[arm] for seed in whole["seeds"] if arm in seed]
        middle = [
            sum(c) / len(c)
            for c in zip(*([s["reward"] for s in r["steps"]] for r in rows), strict=True)
        ]
        axes[0].plot(range(1, len(middle) + 1), middle, color=f"C{i}", label=arm)
        there = [seed["base"] for seed in whole["seeds"] if arm in seed]
        start = [100 * b["evals"][-1]["accuracy"] for b in there]
        points = [[100 * e["accuracy"] for e in r["evals"]] for r in rows]
        means = [sum(c) / len(c) for c in [start, *zip(*points, strict=True)]]
        steps = [0, *(e["step"] for e in rows[0]["evals"])]
        axes[1].plot(steps, means, "o-", color=f"C{i}", label=arm)
    axes[0].set(xlabel="RL step", ylabel="sampled reward")
    axes[1].set(xlabel="RL step", ylabel="held-out right, plain prompt, %")
    axes[0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
