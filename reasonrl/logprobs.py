"""Log-probabilities of completion tokens under any policy, without logits in memory.

`batch_logp` is differentiable and takes one packed micro-batch; `rollout_logp` is not and takes a
rollout. The fused policy loss has its own way; this is for references, old policies and implicit
reward models. Legend: N completion tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reasonrl.batch import lengths, pack, places
from reasonrl.models import Policy
from reasonrl.ops import linear_logp
from reasonrl.records import Batch, Rollout


def batch_logp(policy: Policy, batch: Batch, temperature: float = 1.0) -> Tensor:
    """(N,) fp32 log-probabilities of the batch's tokens; differentiable in the policy."""
    hidden, weight, bias = policy.predicting(batch)
    values = linear_logp(
        hidden,
        weight,
        batch.target.to(hidden.device),
        bias=bias,
        temperature=temperature,
        softcap=policy.softcap,
    )
    assert not isinstance(values, tuple)  # no entropy was asked for
    return values.float()


@torch.no_grad()
def rollout_logp(policy: Policy, rollout: Rollout, tokens: int, temperature: float = 1.0) -> Tensor:
    """(N,) fp32 on the CPU, in micro-batches of at most `tokens` packed tokens."""
    out = torch.zeros(sum(lengths(rollout)))
    for batch in pack(rollout, None, tokens):
        out[places(rollout, batch.rows)] = batch_logp(policy, batch, temperature).cpu()
    return out
