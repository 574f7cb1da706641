"""Memory and traffic of a training job by arithmetic: what stands on a rank, and what it sends.

    found = plan(shape_of("qwen2.5-7b"), Job(gpus=8, zero=2))
    found.rows, found.peak, found.traffic

Bytes a parameter follow the accounting of the ZeRO paper (arXiv 1910.02054, section 3): weights,
gradients and optimiser states are counted apart and divided by the ranks from stage 3, 2, 1 on.
Three layouts, `precision`:

    mixed  fp32 weights (4), bf16 copies made by autocast in a forward (2), fp32 gradients (4), Adam
           (8); what `reasonrl train` does
    bf16   bf16 weights (2), fp32 gradient sums (4), an fp32 master (4) and Adam (8)
    fp32   weights, gradients 4 each, Adam 8

With ZeRO 1 or 2 the optimiser steps on a partition of its own, so the master's 4 bytes are there,
divided, in every layout. What is not modelled: padding, the caching allocator's holes, NCCL's
buffers (the reserve is for them), images, pipeline and expert parallelism.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from reasonrl.plan_memory import (
    Lengths,
    activation_bytes,
    decode_bytes,
    head_bytes,
    kv_bytes_per_token,
    microbatches,
    stored_logits,
)
from reasonrl.plan_shapes import Shape
from reasonrl.records import InputError
from reasonrl.structure import TURNED

GIB = 1 << 30
PHASES = ("rollout", "score", "update")
COMPUTE = {"mixed": 2, "bf16": 2, "fp32": 4}
WEIGHT = {"mixed": 4, "bf16": 2, "fp32": 4}
ADAM = 8
GRADIENT = 4


@dataclass(frozen=True)
class Job:
    """What is trained how. Lengths are those to plan for: the longest, to be safe."""

    gpus: int = 8
    gpu_memory: float = 80.0  # GiB
    group: int = 16
    prompts_per_step: int = 64
    prompt: int = 512  # tokens
    completion: int = 4096
    batch_tokens: int = 8192  # packed tokens of a micro-batch
    updates: int = 1
    zero: int = 0
    precision: str = "mixed"
    lora: int = 0  # rank; 0: all weights
    reference: bool = False
    prm: str = "none"  # none, frozen, full (learned, all weights), lora (an adapter)
    checkpointing: bool = False
    attention: str = "fused"  # fused, or plain: a CPU's, scores are kept for the backward pass
    liger: str = "auto"  # auto: a layer is one function where the loop has it so; off: modules
    engine: str = "in-process"  # or colocated: another engine on the same GPUs, asleep in updates
    tensor_parallel: int = 1  # of that engine
    rows: int = 256  # completions decoded at a time on a rank
    reserve: float = 0.1  # share of a GPU that is left free


@dataclass(frozen=True)
class Row:
    """Bytes on one rank and the phases in which they are there."""

    name: str
    size: float
    phases: Sequence[str] = PHASES


@dataclass(frozen=True)
class Plan:
    shape: Shape
    job: Job
    rows: Sequence[Row]
    traffic: Sequence[tuple[str, float]]  # bytes that a rank sends in a step
    logits: float  # bytes that a trainer which stores logits would add to an update
    batches: int  # micro-batches of a rank in a step
    tokens: int  # of the largest

    def phase(self, name: str) -> float:
        return math.fsum(row.size for row in self.rows if name in row.phases)

    @property
    def peak(self) -> float:
        return max(map(self.phase, PHASES))

    @property
    def limit(self) -> float:
        return self.job.gpu_memory * GIB * (1 - self.job.reserve)

    @property
    def fits(self) -> bool:
        return self.peak <= self.limit


def check(job: Job) -> None:
    """InputError for numbers and combinations that mean nothing."""
    positive = ("gpus", "gpu_memory", "prompts_per_step", "prompt", "completion", "batch_tokens")
    for name in (*positive, "group", "updates", "tensor_parallel", "rows"):
        value = getattr(job, name)
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"--{name.replace('_', '-')}: expected > 0, got {value}")
    if job.lora < 0:
        raise InputError(f"--lora: expected a rank >= 0, got {job.lora}")
    if not 0 <= job.reserve < 1:
        raise InputError(f"--reserve: expected a share from 0 to below 1, got {job.reserve}")
    if job.engine == "in-process" and job.zero == 3:
        raise InputError(
            "--zero 3: rollouts in process gather the weights; add --engine colocated, which keeps"
            " an inference copy"
        )
    if job.engine == "in-process" and job.tensor_parallel > 1:
        raise InputError("--tensor-parallel: only with --engine colocated")
    if job.gpus % job.tensor_parallel:
        raise InputError(f"--tensor-parallel: {job.tensor_parallel} does not divide {job.gpus}")


def plan(shape: Shape, job: Job, prm: Shape | None = None) -> Plan:
    """The job on one rank; prm: the reward model's shape, the policy's by default."""
    check(job)
    prm = prm or shape
    sizes = Lengths(job.prompt, job.completion, job.group)
    groups = -(-job.prompts_per_step // job.gpus)
    batches, tokens = microbatches(sizes, groups, job.batch_tokens)
    compute = COMPUTE[job.precision]
    plain, whole = job.attention == "plain", whole_layers(shape, job)
    rows = [
        *_states(shape, job),
        *_frozen_and_learned(shape, prm, job),
        *_rollout(shape, job, sizes, groups),
        Row(
            f"activations, {tokens} tokens",
            tokens * activation_bytes(shape, sizes, job.precision, job.checkpointing, plain, whole),
            ("update",),
        ),
        Row(
            "head: a chunk of logits, its gradient", head_bytes(shape, tokens, compute), ("update",)
        ),
    ]
    return Plan(
        shape=shape,
        job=job,
        rows=[row for row in rows if row.size],
        traffic=_traffic(shape, prm, job, batches, groups),
        logits=stored_logits(shape, tokens),
        batches=batches,
        tokens=tokens,
    )


def whole_layers(shape: Shape, job: Job) -> bool:
    """Whether a decoder layer is one function: fp32 weights that nothing wraps, of known models."""
    known = job.liger == "auto" and shape.kind in TURNED
    fits = job.precision == "mixed" or job.precision == "fp32" and job.attention == "plain"
    return known and fits and job.zero < 3 and not job.lora


def _share(job: Job, stage: int) -> int:
    """How many ranks divide what is sharded from a ZeRO stage on."""
    return job.gpus if job.zero >= stage else 1


def _states(shape: Shape, job: Job) -> list[Row]:
    """Weights, copies, gradients, optimiser. A LoRA adapter (arXiv 2106.09685) of rank r adds
    r * (in + out) parameters to every linear layer but the head; only it has the last two."""
    size, adapter = shape.params, job.lora * shape.linear_io
    learned = adapter or size
    weights = WEIGHT[job.precision] * size / _share(job, 3) + 4 * adapter / _share(job, 3)
    master = 0 if job.precision != "bf16" and job.zero == 0 else 4
    rows = [
        Row("weights", weights),
        Row("optimiser", (ADAM + (0 if adapter else master)) * learned / _share(job, 1)),
        Row("gradients", GRADIENT * learned / _share(job, 2), ("update",)),
    ]
    if job.precision == "mixed" and job.zero < 3:
        # autograd holds each module's bf16 copy until its backward, adapter or not
        copies = shape.block if whole_layers(shape, job) else size
        rows.append(Row("bf16 copies in a forward", 2 * copies, ("update",)))
    if job.zero == 3:  # the layer at work and the one that is fetched ahead
        gathered = 2 * WEIGHT[job.precision] * shape.block
        rows.append(Row("gathered layers", gathered, ("score", "update")))
    return rows


def _frozen_and_learned(shape: Shape, prm: Shape, job: Job) -> list[Row]:
    """Reference and reward model. A learned reward is not wrapped by ZeRO 1 or 2: whole on every
    rank, its gradient kept from the scores to its step after the policy's (algos/prime.py)."""
    kept, split = WEIGHT[job.precision], _share(job, 3)
    rows = []
    if job.reference and not job.lora:  # with an adapter the reference is the policy without it
        rows.append(Row("reference", kept * shape.params / split))
    late = ("score", "update")
    if job.prm == "frozen":
        rows.append(Row("reward model, frozen", kept * prm.params / split))
    elif job.prm == "full":
        rows.append(Row("reward model: weights, Adam", (kept + ADAM) * prm.params / split))
        rows.append(Row("reward model: gradient", GRADIENT * prm.params / split, late))
    elif job.prm == "lora":
        adapter = (job.lora or 8) * prm.linear_io
        own = 0 if job.reference and not job.lora else kept * prm.params / split
        rows.append(Row("reward model: weights under it", own))
        rows.append(Row("reward model: adapter", (4 + ADAM + GRADIENT) * adapter))
    return rows


