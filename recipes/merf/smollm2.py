"""The arms of `measure.py` from SmolLM2-135M-Instruct, which reads its reward in English words.

    python recipes/merf/smollm2.py --device cuda --jobs 15

A seed: one cold-started policy, then five arms of 50 steps from it, alike in all but the text; at
the end every arm is asked with the plain prompt and with the full text. A run is a process of its
own. A finished one leaves RUNS/ARM-SEED.json and is not run again, an interrupted one begins anew
(no optimiser is saved). The arms of --arms are run in that order. Writes smollm2.json, smollm2.md
and smollm2.svg of all that is there; --only-read runs nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from measure import ARMS, HALF, HERE, STEPS, picture, read, rounded, table

ORDER = ["none", "full", "adverse", "suboptimal", "score only"]  # what matters most comes first
TASK = ["task=marks", "task_options={text: words, reading: 0}", "max_completion_length=24"]
SHARED = [*TASK, "threads=1", "log.completions_every=0", "eval.batch=256"]
COLD = ["steps=0", "cold_start_steps=24", "cold_start.batch=16", "eval.split=dev"]
MORE, ENOUGH, PIECES = 20, 0.3, 5  # the cold start goes on until enough is right with no text
RL = ["cold_start_steps=0", f"steps={STEPS}", "prompts_per_step=32", "group=8"]
RL += ["learning_rate=3e-5", "eval.at_start=false", f"eval.every={HALF}", "batch.tokens=3072"]
DEV = 200  # problems of that rule
NAMES = ("step", "reward", "entropy", "step_time", "completions/mean_length", "grad_norm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=ORDER, choices=list(ARMS))
    parser.add_argument("--runs", type=Path, default=Path("runs/merf-smollm2"))
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--problems", type=int, default=500, help="held-out ones, a seed")
    parser.add_argument("--split", default="test", choices=["dev", "test"], help="their split")
    parser.add_argument("--only-run", action="store_true", help="leave the tables alone")
    parser.add_argument("--only-read", action="store_true", help="tables of what is finished")
    parser.add_argument("--half", action="store_true", help="tables at the middle of every arm")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # in its own process: an arm, or base
    parser.add_argument("--set", nargs="*", default=[], metavar="key.path=value")
    options = parser.parse_args()
    if options.one:
        one(options, options.one, options.seeds[0])
        return
    if not options.only_read:
        with ThreadPoolExecutor(options.jobs) as pool:
            bases = list(pool.map(lambda seed: process(options, "base", seed), options.seeds))
            ready = [seed for seed, done in zip(options.seeds, bases, strict=True) if done]
            jobs = [(arm, seed) for arm in options.arms for seed in ready]
            arms = list(pool.map(lambda job: process(options, *job), jobs))
        if not all(bases + arms):
            print(f"{len(bases + arms) - sum(bases + arms)} runs failed", file=sys.stderr)
    if not options.only_run:
        write(options)


def process(options: argparse.Namespace, arm: str, seed: int) -> bool:
    """One run in a process of its own, unless it is finished; whether it is now."""
    if place(options.runs, arm, seed).exists():
        return True
    command = [sys.executable, __file__, "--one", arm, "--seeds", str(seed)]
    command += ["--runs", str(options.runs), "--device", options.device]
    command += ["--problems", str(options.problems), "--split", options.split]
    command += ["--set", *options.set]
    return (
        subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
        == 0
    )


def place(runs: Path, arm: str, seed: int) -> Path:
    return runs / f"{arm.replace(' ', '-')}-{seed}.json"


def one(options: argparse.Namespace, arm: str, seed: int) -> None:
    began, load = time.time(), os.getloadavg()[0]
    words = [*SHARED, f"device={options.device}", f"seed={seed}"]
    row = (base if arm == "base" else run_arm)(options, arm, seed, words)
    row |= {
        "seconds": round(time.time() - began, 1),
        "cpu_seconds": round(time.process_time(), 1),
        "load_before": round(load, 2),
        "where": where(),
    }
    done = place(options.runs, arm, seed)
    half = done.with_suffix(".tmp")
    half.write_text(json.dumps(rounded(row)) + "\n")
    half.rename(done)


def base(options: argparse.Namespace, arm: str, seed: int, words: list[str]) -> dict:
    """The cold start, and more of it until ENOUGH of the development problems are right with the
    plain prompt; then judged like the arms."""
    folder = options.runs / f"base-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    judged = [f"eval_problems={DEV}"]
    run = started(folder / "0", [*words, *COLD, *judged, *options.set, "steps=0"])
    pieces = 0
    while read(folder / str(pieces) / "evals.jsonl")[-1]["eval/accuracy"] < ENOUGH:
        if pieces == PIECES:
            break
        pieces += 1
        run.algo.policy.save(folder / "model")
        more = [f"model={folder / 'model'}", "model_options={}", f"seed={seed + 1000 * pieces}"]
        more += [f"cold_start_steps={MORE}", "cold_start.learning_rate=1e-4"]
        run = started(
            folder / str(pieces), [*words, *COLD, *judged, *options.set, "steps=0", *more]
        )
    run.algo.policy.save(folder / "model")
    found = measured(options, run)
    return {"evals": [found["plain"]], "told": found["told"], "steps": [], "more": MORE * pieces}


def run_arm(options: argparse.Namespace, arm: str, seed: int, words: list[str]) -> dict:
    folder = options.runs / f"{arm.replace(' ', '-')}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    words = [*words, *RL, *ARMS[arm], f"eval_problems={options.problems}", *options.set]
    words.append(f"eval.split={options.split}")
    words += [f"model={options.runs / f'base-{seed}' / 'model'}", "model_options={}"]
    run = started(folder, words)
    rows = read(folder / "evals.jsonl")
    return {
        "command": f"reasonrl train merf {' '.join(words)}",
        "evals": [{k.removeprefix("eval/"): v for k, v in row.items()} for row in rows],
        "steps": [{k: r.get(k) for k in NAMES} for r in read(folder / "metrics.jsonl")],
        "told": measured(options, run, ["told"])["told"],
    }


def started(out: Path, words: list[str]):
    """A finished run that left no checkpoint: 15 optimiser states would fill a disk."""
    from reasonrl import config, train

    class Run(train.Run):
        def _save(self) -> None:
            self.saved = (self.cold, self.step)

    run = Run(config.load("merf", words), out, resume=False, quiet=True)
    if not run.train():
        raise SystemExit("stopped before its end")
    return run


def measured(options: argparse.Namespace, run, prompts=("plain", "told")) -> dict:
    """The policy asked with the plain prompt and with the full text, whatever it learned with."""
    from reasonrl.algos import Merf
    from reasonrl.algos.base import make
    from reasonrl.evaluate import evaluate

    config, algo = run.config, make(Merf, run.algo.task, run.algo.policy, {})
    limits = (options.split, options.problems, config.max_completion_length, config.eval.batch)
    out = {}
    for name in prompts:
        found, _ = evaluate(algo, *limits, trained_prompt=name == "told")
        out[name] = {k.removeprefix("eval/"): v for k, v in found.items()} | {"step": 0}
    return out


def write(options: argparse.Namespace) -> None:
    """The tables of every seed whose cold start is finished, with the arms that are."""
    seeds = []
    for seed in options.seeds:
        places = {arm: place(options.runs, arm, seed) for arm in ("base", *ARMS)}
        rows = {arm: json.loads(p.read_text()) for arm, p in places.items() if p.exists()}
        if options.half:
            rows |= {arm: found for arm in ARMS if (found := half_way(options.runs, arm, seed))}
        if "base" in rows:
            seeds.append({"seed": seed, **rows})
    if not seeds:
        raise SystemExit(f"{options.runs}: no seed's cold start is finished")
    steps = HALF if options.half else STEPS
    whole = {"steps": steps, "seeds": seeds, **seeds[0]["base"]["where"]}
    (HERE / "smollm2.json").write_text(json.dumps(rounded(whole)) + "\n")
    (HERE / "smollm2.md").write_text(table(whole))
    picture(whole, HERE / "smollm2.svg")
    print(table(whole))


def half_way(runs: Path, arm: str, seed: int) -> dict:
    """An arm as it stood at its evaluation in the middle, finished or not; empty before it."""
    folder = runs / f"{arm.replace(' ', '-')}-{seed}"
    evals = [row for row in read(folder / "evals.jsonl") if row["step"] <= HALF]
    if not evals:
        return {}
    found = {k.removeprefix("eval/"): v for k, v in evals[-1].items()}
    steps = [{k: r.get(k) for k in NAMES} for r in read(folder / "metrics.jsonl")[:HALF]]
    told = {"accuracy": found["trained_prompt/accuracy"]} if arm == "full" else None
    return {"evals": [found], "steps": steps, "told": told}


def where() -> dict:
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {card}, one thread a run",
        "versions": {n: version(n) for n in ("torch", "transformers")},
    }


if __name__ == "__main__":
    main()
