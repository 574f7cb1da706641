"""One rank of tests/test_heads.py: the policy's loss under a sharding, by the sharder's own calls.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python heads_worker.py OUT zero2 zero3

Every rank has its own completions; ranks are averaged, so the loss divides by its share. OUT gets
the summed loss of every step, the whole weights after the last, and how many elements a rank held.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import distributed_worker as worker
import torch
from torch import Tensor
from torch import distributed as dist

from reasonrl import models
from reasonrl.batch import pack
from reasonrl.loss import LossSpec
from reasonrl.records import Batch
from reasonrl.update import Trainable

SPEC = LossSpec.named("grpo", kl_coef=0.3)  # its value moves with the weights
STEPS, RATE = 3, 1e-2
CASE = worker.Case(tokens=4096)  # one micro-batch on each rank
ROWS = sum(map(len, CASE.sizes))


def trainable(tied: bool = True) -> Trainable:
    policy = models.load("tiny", dtype="fp32", seed=1, width=32, layers=2, heads=2)
    if not tied:
        head = policy.model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().flip(0).clone())
        policy.model.config.tie_word_embeddings = False
    policy.model.config.final_logit_softcapping = 3.0  # of our head alone: what Gemma has
    policy.model.config.logit_scale = 2.0
    return Trainable(policy, 1.0)


def batch(rank: int, world: int) -> Batch:
    rollout, advantage = worker.dealt(CASE, rank, world)
    (made,) = pack(rollout, advantage, CASE.tokens, ref_logp=-4.0 - advantage.abs())
    return made


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=RATE, eps=1e-5)  # eps above a gradient's rounding


def alone(tied: bool, head_only: bool) -> tuple[list[float], dict[str, Tensor]]:
    """One process with everybody's completions."""
    module, losses = trainable(tied), []
    head = module.model.get_output_embeddings().weight
    optimizer = adamw([head] if head_only else module.parameters())
    for _ in range(STEPS):
        loss, _ = module(batch(0, 1), SPEC, ROWS)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    named = {"head": head} if head_only else dict(module.named_parameters())
    return losses, {k: v.detach().clone() for k, v in named.items()}


def zero(stage: int, rank: int, world: int):
    import deepspeed

    module, losses = trainable(), []
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=adamw(module.parameters()), config=config
    )
    for _ in range(STEPS):
        loss, _ = engine(batch(rank, world), SPEC, ROWS / world)
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    parameters = list(module.parameters())
    held = sum(getattr(p, "ds_tensor", p).numel() for p in parameters)
    gather = contextlib.nullcontext()
    if stage == 3:
        gather = deepspeed.zero.GatheredParameters(parameters)
    with gather:
        whole = {k: v.detach().clone() for k, v in module.named_parameters()}
    return losses, whole, held


def fsdp2(kind: str, rank: int, world: int):
    from torch.distributed.fsdp import fully_shard

    module, losses = trainable(tied=kind != "fsdp2-head"), []
    for layer in module.model.model.layers:
        fully_shard(layer)
    if kind == "fsdp2-head":
        fully_shard(module.model.get_output_embeddings())
    fully_shard(module)
    optimizer = adamw(module.parameters())
    for _ in range(STEPS):
        loss, _ = module(batch(rank, world), SPEC, ROWS / world)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    parameters = dict(module.named_parameters())
    held = sum(p.to_local().numel() for p in parameters.values())
    return losses, {k: p.full_tensor().detach().clone() for k, p in parameters.items()}, held


def dtensor(rank: int, world: int):
    """A head that no hook gathers: the gradient at its shard is the mean over the ranks."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    module, losses = trainable(tied=False), []
    head = module.model.get_output_embeddings()
    mesh = init_device_mesh("cpu", (world,))
    head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))
    optimizer = adamw([head.weight])
    for _ in range(STEPS):
        loss, _ = module(batch(rank, world), SPEC, ROWS / world)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    held = head.weight.to_local().numel()
    return losses, {"head": head.weight.full_tensor().detach().clone()}, held


def main(out: Path, *kinds: str) -> None:
    torch.set_num_threads(1)
    if kinds[0].startswith("zero"):
        import deepspeed

        worker.no_compiled_reduction()
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
    else:
        dist.init_process_group("gloo")
    for kind in kinds:
        measure(out, kind, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    dist.destroy_process_group()


def measure(out: Path, kind: str, rank: int, world: int) -> None:
    if kind == "dtensor":
        losses, weights, held = dtensor(rank, world)
    elif kind.startswith("zero"):
        losses, weights, held = zero(int(kind[-1]), rank, world)
    else:
        losses, weights, held = fsdp2(kind, rank, world)
    total = torch.tensor(losses)
    dist.all_reduce(total)
    made = {"losses": (total / world).tolist(), "weights": weights, "held": held}
    torch.save(made, out / f"{kind}-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    # everything is written and the group is gone; a rank has died by SIGABRT without a word, once
    # in some twenty runs, probably while threads of gloo or DeepSpeed ended with the interpreter
    sys.stderr.flush()
    os._exit(0)