def _rollout(shape: Shape, job: Job, sizes: Lengths, groups: int) -> list[Row]:
    """The engine's weights in the compute dtype, its cache, its logits.

    In process the cache is static, and a second one of up to 0.8 its size stands beside it a layer
    at a time while rows that ended are dropped (slots.py); a paged engine has neither. On a CPU one
    kernel has the whole decoder where layers are one function: a prompt's keys stand once, no row
    is dropped, and weights are packed in fp32 too.
    """
    compute, tp = COMPUTE[job.precision], job.tensor_parallel
    rows = min(max(job.rows, sizes.group), groups * sizes.group)
    each = kv_bytes_per_token(shape, compute)
    cache = rows * (sizes.prompt + sizes.completion) * each
    phase = ("rollout",)
    if job.engine == "in-process" and job.attention == "plain" and whole_layers(shape, job):
        copy, what = compute * shape.params, "weights packed to sample with"
        cache = (rows / sizes.group * sizes.prompt + rows * sizes.completion) * each
    elif job.engine == "in-process":
        copy = compute * shape.params if job.precision == "mixed" else 0
        cache, what = (1 + 0.8 / shape.layers) * cache, "bf16 weights to sample with"
    else:  # tp ranks share the rows of all tp
        copy, what = compute * shape.params / tp, "inference copy of the weights"
        cache *= max(1, tp / shape.kv_heads)  # a key head is not cut in two
    logits = rows * decode_bytes(shape, compute)
    return [
        Row(what, copy, phase),
        Row(f"KV cache, {rows} completions", cache, phase),
        Row("logits of the next token", logits, phase),
    ]


