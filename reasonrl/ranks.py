"""What the ranks of a run tell each other: numbers, a request to stop, rollouts for the log.

Every function is a collective: all ranks reach it in the same order, and all get the same answer.
With one process nothing is sent.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object
from torch import Tensor

from reasonrl.batch import flat, merge
from reasonrl.records import RankLost, Rewards, Rollout

GONE = re.compile(  # what gloo, NCCL and the store say of a peer that died or does not answer
    r"gloo|nccl|tcpstore|connection (closed|reset|refused)|broken pipe|socket|timed? ?out",
    re.IGNORECASE,
)
FOREVER = timedelta(days=30)
Step = tuple[Rollout, Rewards, Tensor]  # a rollout, its rewards, and its advantages (N,)


def accelerator(device: str, stall: float = 0.0) -> Accelerator:
    """Accelerate's for device auto, cpu or cuda; a rank that is waited for longer than `stall`
    seconds is an error, at the start too. Several ranks without a GPU are told to use gloo: left
    alone each of them would take itself for the only one."""
    ranks = int(os.environ.get("WORLD_SIZE", "1")) > 1
    alone = device == "auto" and ranks and not torch.cuda.is_available()
    patience = InitProcessGroupKwargs(timeout=timedelta(seconds=stall) if stall else FOREVER)
    return Accelerator(cpu=device == "cpu" or alone, kwargs_handlers=[patience])


@contextmanager
def named_loss(out: Path) -> Iterator[None]:
    """Inside it a collective that fails because another rank is gone is a RankLost."""
    try:
        yield
    except RuntimeError as error:
        plain = type(error) is RuntimeError or isinstance(error, torch.distributed.DistError)
        if not plain or not GONE.search(str(error)):
            raise
        said = str(error).strip().splitlines()[0]
        then = "start all ranks again with --resume"
        raise RankLost(f"{out}: another rank is gone or silent; {then} ({said})") from None


def gathered(accelerator: Accelerator, values: Sequence[float]) -> list[list[float]]:
    """The values of every rank, in rank order; as many on each."""
    if accelerator.num_processes == 1:
        return [list(values)]
    local = torch.tensor([values], dtype=torch.float64, device=accelerator.device)
    every: Any = accelerator.gather(local)
    return every.tolist()


def summed(accelerator: Accelerator, tensors: Sequence[Tensor]) -> None:
    """Add up every tensor over the ranks, in place."""
    if accelerator.num_processes > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return any(value for (value,) in gathered(accelerator, [float(flag)]))


def whole(accelerator: Accelerator, rollout: Rollout, rewards: Rewards, advantage: Tensor) -> Step:
    """The rollouts of all ranks as one, in rank order, without images: what a log shows."""
    if accelerator.num_processes == 1:
        return rollout, rewards, advantage
    return joined(gather_object([(rollout, rewards, advantage)]))


def joined(parts: Sequence[Step]) -> Step:
    """Rollouts, rewards and advantages of several ranks end to end."""
    parts = [part for part in parts if part[0].problems] or [parts[0]]
    rollouts, rewards, advantages = zip(*parts, strict=True)
    rollout = merge([replace(part, images=()) for part in rollouts])
    names = dict.fromkeys(chain.from_iterable(r.metrics for r in rewards))
    metrics = {name: [r.metrics[name] for r in rewards if name in r.metrics] for name in names}
    scores = Rewards(
        outcome=flat(rewards, "outcome"),
        steps=flat(rewards, "steps"),
        token=flat(rewards, "token"),
        verdict=flat(rewards, "verdict"),
        metrics={name: sum(values) / len(values) for name, values in metrics.items()},
    )
    return rollout, scores, torch.cat(advantages)
