"""ReasonFlux-PRM's three uses on the tiny recipe's task, over seeds, all through the commands.

    python recipes/reasonflux/measure.py --seeds 1 2 3 4 5          (about 12 minutes a seed)
    python recipes/reasonflux/measure.py --seeds 1 2 --only-run     (in several terminals, then once
                                                                     without it to gather)

A seed: a cold-started policy; a reward model trained on its completions, labelled by the task's
rule; then Best-of-16 on 500 test problems, supervised training on selected completions, and RL
with and without the model's scores. Finished pieces are not run again. Writes results.json
(every seed), results.md (means with 95 % t-intervals over seeds) and best_of_n.svg.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import subprocess
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

from reasonrl.plot_data import Panel, mean_line
from reasonrl.plots import draw

HERE = Path(__file__).resolve().parent
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # two-sided, n seeds
KEEP = 2000
RL = [
    "cold_start_steps=0",
    "steps=120",
    "learning_rate=1.5e-4",
    "eval_problems=1000",
    "log.completions_every=0",
]
ARMS = {  # reinforcement learning from the same policy at equal rollouts
    "outcome": ["tiny", "algorithm=grpo", "algo.kind=dr_grpo"],
    "prm": ["reasonflux"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--runs", type=Path, default=Path("runs/reasonflux"))
    parser.add_argument("--only-run", action="store_true", help="leave the tables alone")
    options = parser.parse_args()
    results = [measure(seed, options.runs / str(seed)) for seed in options.seeds]
    if options.only_run:
        return
    whole = {
        "seeds": results,
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, no GPU",
        "versions": {n: version(n) for n in ("reasonrl", "torch", "transformers")},
    }
    (HERE / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    (HERE / "results.md").write_text(table(results))
    picture(results, HERE / "best_of_n.svg")
    print(table(results))


def measure(seed: int, out: Path) -> dict:
    """All pieces of one seed; what is finished is read, not run."""
    out.mkdir(parents=True, exist_ok=True)
    common = [f"seed={seed}", "threads=1"]
    base, prm = out / "base", out / "prm"
    model = f"model={base}/checkpoint-0"
    run(base, "train", "tiny", "steps=0", "eval_problems=0", *common, "--out", base, "--quiet")
    train, pool, test = (out / f"{name}.jsonl" for name in ("train", "pool", "test"))
    label = ["prm", "label", "tiny", model, f"seed={seed}"]
    run(train, *label, "--problems", 4000, "--out", train)
    run(pool, *label, "--first", 4000, "--problems", 2000, "--out", pool)
    run(test, *label, "--split", "test", "--problems", 500, "--group", 16, "--out", test)
    keys = [model, *common, "delimiter=';'", "dtype=fp32", "steps=1600"]
    keys += ["batch_traces=64", "learning_rate=5e-4"]
    run(prm, "prm", "train", train, *keys, "--out", prm, "--quiet")
    best = out / "best_of_n.json"
    run(best, "best-of-n", prm, test, "--out", best)
    return {
        "seed": seed,
        "load": os.getloadavg()[0],
        "prm": json.loads((prm / "eval.json").read_text()),
        "best_of_n": json.loads(best.read_text()),
        "selection": selection(seed, out, pool, prm, [model, *common]),
        "rl": {arm: learned(out / f"rl_{arm}", arm, prm, [model, *common]) for arm in ARMS},
    }


def learned(out: Path, arm: str, prm: Path, common: list[str]) -> dict:
    """Test accuracy before and after RL."""
    more = [f"algo.prm={prm}"] if arm == "prm" else []
    run(out, "train", *ARMS[arm], *RL, *common, *more, "--out", out, "--quiet")
    rows = [json.loads(line) for line in (out / "evals.jsonl").read_text().splitlines()]
    return {"before": rows[0]["eval/accuracy"], "after": rows[-1]["eval/accuracy"]}


def selection(seed: int, out: Path, pool: Path, prm: Path, common: list[str]) -> dict:
    """Test accuracy after the same supervised training on KEEP answers, chosen in four ways."""
    rows = [json.loads(line) for line in pool.read_text().splitlines()]
    for row in rows:
        row["worked"] = "".join(row["completions"])
    draw = random.Random(seed)
    chosen = {
        "full_pool": rows,
        "random": draw.sample(rows, KEEP),
        "outcome": draw.sample([r for r in rows if r.get("final") == 1.0], KEEP),
    }
    files = {name: out / f"sft_{name}.jsonl" for name in [*chosen, "prm"]}
    for name, some in chosen.items():
        if not files[name].exists():
            files[name].write_text("".join(json.dumps(row) + "\n" for row in some))
    best = ["--keep", KEEP, "--how", "min", "--out", files["prm"]]
    run(files["prm"], "select", prm, pool, *best, "--report", out / "selection.json")
    found = {}
    for name, file in files.items():
        run_dir, result = out / f"sft_{name}", out / f"sft_{name}.json"
        keys = ["steps=150", "learning_rate=3e-4", "eval_problems=0", "task_options={dev: 0.0}"]
        run(run_dir, "train", "sft", f"task={file}", *common, *keys, "--out", run_dir, "--quiet")
        if not result.exists():
            asked = [f"model={run_dir}/checkpoint-150", f"seed={seed}", "eval_problems=1000"]
            text = run(None, "eval", "tiny", *asked)
            result.write_text(text.strip().splitlines()[-1])
        found[name] = json.loads(result.read_text())["eval/accuracy"]
    return found


def run(made: Path | None, *words: object) -> str:
    """One command, unless what it makes is there already."""
    done = made is not None and (made.parent / f".done-{made.name}").exists()
    if done:
        return ""
    command = [sys.executable, "-m", "reasonrl.cli", *map(str, words)]
    text = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    if made is not None:
        (made.parent / f".done-{made.name}").touch()
    return text


def interval(values: list[float]) -> str:
    """Mean and 95 % t-interval in points of percent."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return f"{100 * mean:.1f}"
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1))
    half = T95[n] * spread / math.sqrt(n)
    return f"{100 * mean:.1f} ({100 * (mean - half):.1f}..{100 * (mean + half):.1f})"