def _traffic(shape: Shape, prm: Shape, job: Job, batches: int, groups: int):
    """Bytes a rank sends in a step, by ring algorithms: (n-1)/n of the data for a reduce-scatter or
    an all-gather, twice that for an all-reduce.

    ZeRO 0 reduces once an update; 1 reduce-scatters once and gathers the new weights; 2 does the
    first in every micro-batch; 3 gathers the weights twice in every micro-batch (forward, backward)
    and once in every forward without gradient.
    """
    n, updates = job.gpus, job.updates
    ring = (n - 1) / n
    learned = job.lora * shape.linear_io or shape.params
    sent = 2 if job.precision == "bf16" else 4
    weight = WEIGHT[job.precision]
    rows: list[tuple[str, float]] = []
    if job.zero == 0:
        rows.append(("gradients, all-reduce", 2 * ring * sent * learned * updates))
    else:
        times = updates if job.zero == 1 else max(batches, updates)
        rows.append(("gradients, reduce-scatter", ring * sent * learned * times))
    if job.zero in (1, 2):
        rows.append(("new weights, all-gather", ring * weight * learned * updates))
    if job.zero == 3:
        passes = 2 * batches + (batches if updates > 1 else 0)
        rows.append(("weights, all-gather", ring * weight * shape.params * passes))
        if job.reference:
            again = shape.params * batches
            rows.append(("reference, all-gather", ring * weight * again))
        rows.append(("weights to the engine", ring * COMPUTE[job.precision] * shape.params))
    if job.zero == 3 and job.prm != "none":
        passes = {"frozen": weight, "full": 2 * weight + sent, "lora": 2 * weight}[job.prm]
        rows.append(("reward model, sharded", ring * passes * prm.params * batches))
    if job.prm == "lora" or (job.prm == "full" and job.zero < 3):
        own = prm.params if job.prm == "full" else (job.lora or 8) * prm.linear_io
        rows.append(("reward model's gradient, all-reduce", 2 * ring * 4 * own))
    if (tp := job.tensor_parallel) > 1:  # two all-reduces of the hidden states in every layer
        tokens = groups * tp * (job.prompt + job.group * job.completion)
        each = 2 * (tp - 1) / tp * COMPUTE[job.precision] * shape.hidden
        rows.append(("engine, tensor parallel", 2 * shape.layers * tokens * each))
    return [row for row in rows if row[1]]


