"""Training a process reward model on labelled traces: the joint loss of ReasonFlux-PRM.

    L = lambda_step * mean over steps (score - label)^2 + lambda_final * (trajectory - final)^2

(arXiv 2506.18896), averaged over the traces of a step; labels that are yes or no are learned by
cross-entropy instead (`loss=auto`), the usual loss of PRM800K and Math-Shepherd data. A trace
without `final` has no trajectory part. A share of the *prompts* is held out by hash for evaluation.
Checkpoints are atomic and a resumed run equals an unbroken one on a CPU. Left out: several ranks.
    train(traces, PRMConfig(model="runs/x/checkpoint-0"), Path("runs/prm")).metrics
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from reasonrl import checkpoint, lora, models
from reasonrl.config import BatchLimit, Count, Optim, Positive, Rate, Save, Section, check_resume
from reasonrl.config_yaml import write_yaml
from reasonrl.log import json_row, replace_file, truncate_rows
from reasonrl.prm import PRM, Encoded, Reading
from reasonrl.progress import Phase, phase
from reasonrl.records import InputError, NonFiniteStop
from reasonrl.rows import Refused
from reasonrl.state_file import load_state, rng_state, save_state, set_rng_state
from reasonrl.stepwise import Trace
from reasonrl.tasks.base import Draws, content_share
from reasonrl.update import rate_at

__all__ = ["PRMConfig", "train"]
Weight = Annotated[float, Field(ge=0)]


class PRMConfig(Section):
    """Keys of `reasonrl prm train`; the paper gives no lambdas and no learning rate."""

    model: str = "tiny"  # folder, hub id or "smollm2": the body
    steps: Positive = 400  # optimiser steps
    batch_traces: Positive = 32  # traces of one optimiser step
    learning_rate: Rate = 1e-4
    head_learning_rate: Rate = 1e-3
    loss: Literal["auto", "mse", "cross_entropy"] = "auto"
    lambda_step: Weight = 1.0
    lambda_final: Weight = 1.0
    kind: Literal["sigmoid", "softmax"] = "sigmoid"
    trajectory: bool = True  # a head for the whole answer
    separator: str | None = None  # a token of the tokenizer behind every step
    delimiter: str = "\n"  # where plain completions are cut, kept for scoring
    alpha: Weight = 1.0
    lora_rank: Count = 0
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.1  # share of prompts
    seed: Count = 0
    optim: Optim = Optim(warmup=10, schedule="linear")
    save: Save = Save()
    batch: BatchLimit = BatchLimit(tokens=8192)
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    threads: Positive | None = None


@dataclass
class Trained:
    """A model that is being trained, and where it stands."""

    config: PRMConfig
    prm: PRM
    optimizer: torch.optim.Optimizer
    step: int = 0
    skipped: int = 0
    metrics: dict[str, float] = field(default_factory=dict)


def train(
    traces: Sequence[Trace],
    config: PRMConfig,
    out: Path | None,  # None: nothing is kept on disk
    *,
    resume: bool = False,
    policy: models.Policy | None = None,  # the body, taken over; None: config.model
    note: Callable[[str], None] = print,
) -> Trained:
    """Train to the last step; the model, and its metrics on the held-out traces.

    InputError: a trace that cannot be read (its row named), no trace to learn from, or a folder
    that holds another run.
    """
    if config.threads:
        torch.set_num_threads(config.threads)
    run = _start(config, out, resume, policy)
    encoded = {}
    with phase("reading", len(traces), "traces") as part:
        for trace in traces:
            encoded[id(trace)] = _encoded(run.prm, trace)
            part.add()
    learn, held = _divide(traces, config.held_out)
    if not learn:
        why = f"; all {len(held)} are held out, set held_out=0" if held else ""
        raise InputError(f"expected at least one labelled trace to learn from, got none{why}")
    if out is not None:
        replace_file(out / "config.yaml", write_yaml(config.model_dump(mode="json")).encode())
        truncate_rows(out / "metrics.jsonl", run.step)
    note(f"{len(learn)} traces to learn from, {len(held)} held out, {config.steps} steps")
    with phase("training", config.steps - run.step, "steps") as part:
        while run.step < config.steps:
            chosen = _chosen(learn, config, run.step)
            metrics = _step(run, chosen, [encoded[id(t)] for t in chosen], part)
            if out is not None:
                with (out / "metrics.jsonl").open("a") as file:
                    file.write(_line(metrics))
            if run.step % max(1, config.steps // 10) == 0:
                note(f"step {run.step}/{config.steps}  loss {metrics['loss']:.4f}")
            every = config.save.every
            if out is not None and every and run.step % every == 0 and run.step < config.steps:
                _save(run, out)
    run.prm.body.model.eval()
    run.metrics = evaluate(run.prm, held, config) if held else {}
    if out is not None:
        replace_file(out / "eval.json", _line(run.metrics).encode())
        _save(run, out)
    return run


def evaluate(prm: PRM, traces: Sequence[Trace], config: PRMConfig) -> dict[str, float]:
    """Held-out metrics: accuracy of a step at 0.5, mean squared error of steps and of the whole,
    and how often the first wrong step is found at its place (all traces; none is a place too)."""
    pairs, whole, places = [], [], []
    for trace, scored in zip(traces, prm.score(traces, config.batch.tokens), strict=True):
        labels = list(trace.labels or ())
        pairs += zip(scored.steps, labels, strict=True)
        places.append(_first_wrong(scored.steps) == _first_wrong(labels))
        if trace.final is not None and scored.final is not None:
            whole.append((scored.final - trace.final) ** 2)
    out = {
        "eval/traces": float(len(traces)),
        "eval/step_accuracy": _mean([(a >= 0.5) == (b >= 0.5) for a, b in pairs]),
        "eval/step_mse": _mean([(a - b) ** 2 for a, b in pairs]),
        "eval/first_error_accuracy": _mean(places),
    }
    return out | ({"eval/final_mse": _mean(whole)} if whole else {})


def _start(
    config: PRMConfig, out: Path | None, resume: bool, policy: models.Policy | None
) -> Trained:
    found = checkpoint.latest_verified(out) if out is not None and out.is_dir() else None
    if resume and found is None:
        raise InputError(f"{out}: no checkpoint to resume from; start it without --resume")
    if not resume and found is not None:
        raise InputError(f"{out}: holds a run already; use --resume, or another --out")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    if policy is None:
        policy = models.load(config.model, dtype=config.dtype, seed=config.seed)
    prm = PRM.new(lora.trainable(policy, config.lora_rank), _reading(config, policy), config.seed)
    body = [p for p in prm.body.model.parameters() if p.requires_grad]
    heads = prm.parameters()[len(body) :]
    optimizer = torch.optim.AdamW(
        [
            {"params": body, "peak": config.learning_rate},
            {"params": heads, "peak": config.head_learning_rate},
        ],
        lr=config.learning_rate,
        betas=config.optim.betas,
        eps=config.optim.eps,
        weight_decay=config.optim.weight_decay,
    )
    run = Trained(config, prm, optimizer)
    if found is not None:
        manifest = checkpoint.read_manifest(found)
        was = PRMConfig.model_validate(manifest["meta"]["config"])
        check_resume(was, config, str(out))
        _restore(run, found)
        run.step = manifest["step"]
    return run


def _reading(config: PRMConfig, policy: models.Policy) -> Reading:
    separator = None
    if config.separator is not None:
        separator = policy.tokenizer.convert_tokens_to_ids(config.separator)
        if separator is None or separator == policy.tokenizer.unk_token_id:
            raise InputError(f"separator: {config.separator!r} is no token of {config.model}")
    return Reading(
        kind=config.kind,
        separator=separator,
        end=policy.tokenizer.eos_token_id if config.trajectory else None,
        delimiter=config.delimiter,
        alpha=config.alpha,
    )


def _divide(traces: Sequence[Trace], share: float) -> tuple[list[Trace], list[Trace]]:
    """Traces to learn from and held out, by a hash of the prompt."""
    for trace in traces:
        if trace.labels is None:
            raise InputError(f"{trace.where}: field 'labels': expected labels, got nothing")
    held = [t for t in traces if content_share(repr(t.prompt)) < share]
    return [t for t in traces if content_share(repr(t.prompt)) >= share], held


def _encoded(prm: PRM, trace: Trace) -> Encoded:
    try:
        return prm.encode(trace)
    except (Refused, InputError) as error:
        raise InputError(f"{trace.where}: {error}") from None


def _chosen(traces: Sequence[Trace], config: PRMConfig, step: int) -> list[Trace]:
    """The traces of a step: passes over all of them, each in an order of its own."""
    first, out = step * config.batch_traces, []
    order: tuple[int, list[int]] = (-1, [])
    for at in range(first, first + config.batch_traces):
        lap, place = divmod(at, len(traces))
        if order[0] != lap:
            order = lap, Draws("prm", config.seed, lap).shuffled(range(len(traces)))
        out.append(traces[order[1][place]])
    return out


def _step(
    run: Trained, traces: Sequence[Trace], encoded: Sequence[Encoded], part: Phase
) -> dict[str, float]:
    config, prm, total = run.config, run.prm, 0.0
    prm.body.model.train()
    run.step += 1
    for batch in prm.batches(traces, encoded, config.batch.tokens):
        steps, final, counts = prm.read(batch, encoded)
        rows = [traces[row] for row in batch.rows.tolist()]
        loss = _loss(prm, steps, final[:, 0], counts, rows, config) / len(traces)
        loss.backward()
        total += float(loss.detach())
        part.add(0, tokens=batch.input_ids.numel())
    part.add()
    parameters = prm.parameters()
    clip = config.optim.grad_clip or math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
    for group in run.optimizer.param_groups:
        optim = config.optim
        group["lr"] = rate_at(
            run.step, config.steps, group["peak"], optim.warmup, optim.schedule, optim.final_scale
        )
    if math.isfinite(norm):
        run.optimizer.step()
    run.skipped = 0 if math.isfinite(norm) else run.skipped + 1
    run.optimizer.zero_grad(set_to_none=True)
    if run.skipped >= 3:
        raise NonFiniteStop("the gradient was not finite 3 times in a row")
    rate = run.optimizer.param_groups[0]["lr"]
    return {"step": run.step, "loss": total, "grad_norm": norm, "learning_rate": rate}


def _loss(
    prm: PRM,
    steps: Tensor,  # (S, K) head outputs
    final: Tensor,  # (B,) logits
    counts: Sequence[int],  # B
    traces: Sequence[Trace],  # B
    config: PRMConfig,
) -> Tensor:
    """Sum over the traces of the joint loss."""
    device = steps.device
    label = torch.tensor([x for t in traces for x in t.labels or ()], device=device)
    share = torch.tensor([1 / n for n in counts for _ in range(n)], device=device)
    boolean = torch.tensor(
        [_crossed(config, t) for t, n in zip(traces, counts, strict=True) for _ in range(n)],
        device=device,
    )
    logit = steps[:, 1] - steps[:, 0] if prm.reading.kind == "softmax" else steps[:, 0]
    loss = config.lambda_step * (share * _part(logit, label, boolean)).sum()
    known = torch.tensor([t.final is not None for t in traces], device=device)
    if prm.final is not None and bool(known.any()):
        target = torch.tensor([t.final or 0.0 for t in traces], device=device)
        yes = torch.tensor([_crossed(config, t) for t in traces], device=device)
        loss = loss + config.lambda_final * _part(final, target, yes)[known].sum()
    return loss


def _part(logit: Tensor, label: Tensor, crossed: Tensor) -> Tensor:
    square = (logit.sigmoid() - label).square()
    entropy = F.binary_cross_entropy_with_logits(logit, label, reduction="none")
    return torch.where(crossed, entropy, square)


def _crossed(config: PRMConfig, trace: Trace) -> bool:
    return trace.boolean if config.loss == "auto" else config.loss == "cross_entropy"


def _save(run: Trained, out: Path) -> None:
    body = run.prm.body

    def write(folder: Path) -> None:
        adapted = lora.adapted(body)
        run.prm.save(folder, lora.merged(body) if adapted else None)
        if adapted:
            named = {n: p.detach() for n, p in body.model.named_parameters() if p.requires_grad}
            save_state(folder / "adapter", named)
        save_state(folder / "optimizer", run.optimizer.state_dict())
        save_state(folder / "rng", rng_state())

    meta: dict[str, Any] = {"config": run.config.model_dump(mode="json")}
    checkpoint.save(out, run.step, write, meta, keep=run.config.save.keep)


def _restore(run: Trained, folder: Path) -> None:
    saved, body = PRM.load(folder), run.prm.body
    run.prm.head.load_state_dict(saved.head.state_dict())
    if run.prm.final is not None and saved.final is not None:
        run.prm.final.load_state_dict(saved.final.state_dict())
    if lora.adapted(body):
        adapter = load_state(folder / "adapter")
        with torch.no_grad():
            for name, parameter in body.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(adapter[name])
    else:
        body.model.load_state_dict(saved.body.model.state_dict())
    run.optimizer.load_state_dict(load_state(folder / "optimizer"))
    set_rng_state(load_state(folder / "rng"))


def _first_wrong(values: Sequence[float]) -> int:
    return next((i for i, value in enumerate(values) if value < 0.5), -1)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _line(row: dict[str, Any]) -> str:
    return json.dumps(json_row(row)) + "\n"
