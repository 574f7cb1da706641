"""What the ranks of a run tell each other: numbers, a request to stop, rollouts for the log.

Every function is a collective: all ranks reach it in the same order, and all get the same answer.
With one process nothing is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, chain
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from reasonrl.records import Rewards, Rollout

Step = tuple[Rollout, Rewards, Tensor]  # a rollout, its rewards, and its advantages (N,)


def gathered(accelerator: Accelerator, values: Sequence[float]) -> list[list[float]]:
    """The values of every rank, in rank order; as many on each."""
    if accelerator.num_processes == 1:
        return [list(values)]
    local = torch.tensor([values], dtype=torch.float64, device=accelerator.device)
    return accelerator.gather(local).tolist()


def any_rank(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is set on any rank."""
    return any(value for (value,) in gathered(accelerator, [float(flag)]))


def whole(accelerator: Accelerator, rollout: Rollout, rewards: Rewards, advantage: Tensor) -> Step:
    """The rollouts of all ranks as one, in rank order, without images: what a log shows."""
    if accelerator.num_processes == 1:
        return rollout, rewards, advantage
    return joined(gather_object([(rollout, rewards, advantage)]))


def joined(parts: Sequence[Step]) -> Step:
    """Rollouts end to end; an optional field stays only where every part with rows has it."""
    parts = [part for part in parts if part[0].problems] or [parts[0]]
    rollouts, rewards, advantages = zip(*parts, strict=True)
    shifts = accumulate((len(r.problems) for r in rollouts[:-1]), initial=0)
    groups = [r.group + shift for r, shift in zip(rollouts, shifts, strict=True)]
    rollout = Rollout(
        problems=_flat(rollouts, "problems"),
        prompt_ids=_flat(rollouts, "prompt_ids"),
        group=torch.cat(groups),
        completion_ids=_flat(rollouts, "completion_ids"),
        text=_flat(rollouts, "text"),
        finished=_flat(rollouts, "finished"),
        logp=_flat(rollouts, "logp"),
        pieces=_flat(rollouts, "pieces"),
        sampling_logp=_flat(rollouts, "sampling_logp"),
    )
    names = dict.fromkeys(chain.from_iterable(r.metrics for r in rewards))
    metrics = {name: [r.metrics[name] for r in rewards if name in r.metrics] for name in names}
    scores = Rewards(
        outcome=_flat(rewards, "outcome"),
        steps=_flat(rewards, "steps"),
        token=_flat(rewards, "token"),
        metrics={name: sum(values) / len(values) for name, values in metrics.items()},
    )
    return rollout, scores, torch.cat(advantages)


def _flat(parts: Sequence[Any], field: str) -> Any:
    values = [getattr(part, field) for part in parts]
    return None if any(v is None for v in values) else list(chain.from_iterable(values))
