"""A run's state on disk: what a checkpoint holds, and how a run finds its way back.

    checkpoint-<step>/   model and tokenizer (Hugging Face layout), optimizer.{json,safetensors},
                         rng.*, waiting.* (groups drawn and not yet used), what the algorithm
                         has learned, manifest.json with the position and the config

However weights and moments were sharded, a checkpoint holds them as one process has them.
"""

from __future__ import annotations

import ctypes
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from reasonrl import checkpoint, lora, models
from reasonrl import config as configs
from reasonrl.algos.base import Algorithm
from reasonrl.config import Config
from reasonrl.draw import Source
from reasonrl.models import Policy
from reasonrl.ranks import any_rank
from reasonrl.records import InputError, NonFiniteStop
from reasonrl.state_file import load_state, rng_state, save_state, set_rng_state
from reasonrl.update import Learner


@dataclass(frozen=True)
class Found:
    path: Path
    meta: dict[str, Any]


def find(out: Path, resume: bool, config: Config) -> Found | None:
    """The checkpoint to go on from; None for a new run.

    InputError: a new run over an old one, --resume without a checkpoint, or with a config that
    differs in a key that a resumed run may not change.
    """
    if not resume:
        if checkpoint.checkpoints(out):
            raise InputError(f"{out}: holds a run already; use --resume, or another --out")
        return None
    path = checkpoint.latest_verified(out, keep=config.save.keep)
    if path is None:
        raise InputError(f"{out}: no checkpoint to resume from; start it without --resume")
    meta = checkpoint.read_manifest(path)["meta"]
    if (out / "config.yaml").is_file():
        configs.check_resume(configs.read(out / "config.yaml"), config, str(out))
    if not meta["resumable"]:
        raise InputError(f"{path}: holds no optimizer state (saved under DeepSpeed); cannot resume")
    return Found(path, meta)


def policy(config: Config, found: Path | None, device: torch.device) -> Policy:
    """The model to train: the recipe's, or a checkpoint's; with an adapter always the recipe's and
    the checkpoint's adapter on it."""
    rank = config.lora.rank
    path = config.model if found is None or rank else str(found)
    kept = {k: v for k, v in config.model_options.items() if k == "vision_tower"}
    made = models.load(
        path,
        dtype=config.dtype,
        device=str(device),
        seed=config.seed,
        attn=config.attn,
        liger=config.liger,
        graphs=config.graphs,
        **(config.model_options if path == config.model else kept),
    )
    if rank:
        made = lora.trainable(made, rank, config.seed, config.lora.alpha)
        if found is not None:
            lora.restore(made, found, found / "adapter")
    return made


def save(
    out: Path,
    learner: Learner,
    config: Config,
    position: dict[str, Any],  # cold, step, tokens, ceiling
    source: Source,
    algo: Algorithm | None,  # None before RL has begun
) -> None:
    """Write checkpoint-<step> on the main rank; every rank waits for it. NonFiniteStop instead of a
    checkpoint with a weight or a moment that is not finite."""
    accelerator, policy = learner.accelerator, learner.policy
    whole = learner.finite() and (algo is None or algo.finite())
    if any_rank(accelerator, not whole):
        last = checkpoint.checkpoints(out)
        kept = f"the last checkpoint is {last[0][1].name}" if last else "there is no checkpoint"
        raise NonFiniteStop(f"{out}: weights or moments are not finite, nothing is saved; {kept}")
    waiting, moments = source.state(), learner.optimizer_state()

    def write(folder: Path) -> None:
        lora.save(policy, folder, folder / "adapter")
        save_state(folder / "optimizer", moments)
        save_state(folder / "rng", rng_state())
        save_state(folder / "waiting", waiting)
        if algo is not None:
            algo.save(folder)

    if accelerator.is_main_process:
        _give_back()
        meta = {
            "position": position | {"skipped": learner.skipped, "drawn": source.drawn},
            "config": config.digest(),
            "resumable": True,
        }
        checkpoint.save(out, position["step"], write, meta, keep=config.save.keep)
    accelerator.wait_for_everyone()


def _give_back() -> None:
    """Return freed memory to the system: writing copies every tensor once, which sets the peak."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def restore(found: Found, learner: Learner, source: Source) -> dict[str, Any]:
    """Put the optimizer, the waiting groups and the random states back; the position {cold, step,
    tokens, ...}."""
    learner.load_optimizer_state(load_state(found.path / "optimizer"))
    set_rng_state(load_state(found.path / "rng"))
    learner.skipped = found.meta["position"]["skipped"]
    source.drawn = found.meta["position"]["drawn"]
    source.restore(load_state(found.path / "waiting"))
    return found.meta["position"]


def keep_reference(out: Path, policy: Policy) -> None:
    """Keep the weights RL starts from: a resumed run needs them as its reference."""

    def write(folder: Path) -> None:
        lora.frozen(policy).save(folder)

    checkpoint.save(out / "reference", 0, write, {}, keep=1)


def reference(out: Path, config: Config, device: str) -> Policy:
    """The reference policy of a resumed run."""
    path = checkpoint.latest_verified(out / "reference")
    if path is None:
        raise InputError(f"{out / 'reference'}: the run's reference weights are missing")
    policy = models.load(
        str(path), dtype=config.dtype, device=device, attn=config.attn, liger=config.liger
    )
    policy.model.eval().requires_grad_(False)
    return policy
