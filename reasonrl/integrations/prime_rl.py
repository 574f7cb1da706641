"""prime-rl's custom loss (prime-rl 0.8): every loss of ours, one packed sample at a time.

    [trainer.loss]
    type = "custom"
    import_path = "reasonrl.integrations.prime_rl.policy_loss"
    kwargs = { name = "dapo", clip_high = 0.28 }

The value is a sum over the sample's tokens, because the trainer divides by the tokens of the whole
step; that is its normalisation, so `reduce` is no choice here. Per-token advantages (prime-rl's own
type) pass through as they are. Left out: the advantage, which belongs to prime-rl's algorithm
classes (`reasonrl.prime_advantage` computes it).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from reasonrl import loss as losses
from reasonrl.integrations._host import host_version

TESTED = "0.8"


@dataclass
class LossOutputs:
    """The host's type by the host's field names, where the host is not installed."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(inputs: Any, *, name: str = "dapo", **changes: Any) -> Any:
    """`LossSpec.named(name, **changes)` of one sample, all tensors (seq,); LossOutputs.

    inputs: trainer_logprobs, inference_logprobs, ref_logprobs or None, advantages, loss_mask,
    loss_weights or None (multiply the policy part). ValueError: `reduce`, a KL coefficient without
    ref_logprobs, or with loss_weights, whose KL part would stay unweighted.
    """
    host_version("prime-rl", TESTED)
    if "reduce" in changes:
        raise ValueError(
            f"prime-rl kwargs: reduce={changes['reduce']!r} cannot be chosen; prime-rl divides the"
            " sum by the tokens of the step"
        )
    spec = losses.LossSpec.named(name, **changes, reduce="token_mean")
    if spec.kl_coef and inputs.ref_logprobs is None:
        raise ValueError(
            f"prime-rl inputs: ref_logprobs is None but kl_coef = {spec.kl_coef}; choose an"
            " algorithm that scores a reference, or kl_coef = 0"
        )
    if spec.kl_coef and inputs.loss_weights is not None:
        raise ValueError("prime-rl inputs: loss_weights with kl_coef > 0 is not supported")
    out = losses.policy_loss(
        inputs.trainer_logprobs,
        inputs.inference_logprobs,
        inputs.advantages,
        spec,
        mask=inputs.loss_mask,
        ref_logp=inputs.ref_logprobs if spec.kl_coef else None,
        is_weight=inputs.loss_weights,
        denominator=1,
    )
    return _outputs()(loss=out.loss, metrics=dict(out.metrics))


def _outputs() -> Any:
    try:
        return importlib.import_module("prime_rl.trainer.rl.loss").LossOutputs
    except ModuleNotFoundError:
        return LossOutputs
