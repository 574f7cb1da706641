"""PRIME: token scores and advantages against the released per-token loop, and the cost of a step.

    python -m bench prime --out bench/results           (all; --parts score | step for one)

Scores and advantages: 1024 completions of 3072 tokens, log-probabilities given. `loop` is the
released way restated: one tensor element copied for every token of every completion fills the
scores, then a pass a completion for baseline and return. It is timed on some of the rows and scaled
to all, which the report says. `ours` is log-ratio, return, baseline, whitening through the public
functions; `kernel` is the native advantage alone; `copy` moves the bytes the kernel must move
(rewards in, advantages out). Results are made anew, and most of ours goes to fresh pages where the
system takes back what is freed; so all are timed after glibc was told to keep it, too. The gate:
loop and ours agree. Steps: prime_step.py. Sides alternate, medians count, ranges are shown. Left
out: GPUs.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import prime_step
from bench.machine import high_water, machine
from bench.step import _quiet
from reasonrl import ops
from reasonrl.kernels import native
from reasonrl.systems import implicit_reward

BETA, GROUP = 0.05, 4  # of the paper
WORST = 1e-4  # error of our whitened advantages against the loop's, at most


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; 0, or 1 where a gate is red."""
    options = _parser().parse_args(arguments)
    names = [field.name for field in fields(prime_step.Settings)]
    shape = prime_step.Settings(**{name: getattr(options, name) for name in names})
    _quiet()
    prime_step.set_threads(options.threads)
    if options.alone:
        start = high_water()
        prime_step.alone(shape, options.dtype, options.alone)
        print(json.dumps({"peak_mib": high_water(), "start_mib": start}))
        return 0
    settings = vars(options) | {"out": str(options.out) if options.out else None}
    report: dict[str, Any] = {"bench": "prime", "machine": machine(), "settings": settings}
    good = True
    if "score" in options.parts:
        report["score"] = scores(options.rows, options.length, options.loop_rows, options.repeats)
        good = good and report["score"]["gate"]["green"]
        print(score_table(report["score"]))
    if "step" in options.parts:
        report["step"] = prime_step.measure(shape, options.dtype, list(prime_step.SIDES))
        for row in report["step"]["rows"] if options.memory else ():
            row |= _peak(shape, options.dtype, row["side"])
        good = good and prime_step.green(report["step"])
        print(prime_step.table(report["step"]) if good else "gate red: no numbers")
    report["machine"]["load_after"] = os.getloadavg()
    load = [f"{report['machine'][k][0]:.1f}" for k in ("load_before", "load_after")]
    print(f"load before and after {', '.join(load)}; {report['machine']['threads']} thread(s)")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    return 0 if good else 1


def scores(rows: int, length: int, loop_rows: int, repeats: int) -> dict[str, Any]:
    """Seconds of the loop and of ours, and of the kernel beside a copy; gate first."""
    logp, ref, outcome, group, cu = inputs(rows, length)
    few = int(cu[loop_rows])
    part = (logp[:few], ref[:few], outcome[:loop_rows], group[:loop_rows], cu[: loop_rows + 1])
    error = float((ours(*part) - loop(*part)).abs().max())
    report: dict[str, Any] = {"rows": rows, "length": length, "tokens": int(cu[-1])}
    report |= {"loop_rows": loop_rows, "gate": {"error": error, "green": error < WORST}}
    if error >= WORST:
        return report
    token = implicit_reward(logp, ref, beta=BETA, cu_seqlens=cu)
    sides: dict[str, Callable[[], object]] = {
        "loop": lambda: loop(*part),
        "ours": lambda: ours(logp, ref, outcome, group, cu),
        "kernel": lambda: kernel(token, outcome, group, cu),
        "copy": lambda: token.clone(),
    }
    for memory, names in (("fresh", ("loop", "ours")), ("kept", tuple(sides))):
        if memory == "kept":
            keep_memory()
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(repeats + 1):
            for name in names:
                began = time.perf_counter()
                sides[name]()
                if turn:  # the first of each warms up
                    times[name].append(time.perf_counter() - began)
        times["loop"] = [t * int(cu[-1]) / few for t in times["loop"]]
        median = {name: statistics.median(values) for name, values in times.items()}
        ratios = {"loop_over_ours": median["loop"] / median["ours"]}
        if "kernel" in names:
            ratios["kernel_over_copy"] = median["kernel"] / median["copy"]
        report[memory] = {"seconds": times, "median": median} | ratios
    return report


