"""slime's hooks (slime 0.3): credit for every token, and our loss on its logits.

    --reward-key score --custom-reward-post-process-path reasonrl.integrations.slime.reward
    --custom-advantage-function-path reasonrl.integrations.slime.advantage
    --loss-type custom_loss --custom-loss-function-path reasonrl.integrations.slime.policy_loss

A sample's reward is a dict: the outcome under `--reward-key`, and `token_rewards`, one number a
response token (a step's at its last token: `reasonrl.dense.token_rewards`). `reward` sees all
samples of a step, so groups are whole whatever the ranks get later; it leaves the advantage (PRIME,
arXiv 2502.01456 eq. 5) in the sample's train_metadata, where `advantage` finds it on its rank.
Left out: context and tensor parallel logits, TIS, OPSM (refused).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from reasonrl import loss as losses
from reasonrl import ops
from reasonrl.integrations._host import host_version

TESTED = "0.3"
KEY = "reasonrl_advantage"
KL = {"k1": "k1", "k2": "k2", "k3": "k3", "low_var_kl": "k3"}
REFUSED = ("use_tis", "use_opsm", "get_mismatch_metrics")


def reward(args: Any, samples: Sequence[Any]) -> tuple[list[float], list[float]]:
    """slime's reward post-processing: (raw outcomes, outcomes) of all samples of the step, and
    every sample's advantage left in its train_metadata."""
    host_version("slime", TESTED)
    outcome = [float(sample.get_reward_value(args)) for sample in samples]
    tokens, masks = [], []
    for i, sample in enumerate(samples):
        where = f"slime sample {i}"
        if not isinstance(sample.reward, dict) or "token_rewards" not in sample.reward:
            raise ValueError(
                f"{where}: expected a reward with token_rewards, got {sample.reward!r}"
            )
        tokens.append(_row(where, "token_rewards", sample.reward["token_rewards"], sample))
        given = getattr(sample, "loss_mask", None)
        given = [1] * sample.response_length if given is None else given
        masks.append(_row(where, "loss_mask", given, sample))
    sizes = [len(row) for row in tokens]
    value = ops.prime_advantage(
        torch.cat([torch.zeros(0), *tokens]),
        torch.tensor(outcome, dtype=torch.float32),
        torch.tensor([int(sample.group_index) for sample in samples], dtype=torch.long),
        mask=torch.cat([torch.zeros(0), *masks]) != 0,
        cu_seqlens=torch.tensor([0, *sizes]).cumsum(0),
    )
    for sample, row in zip(samples, value.split(sizes), strict=True):
        held = getattr(sample, "train_metadata", None) or {}
        sample.train_metadata = held | {KEY: row.tolist()}
    return outcome, outcome


def advantage(args: Any, rollout_data: dict[str, Any]) -> None:
    """slime's advantage hook: sets "advantages" and "returns", one (response length,) a sample."""
    found = rollout_data.get("metadata") or []
    masks = rollout_data["loss_masks"]
    if len(found) != len(masks) or any(KEY not in (held or {}) for held in found):
        raise ValueError(
            f"slime metadata: expected an advantage for each of {len(masks)} samples; set"
            " --custom-reward-post-process-path reasonrl.integrations.slime.reward"
        )
    rows = []
    for i, (held, mask) in enumerate(zip(found, masks, strict=True)):
        row = torch.tensor(held[KEY], dtype=torch.float32, device=mask.device)
        if row.shape != mask.shape:
            raise ValueError(
                f"slime sample {i}: its advantage has {len(row)} tokens, its loss_mask {len(mask)};"
                " was the completion tokenised again?"
            )
        rows.append(row)
    rollout_data["advantages"], rollout_data["returns"] = rows, list(rows)


