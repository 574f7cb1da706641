"""The batch whose loss or gradient was not finite, kept so that a person can make it again.

    RUN/nonfinite/checkpoint-<step>/   the policy as it was, and batch.{json,safetensors}, what the
                                       update read on all ranks; verified like any checkpoint
    reasonrl replay RUN                makes the gradient again and says which parameters' is bad

Written at the first skipped update of a row; a later one takes its place, so a run holds one at
most. Nothing else is needed to make the gradient again: neither sampler, scorer nor reference.
Left out: the learned reward's own updates (PRIME counts those it skips).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from reasonrl import checkpoint, lora, state
from reasonrl import config as configs
from reasonrl.batch import lengths, merge
from reasonrl.loss import LossSpec
from reasonrl.models import Policy
from reasonrl.ranks import accelerator
from reasonrl.records import InputError, Problem, Rollout
from reasonrl.state_file import load_state, save_state
from reasonrl.update import Learner, Share
from reasonrl.vision import Seen


def keeper(out: Path, learner: Learner, step: Callable[[], int]) -> Callable[[Share], None]:
    """What a learner calls with the share that it skips; a collective. step: the one under way."""

    def keep(share: Share) -> None:
        parts = [share]
        if learner.accelerator.num_processes > 1:
            parts = gather_object([share])
        if learner.accelerator.is_main_process:
            _write(out, step(), joined(parts), learner.policy)
        learner.accelerator.wait_for_everyone()

    return keep


def again(run: Path) -> dict[str, Any]:
    """The update of the kept batch made again: its metrics, and whose gradients are not finite."""
    path = checkpoint.latest_verified(run / "nonfinite", clean=False)
    if path is None:
        raise InputError(f"{run}: holds no batch whose gradient was not finite")
    config = configs.read(run / "config.yaml")
    here = accelerator(config.device)
    learner = Learner(state.policy(config, path, here.device), config, here)
    bad: list[str] = []
    for name, parameter in learner.policy.model.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(_looker(name, bad))
    metrics = learner.update(_share(load_state(path / "batch")))
    step = checkpoint.read_manifest(path)["step"]
    return {"step": step, **metrics, "bad": list(dict.fromkeys(bad))}


def joined(parts: list[Share]) -> Share:
    """The shares of all ranks as one."""
    parts = [part for part in parts if part.rollout.problems] or parts[:1]
    shifts = accumulate((len(part.rollout.completion_ids) for part in parts[:-1]), initial=0)

    def tensors(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    return replace(
        parts[0],
        rollout=merge([part.rollout for part in parts]),
        advantage=torch.cat([part.advantage for part in parts]),
        rows=[b + at for part, at in zip(parts, shifts, strict=True) for b in part.rows],
        old=tensors("old"),
        ref=tensors("ref"),
        weight=tensors("weight"),
    )


def _looker(name: str, bad: list[str]) -> Callable[[Tensor], None]:
    def look(grad: Tensor) -> None:
        if not bool(grad.norm().isfinite()):  # as the update looks: large numbers have no norm
            bad.append(name)

    return look


def _write(out: Path, step: int, share: Share, policy: Policy) -> None:
    rollout = share.rollout
    ids = [i for part in rollout.completion_ids for i in part]
    plain = {
        "problems": [p.id for p in rollout.problems],
        "prompts": [list(part) for part in rollout.prompt_ids],
        "ids": torch.tensor(ids, dtype=torch.long),
        "lengths": lengths(rollout),
        "text": list(rollout.text),
        "group": rollout.group,
        "images": [None if i is None else (i.pixels, i.grid, i.positions) for i in rollout.images],
        "advantage": share.advantage,
        "old": share.old,
        "ref": share.ref,
        "weight": share.weight,
        "rows": list(share.rows),
        "spec": asdict(share.spec),
    }

    def write(folder: Path) -> None:
        lora.save(policy, folder, folder / "adapter")
        save_state(folder / "batch", plain)

    path = checkpoint.save(out / "nonfinite", step, write, {}, keep=1)
    for _, other in checkpoint.checkpoints(path.parent):
        if other != path:  # a resumed run is back before it
            shutil.rmtree(other)


def _share(plain: dict[str, Any]) -> Share:
    parts = [part.tolist() for part in plain["ids"].split(plain["lengths"])]
    size = len(parts)
    rollout = Rollout(
        problems=[Problem(name, "") for name in plain["problems"]],
        prompt_ids=plain["prompts"],
        group=plain["group"],
        completion_ids=parts,
        text=plain["text"],
        finished=[True] * size,
        logp=[torch.zeros(len(part)) for part in parts],
        pieces=[[0] * (len(part) + 1) for part in parts],
        images=[None if i is None else Seen(*i) for i in plain["images"]],
    )
    spec = LossSpec(**plain["spec"])
    given = (plain[name] for name in ("rows", "old", "ref", "weight"))
    return Share(rollout, plain["advantage"], spec, *given)