def table(results: list[dict]) -> str:
    names = list(results[0]["best_of_n"]["curves"])
    sizes = results[0]["best_of_n"]["n"]
    lines = [
        f"{len(results)} seeds; mean and 95 % t-interval over seeds, percent of test problems.",
        "",
        "**Best-of-N** (500 problems a seed; every way of choosing sees the same completions)",
        "",
        "| " + " | ".join(["", *(f"N = {n}" for n in sizes)]) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for name in names:
        curves = [r["best_of_n"]["curves"][name] for r in results]
        cells = [interval([c[i]["accuracy"] for c in curves]) for i in range(len(sizes))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    gaps = [r["best_of_n"]["prm_minus_majority"]["min"]["accuracy"] for r in results]
    lines += ["", f"PRM (min) minus majority at N = {sizes[-1]}: {interval(gaps)}", ""]
    lines += [f"**Selection** (the same supervised training; {KEEP} answers of 16,000)", ""]
    lines += ["| chosen by | accuracy | minus random |", "|---|---|---|"]
    for name in ("prm", "outcome", "random", "full_pool"):
        got = [r["selection"][name] for r in results]
        gap = [r["selection"][name] - r["selection"]["random"] for r in results]
        lines.append(f"| {name} | {interval(got)} | {interval(gap)} |")
    lines += ["", "**RL** (120 steps from the same policy, equal rollouts; 1000 problems)", ""]
    lines += ["| reward | before | after | minus outcome only |", "|---|---|---|---|"]
    for arm in ARMS:
        before, after = ([r["rl"][arm][k] for r in results] for k in ("before", "after"))
        gap = [r["rl"][arm]["after"] - r["rl"]["outcome"]["after"] for r in results]
        lines.append(f"| {arm} | {interval(before)} | {interval(after)} | {interval(gap)} |")
    steps = [r["prm"]["eval/step_accuracy"] for r in results]
    first = [r["prm"]["eval/first_error_accuracy"] for r in results]
    lines += ["", f"Reward model, held-out prompts: steps right {interval(steps)},"]
    lines += [f"first error at its place {interval(first)}."]
    return "\n".join(lines) + "\n"


def picture(results: list[dict], path: Path) -> None:
    """Mean over seeds with its 95 % t-interval."""
    sizes, lines = results[0]["best_of_n"]["n"], []
    for name in ("oracle", "prm_min", "prm_mean", "weighted", "majority"):
        curves = [[100 * p["accuracy"] for p in r["best_of_n"]["curves"][name]] for r in results]
        lines.append(mean_line(name, sizes, curves, dashed=name in ("oracle", "majority")))
    draw([Panel("completions (N)", "test problems right (%)", lines, log2=True)], path)


if __name__ == "__main__":
    main()