def policy_loss(
    args: Any,
    batch: dict[str, Any],
    logits: Tensor,  # (1, T, V) fp32
    sum_of_sample_mean: Callable[[Tensor], Tensor],
) -> tuple[Tensor, dict[str, Tensor]]:
    """slime's custom loss: (sum over the samples of their token means, log), or the sum over all
    tokens with --calculate-per-token-loss, from slime's own clip, KL and entropy options."""
    spec = loss_spec(args)
    sizes = [int(n) for n in batch["response_lengths"]]
    rows, target = _responses(batch, logits, sizes)
    taken = ops.logp(
        rows, target, temperature=args.rollout_temperature, entropy=bool(spec.entropy_coef)
    )
    logp, entropy = taken if isinstance(taken, tuple) else (taken, None)
    mask = torch.cat(list(batch["loss_masks"])) != 0
    cu = torch.tensor([0, *sizes], device=logp.device).cumsum(0)
    divides = _check_reducer(sum_of_sample_mean, batch["loss_masks"], mask, spec)
    old = batch.get("rollout_log_probs" if args.use_rollout_logprobs else "log_probs")
    out = losses.policy_loss(
        logp,
        torch.cat(list(old)) if old else None,
        torch.cat(list(batch["advantages"])),
        spec,
        mask=mask,
        cu_seqlens=cu,
        ref_logp=_reference(batch, spec),
        entropy=entropy,
        denominator=1,
    )
    log = {name: value.detach() * divides for name, value in out.metrics.items()}
    return out.loss, {"loss": out.loss.detach(), **log}


def loss_spec(args: Any) -> losses.LossSpec:
    """slime's options as ours; ValueError names one that has no counterpart."""
    host_version("slime", TESTED)
    for name in REFUSED:
        if getattr(args, name, False):
            raise ValueError(f"slime --{name.replace('_', '-')} has no counterpart in this loss")
    for name in ("context_parallel_size", "tensor_model_parallel_size"):
        if getattr(args, name, 1) != 1:
            raise ValueError(
                f"slime {name}={getattr(args, name)}: this loss needs whole logits (size 1); the"
                " advantage hook works with slime's own loss"
            )
    kind = args.advantage_estimator
    if kind == "cispo":
        raise ValueError("slime --advantage-estimator cispo has bounds that this loss does not")
    fields: dict[str, Any] = {"ratio": "sequence" if kind == "gspo" else "token"}
    fields["reduce"] = "token_mean" if args.calculate_per_token_loss else "seq_mean"
    fields |= {"clip_low": args.eps_clip, "clip_high": args.eps_clip_high}
    fields["dual_clip"] = getattr(args, "eps_clip_c", None)
    if args.use_kl_loss and args.kl_loss_coef:
        if args.kl_loss_type not in KL:
            raise ValueError(f"slime --kl-loss-type: expected k1, k2, k3, got {args.kl_loss_type}")
        fields |= {"kl_coef": args.kl_loss_coef, "kl": KL[args.kl_loss_type]}
    return losses.LossSpec(**fields, entropy_coef=args.entropy_coef)


def _responses(batch: dict[str, Any], logits: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Logits (N, V) that predict the response tokens (N,), and those tokens."""
    total = [int(n) for n in batch["total_lengths"]]
    if logits.dim() != 3 or logits.shape[0] != 1 or logits.shape[1] < sum(total):
        raise ValueError(
            f"slime logits: expected (1, >= {sum(total)}, V), got {tuple(logits.shape)}"
        )
    rows, ids, end = [], [], 0
    for tokens, whole, size in zip(batch["unconcat_tokens"], total, sizes, strict=True):
        end += whole
        rows.append(logits[0, end - size - 1 : end - 1])
        ids.append(tokens[whole - size : whole])
    return torch.cat(rows), torch.cat(ids)


def _reference(batch: dict[str, Any], spec: losses.LossSpec) -> Tensor | None:
    if not spec.kl_coef:
        return None
    if not batch.get("ref_log_probs"):
        raise ValueError(
            f"slime batch: ref_log_probs is missing, but kl_loss_coef = {spec.kl_coef}; give"
            " --ref-load"
        )
    return torch.cat(list(batch["ref_log_probs"]))


def _check_reducer(reducer, masks: Sequence[Tensor], mask: Tensor, spec) -> float:
    """How many ones slime's reducer counts; ValueError where it is not the sum that ours takes."""
    counted = float(reducer(torch.ones(mask.shape, device=mask.device)))
    by_token = spec.reduce == "token_mean"
    ours = sum(float(m.sum()) if by_token else float(m.sum() > 0) for m in masks)
    if abs(counted - ours) > 1e-3 * max(1.0, ours):
        raise ValueError(
            f"slime sum_of_sample_mean: expected {ours:g} for ones, got {counted:g}; samples that"
            " share a divisor (rollouts of several samples) are not supported by this loss"
        )
    return counted


def _row(where: str, name: str, values: Any, sample: Any) -> Tensor:
    row = torch.as_tensor(values, dtype=torch.float32)
    if row.shape != (sample.response_length,):
        raise ValueError(
            f"{where}: {name} must have response_length = {sample.response_length} values, got"
            f" {tuple(row.shape)}"
        )
    return row