def missing(job: Job) -> list[str]:
    """What of this layout `reasonrl train` does not do itself."""
    beside = job.engine != "in-process"
    parts = {
        "weights sharded outside the update (it gathers them to sample and score)": job.zero == 3,
        "an engine asleep beside it (`engine.url` is one on GPUs of its own)": beside,
        "activation checkpointing": job.checkpointing,
        "bf16 weights (it keeps fp32 ones)": job.precision == "bf16",
    }
    return [name for name, wanted in parts.items() if wanted]


def advice(shape: Shape, job: Job, prm: Shape | None = None) -> list[dict[str, object]]:
    """Changes of the job that make it fit, the smallest first: single ones, else a heap of them,
    else more GPUs as well; empty where nothing helps."""
    shortest = max(512, job.prompt + job.completion)
    apart = {"engine": "colocated"} if job.engine == "in-process" else {}
    singles: list[dict[str, object]] = [
        {"checkpointing": True},
        {"batch_tokens": shortest},
        {"rows": max(job.group, job.rows // 4)},
        {"zero": 1},
        {"zero": 2},
        {"precision": "bf16"},
        {"zero": 3, **apart},
        {"lora": 32},
    ]
    changes = [c for c in singles if _further(job, c)]
    good = [c for c in changes if plan(shape, replace(job, **c), prm).fits]  # type: ignore[arg-type]
    if good:
        return good[:3]
    heap: dict[str, object] = {"checkpointing": True, "batch_tokens": shortest}
    heaps = [heap | {"zero": 2}, heap | {"zero": 2, "precision": "bf16"}]
    final = heap | {"zero": 3, "precision": "bf16", "engine": "colocated"}
    tps = [t for t in (1, 2, 4, 8) if job.gpus % t == 0 and t >= job.tensor_parallel]
    heaps += [final | {"tensor_parallel": t} for t in tps]
    heaps += [
        final | {"gpus": job.gpus * 2**k, "tensor_parallel": 8}
        for k in range(1, 10)
        if job.gpus * 2**k % 8 == 0
    ]
    for changed in heaps:
        if plan(shape, replace(job, **changed), prm).fits:  # type: ignore[arg-type]
            return [{k: v for k, v in changed.items() if v != getattr(job, k)}]
    return []


def _further(job: Job, change: dict[str, object]) -> bool:
    """Whether a change goes on from the job, and not back."""
    if "zero" in change:
        return int(str(change["zero"])) > job.zero
    if "batch_tokens" in change or "rows" in change:
        name = next(iter(change))
        return int(str(change[name])) < getattr(job, name)
    name = next(iter(change))
    return not getattr(job, name) if name != "precision" else job.precision != "bf16"
