"""Every op against what else does its work, in one run: gate, times, floors, memory, growth.

    python -m bench ops --out bench/results            all cases (about half an hour on two cores)
    python -m bench ops --only logp --dtypes fp32      those whose key holds a word (or words)

Exit status 1 where one of our gates is red. A goal that is missed is shown with the figure found
and fails nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import cases_head, cases_reward, cases_token, growth, rivals
from bench.machine import high_water, machine, reset_high_water, resident
from bench.race import Case, on_device, placed, run
from reasonrl import linear_logp

SIDES = {"linear_logp": "ours", "torch logits": "torch"}


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; 0, 1 where one of our gates is red."""
    options = parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.alone:
        print(json.dumps({"mib": alone(options)}))
        return 0
    chosen = [c for c in table(options) if any(word in c.key for word in options.only)]
    if absent := rivals.missing():
        print(f"bench ops: not installed, so not compared: {', '.join(absent)} (make bench)")
    report: dict[str, Any] = {"bench": "ops", "machine": machine(options.device), "rows": []}
    for case in chosen:
        row = run(case, options.rounds, options.seed, options.device)
        if options.memory:
            for side in case.memory:
                if side in row["sides"] and not row["sides"][side]["reason"]:
                    row["sides"][side]["mib"] = apart(options, case.key, side)
        print(text(row), flush=True)
        report["rows"].append(row)
    if any(word in "growth" for word in options.only):
        report["growth"] = growth.measure(options.small, options.seed, options.device)
        report["memory"] = head_memory(options) if options.memory else {}
        print(growth.text(report["growth"], report["memory"]), flush=True)
    report["machine"]["load_after"] = os.getloadavg()
    print(facts(report["machine"]))
    if options.out:
        write(report, options.out)
    return int(any(row["sides"]["ours"]["reason"] for row in report["rows"]))


def table(options: argparse.Namespace) -> list[Case]:
    tokens = [*cases_token.cases(options.small, options.device), *cases_reward.cases(options.small)]
    return [*tokens, *cases_head.cases(options.small, options.dtypes, options.device)]


def alone(options: argparse.Namespace) -> float:
    """MiB beside the inputs that one side of one case takes at its peak, in this process."""
    key, side = options.alone
    if key == "linear_logp":
        n, width, vocabulary = int(side.split("/")[1]), 64, 2003 if options.small else 32_000
        x = {"hidden": torch.randn(n, width), "weight": torch.randn(vocabulary, width)}
        x = placed(x | {"target": torch.zeros(n, dtype=torch.long)}, options.device)
        log_p = linear_logp if side.startswith("ours") else cases_head.naive
        call = lambda x: log_p(x["hidden"], x["weight"], x["target"])  # noqa: E731
    else:
        (case,) = [c for c in table(options) if c.key == key]
        case, x = on_device(case, options.device)
        call = case.sides[side]
    if options.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(x)
        return (torch.cuda.max_memory_allocated() - before) >> 20
    reset_high_water()
    before = resident()
    call(x)
    return high_water() - before


def apart(options: argparse.Namespace, key: str, side: str) -> float:
    command = [sys.executable, "-m", "bench", "ops", "--alone", key, side]
    command += ["--device", options.device, "--dtypes", *options.dtypes]
    command += ["--small"] * options.small
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])["mib"]


def head_memory(options: argparse.Namespace) -> dict[str, Any]:
    sizes = [256, 512] if options.small else [1024, 2048, 4096, 8192]
    mib = {
        name: [apart(options, "linear_logp", f"{side}/{n}") for n in sizes]
        for name, side in SIDES.items()
    }
    return {"sizes": sizes, "mib": mib}


def text(row: Mapping[str, Any]) -> str:
    lines = [f"\n{row['title']}"]
    for group in ("sides", "floors"):
        for name, side in row[group].items():
            if side.get("reason"):
                lines.append(f"  {name:26} red gate: {side['reason']}")
                continue
            low, high = side["range"]
            line = (
                f"  {name:26} {1e3 * side['median']:10.3f} ms  {1e3 * low:9.3f}-{1e3 * high:<9.3f}"
            )
            line += f" {side['ratio']:8.2f}x" if "ratio" in side else " " * 10
            if side.get("mib") is not None:
                line += f"  +{side['mib']} MiB"
            if side.get("errors"):
                line += "  error " + " ".join(f"{e['max']:.1e}" for e in side["errors"])
            lines.append(line + f"  {side['label']}")
    for goal in row["goals"]:
        found = "not measured" if goal["found"] is None else f"{goal['found']:.2f}"
        met = {True: "met", False: "MISSED", None: "-"}[goal["met"]]
        lines.append(f"  goal: {found} {goal['text']}, {goal['sign']} {goal['target']}: {met}")
    return "\n".join(lines)


def facts(m: Mapping[str, Any]) -> str:
    load = f"load {m['load_before'][0]:.2f} -> {m['load_after'][0]:.2f}"
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    if "gpu" in m:
        load += f"; {m['gpu']}"
    return f"\n{m['cpu']}, {m['isa']}, {m['threads']} threads, {load}; {versions}"


def write(report: Mapping[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    name = time.strftime("ops-%Y%m%d-%H%M%S")
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written to {path}")
    if report.get("memory"):
        growth.plot(report["growth"], report["memory"], folder / f"{name}.png")
        print(f"and {path.with_suffix('.png')}")


def parser() -> argparse.ArgumentParser:
    about = (__doc__ or "").split("\n")[0]
    made = argparse.ArgumentParser(prog="python -m bench ops", description=about)
    made.add_argument("--only", nargs="+", default=[""], help="cases whose key holds such a word")
    made.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    made.add_argument("--rounds", type=int, help="of every case; default: each case's own")
    made.add_argument("--threads", type=int)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    made.add_argument("--device", choices=("cpu", "cuda"), default=default)
    made.add_argument("--seed", type=int, default=0, help="of the order of the sides")
    made.add_argument("--small", action="store_true", help="tiny sizes, to see that it works")
    made.add_argument("--no-memory", dest="memory", action="store_false")
    made.add_argument("--out", type=Path, help="folder for JSON and plot")
    made.add_argument("--alone", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    return made
