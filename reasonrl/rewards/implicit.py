"""The implicit process reward model: two language models whose log-ratio is a token reward.

    r_t = beta * (log pi_phi(y_t | y_<t) - log pi_ref(y_t | y_<t))          PRIME, 2502.01456 eq. 3

Training it needs no step labels: the sum over a completion, through a sigmoid, should be its
outcome. `ImplicitPRM` is the scorer; `learn` gives the scores and the gradient in one pass, so the
scores are those of the model before its step, and one forward and one backward are all it costs.
The model may be a LoRA adapter on the reference (adapter off = reference), or be compared with log-
probabilities that the caller has (the policy as reference). Left out: models with another
tokenizer (the ids scored are the policy's own).
    prm = ImplicitPRM(models.load(phi), models.load(ref)); rewards = prm(rollout)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from reasonrl.batch import lengths, pack, places
from reasonrl.logprobs import batch_logp
from reasonrl.lora import adapted, adapter_off
from reasonrl.models import Policy
from reasonrl.records import Batch, InputError, Rewards, Rollout, Score, scored, unscorable
from reasonrl.systems import implicit_prm_loss


class ImplicitPRM:
    """Token rewards of completions: `prm(rollout) -> Rewards`, with `token` (fp32, one a token)
    and as outcome their sum, the log-odds of a right answer."""

    def __init__(
        self,
        prm: Policy,
        ref: Policy | None = None,  # None: the model with its adapter off, or `ref_logp` is given
        *,
        beta: float = 0.05,
        tokens: int = 4096,  # packed tokens of one micro-batch
    ):
        if not (math.isfinite(beta) and beta > 0):
            raise ValueError(f"beta must be a finite number > 0, got {beta}")
        if ref is not None and not same_vocabulary(prm, ref):
            raise InputError("the implicit reward model and its reference differ in vocabulary")
        self.prm, self.ref, self.beta, self.tokens = prm, ref, beta, tokens

    def __call__(self, rollout: Rollout, ref_logp: Tensor | None = None) -> Rewards:
        value = torch.full((sum(lengths(rollout)),), math.nan)
        with torch.no_grad():
            for batch in pack(rollout, None, self.tokens, ref_logp=ref_logp):
                logp = batch_logp(self.prm, batch)
                gap = logp - self._ref(batch).to(logp.device)
                value[places(rollout, batch.rows)] = self.beta * gap.cpu()
        return self._rewards(rollout, value)

    def learn(
        self,
        rollout: Rollout,
        outcome: Tensor,  # (B,) in [0, 1]
        known: Tensor,  # (B,) bool: which outcomes are known
        count: float,  # completions with a known outcome, of all ranks
        ref_logp: Tensor | None = None,  # (N,) fp32, in place of the reference's own
    ) -> tuple[Rewards, float]:
        """Token rewards of the rows with a known outcome, and this rank's share of the loss.

        Adds the gradient of the cross-entropy (mean over `count` completions) to the model's.
        """
        value = torch.full((sum(lengths(rollout)),), math.nan)
        total = 0.0
        rows = known.nonzero()[:, 0].tolist()
        for batch in pack(rollout, None, self.tokens, rows, ref_logp=ref_logp):
            logp = batch_logp(self.prm, batch)
            ref, label = self._ref(batch).to(logp.device), outcome[batch.rows].to(logp)
            cu = batch.cu_seqlens.to(logp.device)
            loss = implicit_prm_loss(logp, ref, label, cu_seqlens=cu, beta=self.beta)
            loss = loss * (len(batch.rows) / count)
            loss.backward()
            total += float(loss.detach())
            value[places(rollout, batch.rows)] = self.beta * (logp.detach() - ref).cpu()
        return self._rewards(rollout, value), total

    def reference_logp(self, rollout: Rollout) -> Tensor:
        """(N,) fp32 log-probabilities of the reference, on the CPU."""
        value = torch.full((sum(lengths(rollout)),), math.nan)
        for batch in pack(rollout, None, self.tokens):
            value[places(rollout, batch.rows)] = self._ref(batch).cpu()
        return value

    def _ref(self, batch: Batch) -> Tensor:
        if batch.ref_logp is not None:
            return batch.ref_logp
        with torch.no_grad():
            if self.ref is not None:
                return batch_logp(self.ref, batch)
            if not adapted(self.prm):
                raise ValueError("ref: expected a policy, an adapter to switch off, or ref_logp")
            with adapter_off(self.prm):
                return batch_logp(self.prm, batch)

    def _rewards(self, rollout: Rollout, value: Tensor) -> Rewards:
        parts = list(value.split(lengths(rollout)))
        return Rewards(outcome=[_sum(part) for part in parts], token=parts)


def _sum(part: Tensor) -> Score:
    total = float(part.double().sum())
    if math.isnan(total):
        return unscorable("the outcome is unknown, so the completion was not scored")
    return scored(total)


def same_vocabulary(a: Policy, b: Policy) -> bool:
    """Whether a token id means the same to both."""
    return a.tokenizer.get_vocab() == b.tokenizer.get_vocab()
