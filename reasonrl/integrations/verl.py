"""Our losses and advantage estimators in verl's registries (verl 0.9).

    actor_rollout_ref.actor.policy_loss.loss_mode=reasonrl_dapo
    algorithm.adv_estimator=reasonrl_process

`register()` is all; installed beside verl it happens by itself in every worker, through the entry
point `verl.plugins` (verl_plugin.py). Losses: `reasonrl_` + every name of `LossSpec`,
with verl's clip ranges and verl's aggregation (its mode and its global counts). Estimators:
reasonrl_grpo, _dr_grpo, _rloo take the sum of a response's rewards; reasonrl_process takes token
rewards as they stand and gives their returns against the group (PRIME, arXiv 2502.01456 eq. 5;
_process_grpo and _process_reinforce its other forms). Step rewards come from the manager in
verl_rewards.py. Left out: entropy and KL terms (verl adds its own).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy
import torch
from torch import Tensor

from reasonrl import ops
from reasonrl.integrations._host import host_version
from reasonrl.loss import NAMED, LossSpec, policy_loss

TESTED = "0.9"
LOSSES = tuple(NAMED)  # every name of ours
DUAL = ("grpo", "bnpo", "dr_grpo", "dapo")  # verl's dual clip belongs to token ratios
MODES = {
    "token-mean": "token_mean",
    "token-sum": "fixed",
    "seq-mean-token-mean": "seq_mean",
    "seq-mean-token-sum": "fixed",
    "seq-mean-token-sum-norm": "fixed",
}
GROUPS = ("grpo", "dr_grpo", "rloo")
PROCESS = {
    "reasonrl_process": "rloo",
    "reasonrl_process_grpo": "grpo",
    "reasonrl_process_reinforce": "reinforce",
}


def register() -> list[str]:
    """Put everything into verl's registries; the names. Twice does nothing more."""
    host_version("verl", TESTED)
    core = importlib.import_module("verl.trainer.ppo.core_algos")
    names = []
    for name in LOSSES:
        if f"reasonrl_{name}" not in core.POLICY_LOSS_REGISTRY:
            core.register_policy_loss(f"reasonrl_{name}")(loss(name))
        names.append(f"reasonrl_{name}")
    estimators = {f"reasonrl_{kind}": outcome_estimator(kind) for kind in GROUPS}
    estimators |= {name: process_estimator(form) for name, form in PROCESS.items()}
    for name, function in estimators.items():
        if name not in core.ADV_ESTIMATOR_REGISTRY:
            core.register_adv_est(name)(function)
        names.append(name)
    return names


def loss(name: str) -> Callable[..., tuple[Tensor, dict[str, float]]]:
    """The loss called `name` with verl's signature."""

    def compute(
        old_log_prob: Tensor,  # (B, T)
        log_prob: Tensor,  # (B, T)
        advantages: Tensor,  # (B, T)
        response_mask: Tensor,  # (B, T)
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Tensor | None = None,  # (B, T)
    ) -> tuple[Tensor, dict[str, float]]:
        mask = response_mask != 0
        info = dict(config.global_batch_info)
        out = policy_loss(
            log_prob,
            old_log_prob,
            advantages,
            spec(name, loss_agg_mode, config),
            mask=mask,
            is_weight=rollout_is_weights,
            denominator=divisor(loss_agg_mode, mask, **info),
        )
        gap = torch.where(mask, (old_log_prob - log_prob).detach(), 0.0)
        metrics = {
            "actor/pg_clipfrac": float(out.metrics["clip_ratio/region_mean"]),
            "actor/pg_clipfrac_lower": float(out.metrics["clip_ratio/dual_mean"]),
            "actor/ppo_kl": float(gap.sum() / mask.sum().clamp(min=1)),
        }
        return out.loss, metrics

    compute.__name__ = f"reasonrl_{name}"
    return compute


def spec(name: str, mode: str, config: Any) -> LossSpec:
    """verl's clip ranges and aggregation as a LossSpec."""
    if mode not in MODES:
        raise ValueError(f"loss_agg_mode: expected one of {', '.join(MODES)}, got {mode!r}")
    fields: dict[str, Any] = {"reduce": MODES[mode]}
    if MODES[mode] == "fixed":
        fields["max_length"] = 1  # the divisor is handed over
    if name != "sapo":
        low, high = config.clip_ratio_low, config.clip_ratio_high
        fields["clip_low"] = config.clip_ratio if low is None else low
        fields["clip_high"] = config.clip_ratio if high is None else high
    if name in DUAL:
        fields["dual_clip"] = config.get("clip_ratio_c", 3.0)
    return LossSpec.named(name, **fields)


def divisor(
    mode: str,
    mask: Tensor,
    dp_size: int = 1,
    batch_num_tokens: float | None = None,
    global_batch_size: float | None = None,
    loss_scale_factor: float | None = None,
) -> Tensor:
    """What verl divides by, over `dp_size` (ranks are averaged afterwards)."""
    if mode == "token-sum":
        return torch.tensor(1.0 / dp_size)
    given = batch_num_tokens if mode == "token-mean" else global_batch_size
    if given is None and dp_size > 1:
        name = "batch_num_tokens" if mode == "token-mean" else "global_batch_size"
        raise ValueError(f"{name}: expected the global count with dp_size {dp_size}, got None")
    if given is None:
        given = mask.sum() if mode == "token-mean" else (mask.sum(-1) > 0).sum()
    count = torch.as_tensor(given, dtype=torch.float32).clamp(min=1) / dp_size
    if mode == "seq-mean-token-sum-norm":
        count = count * (mask.shape[-1] if loss_scale_factor is None else loss_scale_factor)
    return count


def outcome_estimator(kind: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Group-normalised outcomes on every response token."""

    def compute(
        *, token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        mask = response_mask != 0
        reward = torch.where(mask, token_level_rewards, 0.0).sum(-1)
        value = ops.group_advantage(reward, groups(index, mask), kind=kind)
        dense = torch.where(mask, value[:, None], 0.0)
        return dense, dense

    compute.__name__ = f"reasonrl_{kind}"
    return compute


def process_estimator(form: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """Returns of the token rewards against the group's mean rate (reinforce: against nothing)."""

    def compute(
        *, token_level_rewards: Tensor, response_mask: Tensor, index: Any = None, **_: Any
    ) -> tuple[Tensor, Tensor]:
        mask = response_mask != 0
        zero = torch.zeros(len(mask), device=mask.device)
        rewards = token_level_rewards.float()
        value = ops.prime_advantage(rewards, zero, groups(index, mask), mask=mask, form=form)
        return value, value

    compute.__name__ = f"reasonrl_process_{form}"
    return compute


def groups(index: Any, mask: Tensor) -> Tensor:
    """(B,) group numbers from verl's uids."""
    if index is None or len(index) != len(mask):
        got = "None" if index is None else str(len(index))
        raise ValueError(f"index: expected the uids of {len(mask)} responses, got {got}")
    inverse = numpy.unique(numpy.asarray(index).astype(str), return_inverse=True)[1]
    return torch.as_tensor(inverse, dtype=torch.long, device=mask.device)