def keep_memory() -> None:
    """From here on glibc gives nothing back to the system: results lie in pages that are there."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-3, 1 << 29)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def inputs(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of both models (N,), outcomes and groups (B,), offsets; every completion
    has all `length` tokens, the published shape."""
    generator = torch.Generator().manual_seed(0)
    logp = -torch.rand(rows * length, generator=generator)
    ref = logp + 0.1 * torch.randn(rows * length, generator=generator)
    outcome = torch.randint(0, 2, (rows,), generator=generator).float()
    group = torch.arange(rows) // GROUP
    return logp, ref, outcome, group, torch.arange(rows + 1) * length


def ours(logp: Tensor, ref: Tensor, outcome: Tensor, group: Tensor, cu: Tensor) -> Tensor:
    token = implicit_reward(logp, ref, beta=BETA, cu_seqlens=cu)
    return ops.prime_advantage(
        token, outcome, group, cu_seqlens=cu, whiten=True, verl_baseline=True
    )


def kernel(token: Tensor, outcome: Tensor, group: Tensor, cu: Tensor) -> Tensor:
    """The native op without the door's checks; equation 5, not whitened."""
    return native.prime_advantage(
        token, outcome, group, cu, None, "rloo", 1.0, 1, None, False, False
    )


def loop(logp: Tensor, ref: Tensor, outcome: Tensor, group: Tensor, cu: Tensor) -> Tensor:
    """The released way: a tensor element a token, then baseline and return row by row."""
    q = BETA * (logp - ref)
    score = torch.zeros_like(logp)
    bounds = cu.tolist()
    for start, end in zip(bounds, bounds[1:], strict=False):
        for t in range(start, end):
            score[t] = q[t]
    out = torch.zeros_like(logp)
    mean = torch.stack([score[a:b].mean() for a, b in zip(bounds, bounds[1:], strict=False)])
    for b, (start, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        peers = group == group[b]
        k = int(peers.sum())
        process = score[start:end] * (k / (k - 1)) - mean[peers].sum() / (k - 1)
        back = process.flip(0).cumsum(0).flip(0)
        out[start:end] = back + outcome[b] * (k / (k - 1)) - outcome[peers].sum() / (k - 1)
    return (out - out.mean()) / (out.var() + 1e-8).sqrt()


def score_table(report: dict[str, Any]) -> str:
    head = f"scores and advantages, {report['rows']} x {report['length']} tokens"
    gate = report["gate"]
    if not gate["green"]:
        return f"{head}: gate red (error {gate['error']:.2e}), no numbers"
    lines = [f"{head}; gate green (error {gate['error']:.1e})"]
    for memory, says in (("fresh", "results in fresh pages"), ("kept", "in memory that is there")):
        found = report[memory]
        lines.append(f"{says}:")
        for name, values in found["seconds"].items():
            note = f"  measured on {report['loop_rows']} rows, scaled" if name == "loop" else ""
            span = f"{1e3 * min(values):.2f}-{1e3 * max(values):.2f}"
            lines.append(f"{name:8}{1e3 * found['median'][name]:14.2f} ms  ({span}){note}")
        lines.append(f"loop / ours {found['loop_over_ours']:.0f}x   (goal 1000x)")
        if "kernel_over_copy" in found:
            lines.append(f"kernel / copy {found['kernel_over_copy']:.2f}x   (goal 2x)")
    return "\n".join(lines)


def _peak(shape: prime_step.Settings, dtype: str, name: str) -> dict[str, int]:
    command = [sys.executable, "-m", "bench", "prime", "--dtype", dtype, "--alone", name]
    for key, value in asdict(shape).items():
        if not isinstance(value, bool):
            command += ["--" + key.replace("_", "-"), str(value)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench prime", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--parts", nargs="+", choices=("score", "step"), default=["score", "step"])
    parser.add_argument("--rows", type=int, default=1024, help="completions, a multiple of 4")
    parser.add_argument("--length", type=int, default=3072, help="tokens of each")
    parser.add_argument("--loop-rows", type=int, default=16, help="rows the loop is timed on")
    parser.add_argument("--model", default="tiny")
    shape = {"prompts": 8, "group": 8, "tokens": 128, "prompt_tokens": 64, "repeats": 5}
    for name, value in (shape | {"threads": 1, "batch_tokens": 8192}).items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--checkpointing", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--device", choices=("cpu",), default="cpu", help=argparse.SUPPRESS)
    parser.add_argument("--liger", choices=("auto",), default="auto", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--out", type=Path, help="a JSON file")
    parser.add_argument("--alone", choices=tuple(prime_step.SIDES), help=argparse.SUPPRESS)
    return parser
