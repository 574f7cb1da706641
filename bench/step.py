"""A whole GRPO step, ours against stock TRL: same run, model, prompts, rewards, token counts.

    python -m bench step --model smollm2 --prompts 2 --group 8 --tokens 48 --out bench/results

Steps alternate (ours, theirs, ours, ...; --turn N: N of ours, N of theirs, since a step of some
milliseconds that follows a rival's finds the caches full of the rival) after one warm-up each; the
median counts, the range is shown. Pairs of one dtype come one after the other, and the machine is
not the same all the while: --dtype bf16 --rival-dtype fp32 times each side at its best by turns.
Peak memory is the resident high water of a process that runs one side alone. A row is printed only
where its gates are green: both sides give the same gradient on one batch, both produced exactly the
tokens asked for from the same prompts, both moved their parameters.
--device cuda: the same on a GPU, its own memory in place of the process's.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.machine import high_water, machine, settle
from bench.step_ours import Ours, Settings

SIDES = ("ours", "trl")
COSINE = {"fp32": 0.9999, "bf16": 0.99}  # of the two gradients, at least
Pair = tuple[str, str]  # dtypes of the sides
PHASES = ("rollout", "score", "update")


def main(arguments: Sequence[str]) -> int:
    """Run the benchmark; 0, 1 where a gate is red, 2 without TRL."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.turn < 1:
        parser.error(f"--turn: expected a number of steps >= 1, got {options.turn}")
    settings = Settings(**{f.name: getattr(options, f.name) for f in fields(Settings)})
    _quiet()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if "trl" in options.sides and not (find_spec("trl") and find_spec("datasets")):
        print(
            "bench step: the rival is missing; pip install 'reasonrl[trl]', or --sides ours",
            file=sys.stderr,
        )
        return 2
    dtypes = ("fp32", "bf16") if options.dtype == "both" else (options.dtype,)
    if options.rival_dtype and options.dtype == "both":
        parser.error("--rival-dtype: expected with --dtype fp32 or bf16, got --dtype both")
    pairs = [(dtype, options.rival_dtype or dtype) for dtype in dtypes]
    if options.alone:
        if options.alone == "trl":
            importlib.import_module("bench.step_trl")
        start = high_water()  # the interpreter and its libraries
        run_pair(settings, pairs[0], (options.alone,), time.monotonic() + options.limit)
        peak = high_water()
        if settings.device == "cuda":
            start, peak = 0, torch.cuda.max_memory_allocated() >> 20
        print(json.dumps({"peak_mib": peak, "start_mib": start}))
        return 0
    path = _out(options.out) if options.out else None

    def keep(report: Mapping[str, Any]) -> None:
        if path is not None:
            path.write_text(json.dumps(report, indent=1) + "\n")

    how = options.limit, options.memory, keep, options.turn
    report = measure(settings, pairs, options.sides, *how)
    print(table(report))
    if path is not None:
        keep(report)
        print(f"written to {path}")
    return 0 if all(row["gate"]["green"] for row in report["rows"]) else 1


