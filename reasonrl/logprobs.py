"""Log-probabilities of completion tokens under any policy, without logits in memory.

`batch_logp` is differentiable and takes one packed micro-batch; `rollout_logp` is not and takes a
rollout. The fused policy loss has its own way; this is for references, old policies and implicit
reward models. Legend: N completion tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonrl.batch import lengths, pack, places
from reasonrl.heads import Head
from reasonrl.models import Policy
from reasonrl.ops import linear_logp
from reasonrl.records import Batch, Rollout


def batch_logp(policy: Policy, batch: Batch, temperature: float = 1.0) -> Tensor:
    """(N,) fp32 log-probabilities of the batch's tokens; differentiable in the policy."""

    def taken(hidden: Tensor, head: Head) -> Any:
        return linear_logp(
            hidden,
            head.weight,
            batch.target.to(hidden.device),
            bias=head.bias,
            temperature=temperature,
            softcap=head.softcap,
        )

    return policy.at_head(batch, taken).float()


@torch.no_grad()
def rollout_logp(policy: Policy, rollout: Rollout, tokens: int, temperature: float = 1.0) -> Tensor:
    """(N,) fp32 on the CPU, in micro-batches of at most `tokens` packed tokens."""
    out = torch.zeros(sum(lengths(rollout)))
    for batch in pack(rollout, None, tokens):
        out[places(rollout, batch.rows)] = batch_logp(policy, batch, temperature).cpu()
    return out
