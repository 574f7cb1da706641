"""A TRL training step with our loss and log-prob path against stock TRL, and its head phase alone.

    python -m bench trl --repeats 5 --out bench/results

One batch (SmolLM2-135M, group 8, 16 completions of 48 tokens) goes forward and backward through
both trainers in turn; the median counts, the range is shown. The head phase starts from hidden
states and ends with dX and dW. Peak memory is the resident high water of a process that runs one
side alone. No row without a green gate: both sides give the same gradient. TRL 1.16 holds no logits
either; on a CPU it also scores the prompt's positions, which is part of the difference. Left out:
generation (both use transformers'), the optimiser (both use torch's), GPUs.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import step
from bench.machine import high_water, machine
from bench.step_ours import Settings

SIDES = ("ours", "trl")
GOAL = (1.5, 2.5)  # the head phase: at least, and hoped for
WORST = 1e-4  # relative difference of any gradient


def main(arguments: Sequence[str]) -> int:
    """Run it; 0, 1 where the gate is red, 2 without TRL."""
    options = _parser().parse_args(arguments)
    if not (find_spec("trl") and find_spec("datasets")):
        print("bench trl: TRL is missing; pip install 'reasonrl[trl]'", file=sys.stderr)
        return 2
    step._quiet()
    settings = Settings(model=options.model, tokens=options.tokens, threads=options.threads)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.alone:
            pair = Pair(settings, folder, (options.alone,))
            before = high_water()
            work = pair.head if options.phase == "head" else pair.step
            work(options.alone)
            print(json.dumps({"peak_mib": high_water(), "start_mib": before}))
            return 0
        report = measure(Pair(settings, folder, SIDES), settings, options)
    print(table(report))
    if options.out:
        path = options.out / time.strftime("trl-%Y%m%d-%H%M%S.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"written to {path}")
    return 0 if report["gate"]["green"] else 1


class Pair:
    """Stock TRL and ours on copies of one model, and the batch that both take."""

    def __init__(self, settings: Settings, folder: str, sides: Sequence[str]):
        from bench.step_trl import Rival
        from reasonrl.integrations.trl import GRPOTrainer

        self.settings = settings
        stock = Rival(settings, "fp32", folder).trainer
        self.sides: dict[str, Any] = {}
        if "trl" in sides:
            self.sides["trl"] = stock
        if "ours" in sides:
            own = stock.model if len(sides) == 1 else copy.deepcopy(stock.model)
            own.__dict__.pop("forward", None)  # TRL's patch, which the new trainer makes again
            self.sides["ours"] = GRPOTrainer(
                model=own,
                reward_funcs=stock.reward_funcs,
                args=stock.args,
                train_dataset=stock.train_dataset,
                processing_class=stock.processing_class,
                fused=True,
            )
        for trainer in self.sides.values():
            trainer.current_gradient_accumulation_steps = 1
            trainer.model.train()
        self.batch = _batch(settings, stock.processing_class.pad_token_id or 0)

    def step(self, side: str) -> dict[str, Tensor]:
        """Forward and backward of the training step; the gradients."""
        trainer = self.sides[side]
        trainer.model.zero_grad(set_to_none=True)
        trainer._compute_loss(trainer.model, self.batch).backward()
        return {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}

    def head(self, side: str) -> dict[str, Tensor]:
        """From hidden states to dX and dW, each side by its own path: the trainer's whole loss
        over a decoder that answers with stored hidden states."""
        trainer = self.sides[side]
        decoder = trainer.model.get_decoder()
        hidden = self._hidden(trainer.model.config.hidden_size).requires_grad_()
        before = decoder.__dict__.get("forward")
        decoder.forward = lambda *args, **kwargs: _Answer(hidden)
        try:
            trainer.model.zero_grad(set_to_none=True)
            trainer._compute_loss(trainer.model, self.batch).backward()
        finally:
            del decoder.forward
            if before is not None:
                decoder.forward = before
        weight = trainer.model.get_output_embeddings().weight
        assert hidden.grad is not None and weight.grad is not None
        return {"dX": hidden.grad, "dW": weight.grad}

    def _hidden(self, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(5)
        shape = (*torch.cat([self.batch["prompt_ids"], self.batch["completion_ids"]], 1).shape,)
        return torch.randn(*shape, width, generator=generator)


class _Answer(dict):
    """What a decoder returns, as far as both sides read it."""

    def __init__(self, hidden: Tensor):
        super().__init__(last_hidden_state=hidden)
        self.last_hidden_state, self.router_logits = hidden, None


def measure(pair: Pair, settings: Settings, options: Any) -> dict[str, Any]:
    facts = machine()
    phases: dict[str, Callable[[str], dict[str, Tensor]]] = {"step": pair.step, "head": pair.head}
    gaps = {}
    for name, work in phases.items():  # also the warm-up
        theirs, ours = work("trl"), work("ours")
        gaps[name] = max(_gap(ours[key], value) for key, value in theirs.items())
    green = all(gap <= WORST for gap in gaps.values())
    rows: dict[str, Any] = {}
    for name, work in phases.items() if green else ():
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(options.repeats):
            for side in SIDES if number % 2 else reversed(SIDES):
                began = time.perf_counter()
                work(side)
                seconds[side].append(time.perf_counter() - began)
        rows[name] = {side: {"seconds": seconds[side]} for side in SIDES}
        if options.memory:
            for side in SIDES:
                rows[name][side] |= _memory(settings, side, name)
    facts["load_after"] = os.getloadavg()
    vocabulary = len(pair.sides["trl"].model.get_output_embeddings().weight)
    tokens = settings.prompts * settings.group * settings.tokens
    return {
        "bench": "trl",
        "settings": vars(settings),
        "machine": facts,
        "gate": {"green": green, "worst": gaps},
        "rows": rows,
        "logits_mib": tokens * vocabulary * 4 / 2**20,
    }


def table(report: dict[str, Any]) -> str:
    """The report for people; with a red gate the reason and no number."""
    facts, size = report["machine"], report["settings"]
    lines = [
        f"TRL step, fp32: {size['model']}, {size['prompts'] * size['group']} completions of"
        f" {size['tokens']} tokens, prompts of {size['prompt_tokens']}",
        f"{facts['cpu']}, {facts['threads']} threads, load {facts['load_before'][0]:.2f}"
        f" -> {facts['load_after'][0]:.2f}; "
        + ", ".join(f"{k} {v}" for k, v in facts["versions"].items()),
        "gradients differ by at most "
        + ", ".join(f"{gap:.1e} ({name})" for name, gap in report["gate"]["worst"].items()),
    ]
    if not report["gate"]["green"]:
        return "\n".join([*lines, f"refused: expected at most {WORST:.0e}"])
    lines += ["", f"{'phase':6} {'side':5} {'seconds':>8} {'range':>15} {'peak MiB':>9}"]
    for name, sides in report["rows"].items():
        middle = {side: statistics.median(row["seconds"]) for side, row in sides.items()}
        for side, row in sides.items():
            span = f"{min(row['seconds']):.3f}-{max(row['seconds']):.3f}"
            peak = row.get("peak_mib", "-")
            lines.append(f"{name:6} {side:5} {middle[side]:8.3f} {span:>15} {peak:>9}")
        verdict = f"{name}: {middle['trl'] / middle['ours']:.2f} times as fast"
        if name == "head":
            verdict += f" (at least {GOAL[0]}, goal {GOAL[1]})"
        peaks = [sides[side].get("peak_mib") for side in SIDES]
        if None not in peaks:
            verdict += (
                f", {peaks[1] - peaks[0]} MiB less (all logits: {report['logits_mib']:.0f} MiB)"
            )
        lines.append(verdict)
    return "\n".join(lines)


def _gap(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def _batch(settings: Settings, pad: int) -> dict[str, Tensor]:
    """TRL's own dictionary: whole prompts, ragged completions, one advantage a completion."""
    generator = torch.Generator().manual_seed(3)
    rows = settings.prompts * settings.group
    ids = torch.randint(
        5, 90, (rows, settings.prompt_tokens + settings.tokens), generator=generator
    )
    length = torch.randint(
        settings.tokens // 2, settings.tokens + 1, (rows, 1), generator=generator
    )
    length[0] = settings.tokens
    mask = (torch.arange(settings.tokens) < length).long()
    completion = torch.where(mask == 1, ids[:, settings.prompt_tokens :], pad)
    return {
        "prompt_ids": ids[:, : settings.prompt_tokens],
        "prompt_mask": torch.ones(rows, settings.prompt_tokens, dtype=torch.long),
        "completion_ids": completion,
        "completion_mask": mask,
        "advantages": torch.randn(rows, generator=generator),
        "num_items_in_batch": mask.sum(),
    }


def _memory(settings: Settings, side: str, phase: str) -> dict[str, int]:
    """Resident high water of a process that runs one phase of one side once, MiB."""
    command = [sys.executable, "-m", "bench", "trl", "--model", settings.model, "--alone", side]
    command += ["--tokens", str(settings.tokens), "--threads", str(settings.threads)]
    command += ["--phase", phase]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, env=env, cwd=root, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench trl", description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--out", type=Path, help="a folder for the raw numbers")
    parser.add_argument("--alone", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--phase", choices=("step", "head"), default="step", help=argparse.SUPPRESS)
    return parser