def measure(
    settings: Settings, pairs: Sequence[Pair], sides: Sequence[str], limit: float, memory: bool,
    keep: Callable[[Mapping[str, Any]], None] = lambda report: None, turn: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """All rows and what they were measured on; no further repeat starts after `limit` seconds. keep
    gets what there is before the processes for memory, which take as long again; turn: steps of a
    side before it is the other's turn."""
    deadline = time.monotonic() + limit
    facts = machine(settings.device)
    rows: list[dict[str, Any]] = []
    report = {"bench": "step", "settings": asdict(settings), "turn": turn, "machine": facts}
    report["rows"] = rows
    for pair in pairs:
        rows += run_pair(settings, pair, sides, deadline, turn)
        settle()  # trainers are cycles: two pairs of models at once would fill the memory
        keep(report)
    if memory:
        for row in rows:
            row |= _peak(settings, row, deadline)
    facts["load_after"] = os.getloadavg()
    return report


def run_pair(
    settings: Settings, pair: Pair, sides: Sequence[str], deadline: float, turn: int = 1
) -> list[dict[str, Any]]:
    """Both sides, each at its dtype, `turn` steps by `turn` steps (or one side alone)."""
    dtypes = dict(zip(SIDES, pair, strict=True))
    ours = Ours(settings, dtypes["ours"]) if "ours" in sides else None
    times: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    facts: dict[str, Any] = {}

    def go_on(number: int) -> bool:
        began = time.monotonic()
        if ours is not None and number == len(times["ours"]):  # the warm-up is a turn of its own
            last = min(number + turn, settings.repeats + 1) if number else 1
            times["ours"] += [ours.step(n) for n in range(number, last)]
        spent = time.monotonic() - began + (times["trl"][-1]["total"] if times.get("trl") else 0.0)
        return number == 0 or time.monotonic() + spent < deadline

    if "trl" in sides:
        from bench.step_trl import Rival, agreement

        with tempfile.TemporaryDirectory() as folder:
            rival = Rival(settings, dtypes["trl"], folder)
            times["trl"] = rival.steps
            if ours is not None:
                facts |= agreement(ours, rival)
            rival.train(go_on)
        facts["trl"] = (rival.tokens, rival.prompt_tokens, rival.changed())
    else:
        for number in range(settings.repeats + 1):
            if not go_on(number):
                break
    if ours is not None:
        facts["ours"] = (ours.tokens, ours.prompt_tokens, ours.changed())
    verdict = gate(settings, "bf16" if "bf16" in pair else "fp32", facts)
    return [_row(settings, side, dtypes[side], times[side], verdict) for side in sides]


def gate(settings: Settings, dtype: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Whether the sides did the same work; `reason` says what differs.

    facts: cosine and norm_ratio of the gradients, and for each side its completion tokens, prompt
    tokens (once for each row) and whether its parameters changed.
    """
    wanted = settings.prompts * settings.group * settings.tokens
    prompts = [facts[side][1] for side in SIDES if side in facts]
    reasons = []
    for side in (side for side in SIDES if side in facts):
        tokens, _, changed = facts[side]
        if tokens != wanted:
            reasons.append(f"{side}: {tokens} completion tokens, expected {wanted}")
        if not changed:
            reasons.append(f"{side}: the parameters did not change")
    if len(set(prompts)) > 1:
        reasons.append(f"prompt tokens differ: {prompts}")
    if "cosine" in facts:
        if not facts["cosine"] >= COSINE[dtype]:
            reasons.append(f"gradients: cosine {facts['cosine']:.4f}, expected >= {COSINE[dtype]}")
        if not 0.99 < facts["norm_ratio"] < 1.01:
            reasons.append(f"gradients: norm ratio {facts['norm_ratio']:.3f}, expected 1")
    known = {k: facts[k] for k in ("cosine", "norm_ratio") if k in facts}
    return {"green": not reasons, "reason": "; ".join(reasons)} | known


def _row(settings, side: str, dtype: str, times: list[dict[str, float]], verdict) -> dict[str, Any]:
    row: dict[str, Any] = {"side": side, "dtype": dtype, "gate": verdict, "peak_mib": None}
    timed = times[1:]  # the first one warmed up
    if not verdict["green"] or not timed:
        return row
    seconds = [t["total"] for t in timed]
    middle = statistics.median(seconds)
    return row | {
        "seconds": seconds,
        "median": middle,
        "range": [min(seconds), max(seconds)],
        "phases": {p: statistics.median(t[p] for t in timed) for p in PHASES},
        "tokens_per_second": settings.prompts * settings.group * settings.tokens / middle,
    }


def table(report: Mapping[str, Any]) -> str:
    """The report for people; a row whose gate is red shows its reason and no number."""
    size, machine = report["settings"], report["machine"]
    lines = [
        f"GRPO step: {size['model']}, {size['prompts']} prompts x {size['group']} completions x"
        f" {size['tokens']} tokens, prompts of {size['prompt_tokens']}, rival's gradient"
        f" checkpointing {'on' if size['checkpointing'] else 'off'}"
        + (f", {report['turn']} steps of a side in a row" if report["turn"] > 1 else ""),
        f"{machine['cpu']}, {machine['threads']} threads, load {machine['load_before'][0]:.2f}"
        f" -> {machine['load_after'][0]:.2f}; {machine.get('gpu', '')} "
        + ", ".join(f"{k} {v}" for k, v in machine["versions"].items()),
        "",
        f"{'side':5} {'dtype':5} {'step s':>8} {'range':>15} {'rollout':>8} {'score':>7}"
        f" {'update':>7} {'tok/s':>7} {'peak MiB':>9}",
    ]
    for row in report["rows"]:
        head = f"{row['side']:5} {row['dtype']:5}"
        if not row["gate"]["green"]:
            lines.append(f"{head} refused: {row['gate']['reason']}")
            continue
        if "median" not in row:
            lines.append(f"{head} no timed step within the limit")
            continue
        low, high = row["range"]
        phase = row["phases"]
        lines.append(
            f"{head} {row['median']:8.3f} {f'{low:.3f}-{high:.3f}':>15} {phase['rollout']:8.3f}"
            f" {phase['score']:7.3f} {phase['update']:7.3f} {row['tokens_per_second']:7.1f}"
            f" {row['peak_mib'] or '-':>9}"
        )
    return "\n".join([*lines, *_verdict(report["rows"])])


def _verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The ratio of the best rows: each side at the dtype that is fastest for it."""
    best: dict[str, Mapping[str, Any]] = {}
    for row in rows:
        if "median" in row and row["median"] < best.get(row["side"], row)["median"] + 1e-12:
            best[row["side"]] = row
    if len(best) < 2:
        return []
    ours, trl = best["ours"], best["trl"]
    out = f"each at its best: ours {ours['dtype']} takes 1/{trl['median'] / ours['median']:.2f}"
    out += f" of the time of trl {trl['dtype']}"
    if ours["peak_mib"] and trl["peak_mib"]:
        out += f", {ours['peak_mib'] / trl['peak_mib']:.2f} of its peak memory"
    return ["", out]


def _peak(settings: Settings, row: Mapping[str, Any], deadline: float) -> dict[str, int]:
    """Peak memory of one side in a process of its own, MiB; empty where time or gate forbids."""
    left = deadline - time.monotonic()
    if "median" not in row or left < 1:
        return {}
    short = Settings(**(asdict(settings) | {"repeats": 1}))
    command = [sys.executable, "-m", "bench", "step", *short.words(), "--dtype", row["dtype"]]
    command += ["--alone", row["side"], "--sides", row["side"]]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    root = Path(__file__).parent.parent
    try:
        done = subprocess.run(
            command, env=env, cwd=root, capture_output=True, text=True, check=True, timeout=left
        )
    except subprocess.TimeoutExpired:
        return {}
    return json.loads(done.stdout.splitlines()[-1])


def _out(path: Path) -> Path:
    if path.suffix == ".json":
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
    path.mkdir(parents=True, exist_ok=True)
    return path / time.strftime("step-%Y%m%d-%H%M%S.json")


def _quiet() -> None:
    from transformers.utils import logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m bench step", description=__doc__.split("\n")[0]
    )
    for field in fields(Settings):
        flag = "--" + field.name.replace("_", "-")
        if isinstance(field.default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(field.default), default=field.default)
    parser.add_argument("--dtype", choices=("both", "fp32", "bf16"), default="both")
    parser.add_argument("--rival-dtype", choices=("fp32", "bf16"), help="where not --dtype's")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--turn", type=int, default=1, help="steps of a side in a row")
    parser.add_argument("--limit", type=float, default=1200.0, help="seconds, about")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--out", type=Path, help="a JSON file, or a folder for one")
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    return parser
