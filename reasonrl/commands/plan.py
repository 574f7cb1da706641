"""`reasonrl plan`: does a training job fit, and what does it send; arithmetic, no weights."""

from __future__ import annotations

import argparse
import json
from typing import Any

from reasonrl.records import InputError

DESCRIBED = ("layers", "hidden", "vocab", "kv_heads")


def add(commands) -> None:
    command = commands.add_parser("plan", help="memory and traffic of a job, before it is started")
    command.add_argument(
        "model", nargs="?", help="tiny, smollm2, qwen2.5-7b, llama-3.1-70b, ..., or a config folder"
    )
    shape = command.add_argument_group("in place of MODEL, a Llama-like shape")
    shape.add_argument("--params", type=float, help="number of parameters, e.g. 7e9")
    shape.add_argument("--layers", type=int)
    shape.add_argument("--hidden", type=int, help="width of the hidden states")
    shape.add_argument("--vocab", type=int, help="words of the vocabulary")
    shape.add_argument("--kv-heads", type=int, help="key/value heads (default: as many as heads)")
    machine = command.add_argument_group("machine")
    machine.add_argument("--gpus", type=int, default=8)
    machine.add_argument("--gpu-memory", type=float, default=80.0, help="GiB of one")
    machine.add_argument("--reserve", type=float, default=0.1, help="share of it left free")
    job = command.add_argument_group("job")
    job.add_argument("--prompts-per-step", type=int, default=64)
    job.add_argument("--group", type=int, default=16, help="completions of a prompt")
    job.add_argument("--prompt", type=int, default=512, help="tokens, the longest planned for")
    job.add_argument("--completion", type=int, default=4096, help="tokens, likewise")
    job.add_argument("--batch-tokens", type=int, default=8192, help="of a packed micro-batch")
    job.add_argument("--updates", type=int, default=1, help="optimiser steps on one rollout")
    job.add_argument("--zero", type=int, default=0, choices=[0, 1, 2, 3], help="3: as FSDP")
    job.add_argument("--precision", default="mixed", choices=["mixed", "bf16", "fp32"])
    job.add_argument("--lora", type=int, default=0, help="rank of an adapter; 0: all weights")
    job.add_argument("--reference", default="no", choices=["yes", "no"], help="kl_coef > 0")
    job.add_argument("--prm", default="none", choices=["none", "frozen", "full", "lora"])
    job.add_argument("--prm-model", help="its shape, named like MODEL (default: the policy's)")
    job.add_argument("--checkpointing", action="store_true", help="of activations")
    job.add_argument("--attention", default="fused", choices=["fused", "plain"])
    job.add_argument("--liger", default="auto", choices=["auto", "off"])
    job.add_argument(
        "--engine",
        choices=["in-process", "colocated"],
        help="of rollouts (default: in-process; colocated with --zero 3, which leaves no choice)",
    )
    job.add_argument("--tensor-parallel", type=int, default=1, help="of a colocated engine")
    job.add_argument("--rows", type=int, default=256, help="completions decoded at a time a rank")
    command.add_argument("--json", action="store_true", help="numbers in place of the table")
    command.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> int:
    from dataclasses import fields

    from reasonrl.plan import Job, plan
    from reasonrl.plan_shapes import shape_of

    shape = _shape(options)
    if options.prm_model and options.prm == "none":
        raise InputError("--prm-model: only with --prm")
    prm = shape_of(options.prm_model) if options.prm_model else None
    values = {f.name: getattr(options, f.name) for f in fields(Job)}
    values["reference"] = options.reference == "yes"
    values["engine"] = options.engine or ("colocated" if options.zero == 3 else "in-process")
    job = Job(**values)
    found = plan(shape, job, prm)
    if options.json:
        print(json.dumps(numbers(found), indent=1))
    else:
        print("\n".join([*table(found), "", *verdict(found, prm)]))
    return 0


def _shape(options: argparse.Namespace):
    from reasonrl.plan_shapes import described, shape_of

    given = [name for name in DESCRIBED if getattr(options, name) is not None]
    if options.model is not None:
        if options.params is not None or given:
            name = "params" if options.params is not None else given[0].replace("_", "-")
            raise InputError(f"--{name}: only in place of MODEL, which says it already")
        return shape_of(options.model)
    if options.params is None:
        raise InputError("plan: expected a MODEL or --params")
    for name in DESCRIBED:
        value = getattr(options, name)
        if value is None and name != "kv_heads":
            raise InputError(f"--params: needs --{name} as well (activations depend on it)")
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected >= 1, got {value}")
    return described(
        options.params, options.layers, options.hidden, options.vocab, options.kv_heads
    )


def table(found) -> list[str]:
    """The plan as Markdown: a row a part, a column a phase, GiB on one rank."""
    from reasonrl.plan import GIB, PHASES

    shape, job = found.shape, found.job
    lines = [
        f"{shape.name}: {shape.params:,} parameters; {job.gpus} GPUs of {job.gpu_memory:g} GiB,"
        f" {job.prompts_per_step} x {job.group} completions of {job.completion} tokens a step,"
        f" {found.batches} micro-batches a rank",
        "",
        f"| GiB on a rank | {' | '.join(PHASES)} |",
        "|---" * (len(PHASES) + 1) + "|",
    ]
    for row in found.rows:
        cells = (f"{row.size / GIB:.2f}" if name in row.phases else "" for name in PHASES)
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    totals = " | ".join(f"**{found.phase(name) / GIB:.1f}**" for name in PHASES)
    lines.append(f"| **all** | {totals} |")
    lines += ["", "| sent by a rank in a step | GiB |", "|---|---|"]
    lines += [f"| {name} | {size / GIB:.2f} |" for name, size in found.traffic]
    if not found.traffic:
        lines.append("| nothing | |")
    return lines


def verdict(found, prm) -> list[str]:
    """Whether it fits, what would make it, what the logits would have cost, what is not ours."""
    from reasonrl.plan import GIB, advice, missing

    job = found.job
    worst = f"{found.peak / GIB:.1f} GiB at the peak, {found.limit / GIB:.1f} may be used"
    lines = [f"Logits are not stored; stored they would add {found.logits / GIB:.1f} GiB."]
    if found.fits:
        lines.append(f"It fits: {worst}.")
    else:
        ways = [f"`{' '.join(_flags(change))}`" for change in advice(found.shape, job, prm)]
        what = f"With {' or '.join(ways)} it does." if ways else "No change tried here helps."
        lines.append(f"It does not fit: {worst}. {what}")
    if lacking := missing(job):
        lines.append(f"`reasonrl train` does not do this yet: {', '.join(lacking)}.")
    return lines


def _flags(change: dict[str, Any]) -> list[str]:
    words = []
    for name, value in change.items():
        flag = f"--{name.replace('_', '-')}"
        words += [flag] if value is True else [flag, str(value)]
    return words


def numbers(found) -> dict[str, Any]:
    """The plan in bytes."""
    from dataclasses import asdict

    from reasonrl.plan import PHASES

    return {
        "model": asdict(found.shape),
        "job": asdict(found.job),
        "rows": [{"name": r.name, "bytes": r.size, "phases": list(r.phases)} for r in found.rows],
        "phases": {name: found.phase(name) for name in PHASES},
        "peak": found.peak,
        "fits": found.fits,
        "stored_logits": found.logits,
        "traffic": dict(found.traffic),
    }
