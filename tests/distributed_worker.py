"""One rank of the distributed tests: the cases, and the script that runs them under gloo.

    RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=... python distributed_worker.py OUT ddp

A case is a fixed rollout whose groups are dealt out to the ranks as the loop deals them. Every
rank writes what it measured to OUT/<kind>-<rank>.pt; the test compares with one process.
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from reasonrl import cli, models
from reasonrl import config as configs
from reasonrl.algos import GRPO
from reasonrl.batch import pack
from reasonrl.loss import LossSpec
from reasonrl.records import NonFiniteStop, Problem, Rewards, Rollout
from reasonrl.tasks import make_task
from reasonrl.train import Run, train
from reasonrl.update import Learner
from reasonrl.vision import prepare

UNEVEN = ((3, 7, 1), (5, 2), (9,), (4, 4, 6, 1), (2, 8))
SMALL = (  # the recipe `tiny`, shrunk until a step takes milliseconds
    "model_options={width: 32, layers: 1, heads: 2}",
    "task_options={terms: 2, ops: '+', mod: 5, low: 0, style: compact}",
    "steps=3",
    "cold_start_steps=2",
    "cold_start.batch=5",
    "prompts_per_step=3",
    "group=4",
    "max_completion_length=12",
    "eval_problems=4",
    "threads=1",
    "learning_rate=1e-4",
    "optim.schedule=constant",
    "loss={name: grpo, kl_coef: 0.5}",  # a row without credit has a gradient still
)


@dataclass(frozen=True)
class Case:
    """sizes[g]: completion lengths of group g; dead: groups whose advantages are all zero."""

    loss: str = "grpo"
    sizes: tuple[tuple[int, ...], ...] = UNEVEN
    dead: tuple[int, ...] = ()
    tokens: int = 24  # of a micro-batch: the ranks get different numbers of them
    updates: int = 1
    kl: float = 0.0
    nan_rank: int | None = None  # whose gradient is not finite
    images: tuple[int, ...] = ()  # groups with a picture
    steps: int = 2


CASES = {
    "grpo": Case("grpo"),
    "dapo": Case("dapo"),
    "dr_grpo": Case("dr_grpo"),
    "gspo": Case("gspo"),
    "whole": Case("dapo", tokens=4096),
    "dead rows on rank 1": Case("grpo", dead=(1, 3)),
    "no group on rank 1": Case("dapo", sizes=((3, 7, 1),)),
    "no token on rank 1": Case("gspo", sizes=((3, 7, 1), (0, 0), (4, 2))),
    "reference, no group on rank 1": Case("grpo", sizes=((3, 7, 1),), kl=0.5),
    "two updates": Case("dapo", updates=2),
    "more updates than groups of rank 1": Case("grpo", sizes=UNEVEN[:3], updates=3),
    "all dead": Case("grpo", dead=(0, 1, 2, 3, 4)),
    "no token at all": Case("grpo", sizes=((0, 0), (0,))),
    "nan on rank 1": Case("grpo", nan_rank=1),
    "pictures on rank 0": Case("dapo", images=(0, 2), tokens=40),
    "a picture, no group on rank 1": Case("dapo", sizes=((3, 7, 1),), images=(0,)),
}


def small(*changes: str):
    return configs.load("tiny", [*SMALL, *changes])


def dealt(
    case: Case, rank: int, world: int, policy: models.Policy | None = None
) -> tuple[Rollout, Tensor]:
    """The rollout and advantages of a rank: every world-th group of the case."""
    generator = torch.Generator().manual_seed(7)
    rows: list[tuple[int, list[int], Tensor]] = []
    prompts = []
    for g, sizes in enumerate(case.sizes):
        prompts.append(torch.randint(4, 90, (3 + 2 * g,), generator=generator).tolist())
        for n in sizes:
            ids = torch.randint(4, 90, (n,), generator=generator).tolist()
            credit = torch.randn(1, generator=generator).expand(n)
            rows.append((g, ids, credit * (g not in case.dead)))
    mine = range(rank, len(case.sizes), world)
    rows = [row for row in rows if row[0] in mine]
    task = make_task("charts", style="compact")
    seen = {g: task.problem("train", g).images for g in case.images}
    problems = [Problem(str(g), "", images=seen.get(g, ())) for g in mine]
    asked = [[100, 101, 102, *prompts[g]] if g in seen else prompts[g] for g in mine]
    asked, images = (asked, ()) if policy is None else prepare(policy, problems, asked)
    rollout = Rollout(
        problems=problems,
        prompt_ids=asked,
        images=images,
        group=torch.tensor([g // world for g, _, _ in rows], dtype=torch.long),
        completion_ids=[ids for _, ids, _ in rows],
        text=[""] * len(rows),
        finished=[True] * len(rows),
        logp=[torch.zeros(len(ids)) for _, ids, _ in rows],
        pieces=[[0] * (len(ids) + 1) for _, ids, _ in rows],
    )
    return rollout, torch.cat([torch.zeros(0), *(credit for _, _, credit in rows)])


def learner(case: Case, accelerator: Accelerator) -> Learner:
    # eps above the rounding of a gradient: AdamW would make a full step of mere noise
    changes = [f"batch.tokens={case.tokens}", "optim.eps=1e-5", "nan_patience=2"]
    sizes = {"width": 64, "layers": 1, "vision_width": 32, "vision_layers": 1, "heads": 2}
    if case.images:
        policy = models.load("tiny-vl", dtype="fp32", seed=1, **sizes)
    else:
        policy = models.load("tiny", dtype="fp32", seed=1, width=32, layers=2, heads=2)
    out = Learner(policy, small(*changes), accelerator)
    if case.kl:
        out.reference = models.load("tiny", dtype="fp32", seed=2, width=32, layers=2, heads=2)
    return out


def run(case: Case, accelerator: Accelerator) -> dict:
    """Metrics of every step, the weights after it, and whether the NaN policy stopped the run."""
    rank, world = accelerator.process_index, accelerator.num_processes
    made = learner(case, accelerator)
    rollout, advantage = dealt(case, rank, world, made.policy)
    extra = {"max_length": 12} if case.loss == "dr_grpo" else {}
    spec = LossSpec.named(case.loss, kl_coef=case.kl, **extra)
    if case.nan_rank == rank:
        first = next(iter(made.policy.model.parameters()))
        first.register_hook(lambda grad: torch.full_like(grad, torch.nan))
    parts = len(list(pack(rollout, advantage, case.tokens)))
    held = sum(getattr(p, "_local_tensor", p).numel() for p in made.policy.model.parameters())
    steps, weights, stopped = [], [snapshot(made)], False
    for _ in range(case.steps):
        try:
            steps.append(made.step(rollout, advantage, spec, 1e-3, case.updates))
        except NonFiniteStop:
            stopped = True
        weights.append(snapshot(made))
    accelerator.free_memory()
    return {"steps": steps, "weights": weights, "stopped": stopped, "parts": parts, "held": held}


def warm_then_dead(accelerator: Accelerator) -> list[dict[str, Tensor]]:
    """Weights before and after a step without any live row, when AdamW has momentum already."""
    made = learner(CASES["grpo"], accelerator)
    place = accelerator.process_index, accelerator.num_processes
    spec = LossSpec.named("grpo")
    made.step(*dealt(CASES["grpo"], *place), spec, 1e-3)
    before = snapshot(made)
    made.step(*dealt(CASES["all dead"], *place), spec, 1e-3)
    after = snapshot(made)
    accelerator.free_memory()
    return [before, after]


def stopped_on_rank_1(out: Path, rank: int) -> None:
    """A long run of which one rank alone is told to stop, in its second step."""
    run = Run(small("steps=200"), out, resume=False, quiet=True)
    step = run._step

    def interrupted() -> None:
        step()
        if rank == 1 and run.step == 2:
            signal.raise_signal(signal.SIGTERM)

    run._step = interrupted  # type: ignore[method-assign]
    assert not run.train()


def overflowing_on_rank_1(out: Path, rank: int) -> None:
    """A run in which the credit of one rank is too large for the gradient, in its second step."""
    advantage = GRPO.advantage

    def enormous(self: GRPO, rewards: Rewards, rollout: Rollout) -> Tensor:
        value = advantage(self, rewards, rollout)
        return value + 1e38 if rank == 1 and self.clock.step == 2 else value

    GRPO.advantage = enormous  # type: ignore[method-assign]
    train(small("algorithm=grpo", "algo={}"), out, quiet=True)
    GRPO.advantage = advantage  # type: ignore[method-assign]


def snapshot(made: Learner) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in made.policy.model.state_dict().items()}


def no_compiled_reduction() -> None:
    """DeepSpeed compiles a shared-memory all-reduce for CPUs at its first use, a minute under a
    lock; gloo does the same here."""
    backend = importlib.import_module("deepspeed.comm.torch")  # its attribute `torch` is torch
    backend.build_shm_op = lambda: None


def plugged(kind: str) -> Accelerator:
    """An accelerator with DeepSpeed; with cpu=True accelerate would take plain data parallelism."""
    from accelerate import DeepSpeedPlugin, PartialState
    from accelerate.utils import DistributedType

    no_compiled_reduction()
    # accelerate finds no backend for DeepSpeed on a CPU: it would go on with one process
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
    plugin = DeepSpeedPlugin(zero_stage=int(kind.removeprefix("zero")))
    return Accelerator(deepspeed_plugin=plugin)


def sharded(kind: str) -> Accelerator:
    """An accelerator with DeepSpeed or FSDP2, which accelerate gives to GPUs alone."""
    if kind.startswith("zero"):
        return plugged(kind)
    from accelerate import PartialState
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    with mock.patch.dict(os.environ, {"ACCELERATE_USE_DEEPSPEED": "false"}):
        made = Accelerator(cpu=True)
    made.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    for state in (PartialState(), made.state):
        state.distributed_type = DistributedType.FSDP
    return made


def main(out: Path, kind: str) -> None:
    torch.set_num_threads(1)
    if kind == "long":  # until somebody kills a rank
        words = ["steps=100000", "save.every=1", "--out", str(out / "long"), "--quiet"]
        sys.exit(cli.main(["train", "tiny", *SMALL, *words]))
    if kind == "ddp":
        accelerator = Accelerator(cpu=True)
        done = {name: run(case, accelerator) for name, case in CASES.items()}
        done["warm, then dead"] = warm_then_dead(accelerator)
        train(small("steps=0", "cold_start_steps=3", "optim.eps=1e-5"), out / "cold", quiet=True)
        train(small(), out / "run", quiet=True)
        train(small("prompts_per_step=1"), out / "one prompt", quiet=True)
        train(small(), out / "alone", resume=True, quiet=True)  # the test ran two steps of it
        overflowing_on_rank_1(out / "overflow", accelerator.process_index)
        stopped_on_rank_1(out / "stopped", accelerator.process_index)
    elif kind == "algorithms":
        accelerator = Accelerator(cpu=True)
        done = importlib.import_module("algorithm_cases").ranks(out)
    elif kind == "shards":
        done, cases = {}, importlib.import_module("algorithm_cases")
        gc.freeze()  # DeepSpeed and accelerate collect around every run, a second each
        for how in ("fsdp2", "zero1", "zero2", "zero3"):
            AcceleratorState._reset_state(reset_partial_state=True)
            accelerator = sharded(how)
            done[how] = cases.sharded(out / how, accelerator)
    else:
        assert kind == "nan"
        accelerator = Accelerator(cpu=True)
        done = importlib.import_module("nan_cases").ranks(accelerator)
    torch.save(done, out / f"{kind}-{accelerator.process_index}.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
    sys.stderr.flush()
    os._exit(
        0
    )  # as in heads_worker.py: everything is written, and gloo's threads may abort the end
