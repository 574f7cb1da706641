"""The specification: every op in plain torch, written from its formula, float64 capable,
differentiable.

Each function has the name and the signature that the fast implementations share. All of them see
the canonical packed form that `reasonrl.ops` makes: values (N,), `cu` (B+1,) int64 offsets of the
completions, `mask` (N,) bool or None. Values at masked places are selected away before any
arithmetic, so whatever they hold changes nothing. Losses: PPO clip (arXiv 1707.06347), GRPO
(2402.03300), DAPO (2503.14476), Dr. GRPO (2503.20783), GSPO (2507.18071), CISPO (2506.13585), GMPO
(2507.20673), SAPO (2511.20347). Groups, returns and steps stand in `reference_segments`. Left out:
speed. Nothing here imports Triton.
Legend: B completions, N packed tokens, S steps, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from reasonrl.kernels.reference_attention import masked_softmax, slot_attention  # noqa: F401
from reasonrl.kernels.reference_credit import credit_advantage
from reasonrl.kernels.reference_layers import (  # noqa: F401
    add_rms_norm,
    rms_norm,
    rotary,
    swiglu,
)
from reasonrl.kernels.reference_segments import (  # noqa: F401, the other half of the specification
    group_advantage,
    prime_advantage,
    returns,
    segment_ids,
    segment_sum,
    step_expand,
    step_reduce,
    whiten,
)
from reasonrl.kernels.reference_trust import trust  # noqa: F401

TILE = 1 << 23  # logits in one tile of linear_logp: 32 MiB, given back to the system each time
EXP_MAX = 20.0


def available() -> str | None:
    return None


def logp(
    logits: Tensor,  # (N, V)
    target: Tensor,  # (N,) int64
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:  # (N,), (N,)
    """log p of the target under softmax(s), s = softcap tanh(u / softcap) / temperature, and H =
    -sum p log p."""
    s = _scores(logits.to(_accumulate(logits)), temperature, softcap)
    log_p = torch.log_softmax(s, -1)
    taken = log_p.gather(-1, target[:, None])[:, 0]
    if not entropy:
        return taken, None
    p = log_p.exp()
    return taken, -(p * torch.where(p > 0, log_p, 0.0)).sum(-1)


def _scores(u: Tensor, temperature: float, softcap: float | None) -> Tensor:
    return (softcap * torch.tanh(u / softcap) if softcap is not None else u) / temperature


def linear_logp(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """`logp` of u = hidden @ weight.T + bias, some rows at a time; each tile is made again in the
    backward pass."""
    acc = _accumulate(hidden, weight)
    w, b = weight.to(acc), None if bias is None else bias.to(acc)

    def rows(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor | None]:
        return logp(torch.nn.functional.linear(x.to(acc), w, b), t, temperature, softcap, entropy)

    size = max(1, TILE // max(1, weight.shape[0]))
    parts = [
        checkpoint(rows, x, t, use_reentrant=False, preserve_rng_state=False)
        for x, t in zip(hidden.split(size), target.split(size), strict=True)
    ]
    taken = torch.cat([part[0] for part in parts])
    return taken, torch.cat([part[1] for part in parts]) if entropy else None


def vocab_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), one rank's words
    target: Tensor,  # (N,) int64, any word where the row's own stands elsewhere
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:  # (N,), (N, 3)
    """log p among these words, and (max m, log sum e^(s - m), entropy) of every row."""
    acc = _accumulate(hidden, weight)
    b = None if bias is None else bias.to(acc)
    s = torch.nn.functional.linear(hidden.to(acc), weight.to(acc), b)
    s = _scores(s, temperature, softcap)
    log_p, m = torch.log_softmax(s, -1), s.amax(-1)
    h = -(log_p.exp() * torch.where(log_p > -torch.inf, log_p, 0.0)).sum(-1)
    taken = log_p.gather(-1, target[:, None])[:, 0]
    return taken, torch.stack([m, torch.logsumexp(s - m[:, None], -1), h], -1)


def vocab_grads(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,  # -1 where the row's own word stands elsewhere
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    stats: Tensor,  # (N, 3) of the whole vocabulary
    g: Tensor,  # (N,) dL/dlogp
    h: Tensor | None,  # (N,) dL/dentropy
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dX, dW, db of these words: du = (g (1[v = y] - p) - h p (log p + H)) ds/du."""
    acc = _accumulate(hidden, weight)
    x, w, b = hidden.to(acc), weight.to(acc), None if bias is None else bias.to(acc)
    u = torch.nn.functional.linear(x, w, b)
    t = torch.tanh(u / softcap) if softcap is not None else None
    s, slope = (u, 1.0) if t is None else (softcap * t, 1.0 - t * t)
    log_p = s / temperature - stats[:, :1] - stats[:, 1:2]
    p = log_p.exp()
    own = target[:, None] == torch.arange(weight.shape[0], device=target.device)
    du = g[:, None] * (own.to(acc) - p)
    if h is not None:
        du -= h[:, None] * p * (torch.where(p > 0, log_p, 0.0) + stats[:, 2:])
    du = torch.where((g != 0 if h is None else (g != 0) | (h != 0))[:, None], du, 0.0)
    du = du * slope / temperature
    db = None if bias is None else du.sum(0).to(bias.dtype)
    return (du @ w).to(hidden.dtype), (du.t() @ x).to(weight.dtype), db


