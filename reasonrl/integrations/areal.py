"""AReaL's actor loss (AReaL 1.0) with our policy loss: coupled PPO, GRPO, GSPO and SAPO.

    areal.engine.ppo.actor.grpo_loss_fn = reasonrl.integrations.areal.grpo_loss_fn   # no hook

Log-probabilities stand at the position that predicts them, over the whole sequence, and the host
has rolled the masks to match. The value is a mean over the micro-batch's tokens: the engine weighs
micro-batches by their tokens. Dense advantages stay dense under sequence ratios (the host averages
them). Left out: the decoupled loss and M2PO (refused); coupled, the behaviour weight is 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonrl.integrations._host import host_version
from reasonrl.loss import LossSpec, policy_loss

TESTED = "1.0"


def grpo_loss_fn(
    logprobs: Tensor,  # (N,) packed, or (B, S)
    entropy: Tensor,  # same; the host only logs it
    input_data: dict[str, Any],
    eps_clip: float = 0.2,
    eps_clip_higher: float | None = None,
    c_clip: float | None = None,
    behav_imp_weight_cap: float | None = None,
    m2_threshold: float | None = None,
    importance_sampling_level: str = "token",
    use_sapo_loss: bool = False,
    sapo_tau_pos: float = 1.0,
    sapo_tau_neg: float = 1.05,
    use_decoupled_loss: bool = False,
    **host: Any,  # current_version, prox_logp_method, ...: of the decoupled loss, or for logs
) -> Tensor:
    """The mean loss of the micro-batch's tokens; ValueError names an option without counterpart."""
    host_version("areal", TESTED)
    refused = {"m2_threshold": m2_threshold is not None, "use_decoupled_loss": use_decoupled_loss}
    for name, hit in refused.items():
        if hit:
            raise ValueError(f"AReaL {name} has no counterpart in this loss; use the host's own")
    if importance_sampling_level not in ("token", "sequence"):
        raise ValueError(
            f"AReaL importance_sampling_level: expected token or sequence, got"
            f" {importance_sampling_level!r}"
        )
    if use_sapo_loss:
        spec = LossSpec(surrogate="sapo", sapo_pos=sapo_tau_pos, sapo_neg=sapo_tau_neg)
    else:
        high = eps_clip if eps_clip_higher is None else eps_clip_higher
        ratio: Any = importance_sampling_level
        spec = LossSpec(ratio=ratio, clip_low=eps_clip, clip_high=high, dual_clip=c_clip)
    out = policy_loss(
        logprobs,
        input_data["logprobs"],
        input_data["advantages"],
        spec,
        mask=input_data["loss_mask"] != 0,
        cu_seqlens=_ends(logprobs, input_data),
    )
    return out.loss


def _ends(logprobs: Tensor, input_data: dict[str, Any]) -> Tensor | None:
    """Where packed sequences start and end; what lies behind the last is padding, a row of its
    own."""
    if logprobs.dim() == 2:
        return None
    cu = input_data.get("cu_seqlens")
    if cu is None:
        raise ValueError("AReaL input_data: packed log-probabilities need cu_seqlens, got none")
    if int(cu[-1]) < len(logprobs):
        cu = torch.cat([cu, cu.new_tensor([len(logprobs)])])
    return cu