def policy_loss(
    logp: Tensor,  # (N,)
    old_logp: Tensor | None,  # (N,), None = on policy
    advantage: Any,  # (N,), or a credit: rewards from which it follows
    spec: Any,  # a LossSpec
    cu: Tensor,  # (B+1,)
    mask: Tensor | None,  # (N,) bool
    ref_logp: Tensor | None,  # (N,)
    entropy: Tensor | None,  # (N,)
    is_weight: Tensor | None,  # (N,)
    denominator: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """sum_t a_t (w_t policy_t + kl_coef k_t - entropy_coef H_t), a_t from the reduction; metrics.

    A token with a non-finite input gets coefficient 0 and stays in the divisor.
    """
    if not isinstance(advantage, Tensor):
        advantage = credit_advantage(advantage, cu, mask)
    keep = torch.ones_like(logp, dtype=torch.bool) if mask is None else mask
    good = keep
    for x in (logp, old_logp, advantage, ref_logp, entropy, is_weight):
        good = good if x is None else good & torch.isfinite(x)

    def clean(x: Tensor) -> Tensor:
        return torch.where(good, x, 0.0)

    def fixed(x: Tensor | None) -> Tensor | None:
        return None if x is None else clean(x.detach())

    taken = clean(logp)
    share = clean(_share(spec.reduce, spec.max_length or 0, cu, keep, denominator))
    given = _Given(
        old=taken.detach() if old_logp is None else clean(old_logp.detach()),
        advantage=clean(advantage.detach()),
        ref=fixed(ref_logp),
        weight=fixed(is_weight),
        share=share,
        mean=_Mean(cu, keep, good),
    )
    loss, bonus = _objective(taken, spec, given), torch.zeros_like(share)
    if spec.entropy_coef and entropy is not None:
        count = denominator if spec.reduce == "token_mean" else None
        bonus = share if spec.entropy_reduce == "loss" else _share("token_mean", 0, cu, keep, count)
        bonus = spec.entropy_coef * clean(bonus)
        loss = loss - (bonus * clean(entropy)).sum().to(loss.dtype)
    with torch.enable_grad():
        leaf = taken.detach().requires_grad_()
        (coefficient,) = torch.autograd.grad(_objective(leaf, spec, given), leaf)
    active = good & ((coefficient != 0) | (bonus != 0))
    return loss, _metrics(taken.detach(), spec, given, keep, good, active)


def linear_policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    old_logp: Tensor | None,
    advantage: Tensor,
    spec: Any,
    cu: Tensor,
    mask: Tensor | None,
    ref_logp: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    is_weight: Tensor | None,
    denominator: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of `linear_logp`; rows that are masked or non-finite never reach the product
    with the weight."""
    usable = torch.isfinite(hidden).all(-1)
    rows = (usable if mask is None else usable & mask).nonzero()[:, 0]
    bonus = spec.entropy_coef != 0

    def forward(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return linear_logp(hidden[rows], weight, target[rows], bias, temperature, softcap, bonus)

    taken, ent = forward(rows)
    finite = torch.isfinite(taken) if ent is None else torch.isfinite(taken) & torch.isfinite(ent)
    if not bool(finite.all()):
        rows = rows[finite]
        taken, ent = forward(rows)

    def spread(x: Tensor) -> Tensor:
        return torch.full(hidden.shape[:1], torch.nan, dtype=x.dtype, device=x.device).index_copy(
            0, rows, x
        )

    full = None if ent is None else spread(ent)
    return policy_loss(
        spread(taken), old_logp, advantage, spec, cu, mask, ref_logp, full, is_weight, denominator
    )


class _Mean:
    """Mean over the unmasked tokens of each completion; non-finite tokens add 0 and are counted."""

    def __init__(self, cu: Tensor, keep: Tensor, good: Tensor):
        self.row, self.good = segment_ids(cu, keep.numel()), good
        self.count = segment_sum(keep, self.row, cu.numel() - 1).clamp(min=1)

    def __call__(
        self, x: Tensor
    ) -> Tensor:  # (N,) -> (N,), every token carries its completion's mean
        total = segment_sum(torch.where(self.good, x, 0.0), self.row, self.count.numel())
        return (total / self.count).to(x.dtype)[self.row]


@dataclass(frozen=True)
class _Given:
    """What has no gradient: inputs with bad places at 0, shares, the mean over a completion."""

    old: Tensor  # (N,)
    advantage: Tensor  # (N,)
    ref: Tensor | None  # (N,)
    weight: Tensor | None  # (N,)
    share: Tensor  # (N,) float64
    mean: _Mean


def _objective(logp: Tensor, spec: Any, given: _Given) -> Tensor:  # 0-d
    per_token = _policy(logp, spec, given.old, given.advantage, given.mean)
    if given.weight is not None:
        weight = given.mean(given.weight) if spec.surrogate == "gmpo" else given.weight
        per_token = weight * per_token
    if spec.kl_coef and given.ref is not None:
        per_token = per_token + spec.kl_coef * _kl(spec.kl, given.ref - logp)
    return (given.share * per_token).sum().to(logp.dtype)


def _policy(logp: Tensor, spec: Any, old: Tensor, advantage: Tensor, mean: _Mean) -> Tensor:
    """The per-token loss before the KL and the reduction; ties take the branch that keeps the
    gradient."""
    low, high = 1 - spec.clip_low, 1 + spec.clip_high
    if spec.surrogate == "reinforce":
        return -advantage * logp
    d = logp - old
    if spec.surrogate == "gmpo":
        sign = advantage.sign()
        clipped = d.detach().clamp(-spec.clip_low, spec.clip_high)
        exponent = torch.where(sign == 0, 0.0, torch.where(sign * d <= sign * clipped, d, clipped))
        return -_exp(mean(exponent)) * mean(advantage)
    rho = _ratio(d, spec.ratio, mean)
    if spec.surrogate == "cispo":
        return -rho.detach().clamp(max=high) * advantage * logp
    if spec.surrogate == "sapo":
        t = torch.full_like(rho, spec.sapo_neg).masked_fill(advantage > 0, spec.sapo_pos)
        return -(4 / t) * torch.sigmoid(t * (rho - 1)) * advantage
    bound = rho.detach().clamp(low, high)
    free = rho
    if spec.delta is not None:
        free = torch.where(rho <= spec.delta, rho, spec.delta)
    loss = -torch.where(free * advantage <= bound * advantage, free * advantage, bound * advantage)
    if spec.dual_clip is not None:
        most = spec.dual_clip * advantage.abs()
        loss = torch.where((advantage < 0) & (loss > most), most, loss)
    return loss


def _ratio(d: Tensor, kind: str, mean: _Mean) -> Tensor:
    if kind == "token":
        return _exp(d)
    if kind == "sequence":
        return _exp(mean(d))
    return _exp(mean(d.detach()) + (d - d.detach()))


def _exp(x: Tensor) -> Tensor:
    return x.clamp(-EXP_MAX, EXP_MAX).exp()  # clamp has gradient 0 outside its bounds and 1 at them


def _kl(kind: str, r: Tensor) -> Tensor:
    if kind == "k1":
        return -r
    return r.square() / 2 if kind == "k2" else r.clamp(-EXP_MAX, EXP_MAX).expm1() - r


def _share(
    reduce: str,
    max_length: int,
    cu: Tensor,
    keep: Tensor,
    denominator: float | Tensor | None,
) -> Tensor:  # (N,) float64, the weight of each token in the reduction
    dtype, rows = torch.float64, cu.numel() - 1
    if reduce == "seq_mean":
        row = segment_ids(cu, keep.numel())
        length = segment_sum(keep, row, rows)[row]
        return 1 / (length.clamp(min=1) * (max(rows, 1) if denominator is None else denominator))
    if denominator is None:
        denominator = (
            keep.sum().clamp(min=1) if reduce == "token_mean" else max(rows, 1) * max_length
        )
    return torch.ones(keep.numel(), dtype=dtype, device=keep.device) / denominator


def _metrics(
    logp: Tensor, spec: Any, given: _Given, keep: Tensor, good: Tensor, active: Tensor
) -> dict[str, Tensor]:
    tokens = keep.sum()
    d = logp - given.old
    rho = torch.where(good, _ratio(d, spec.ratio, given.mean), 0.0)
    none = torch.zeros_like(good)
    low, high, dual = none, none, none
    if spec.surrogate == "gmpo":
        low, high = d < -spec.clip_low, d > spec.clip_high
    elif spec.surrogate in ("clip", "cispo"):
        low = rho < 1 - spec.clip_low if spec.surrogate == "clip" else none
        high = rho > 1 + spec.clip_high
    low, high = good & low & (given.advantage < 0), good & high & (given.advantage > 0)
    for cap in (spec.delta, spec.dual_clip):
        dual = dual if cap is None else dual | (good & (given.advantage < 0) & (rho > cap))
    k = torch.zeros_like(logp)
    if given.ref is not None:
        k = torch.where(good, _kl(spec.kl if spec.kl_coef else "k3", given.ref - logp), 0.0)

    def average(x: Tensor) -> Tensor:
        return (x.sum(dtype=torch.float64) / tokens.clamp(min=1)).to(logp.dtype)

    return {
        "clip_ratio/low_mean": average(low),
        "clip_ratio/high_mean": average(high),
        "clip_ratio/region_mean": average(low | high),
        "clip_ratio/dual_mean": average(dual),
        "kl": average(k),
        "ratio/mean": average(rho),
        "ratio/max": rho.max() if rho.numel() else rho.sum(),
        "tokens": tokens.to(logp.dtype),
        "nonfinite": (keep & ~good).sum().to(logp.dtype),
        "rows/active": average(active),
    }


def _accumulate(*given: Tensor) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
