"""The policy loss and dL/dlogp from log-probabilities, Triton: one program a completion, one
launch.

    L = sum_t a_b (w_t policy_t + kl_coef k_t - entropy_coef H_t);  c_t = dL/dlogp_t comes out with
    it.

a_b is the share of a token in the reduction. Token ratios read a completion once; sequence ratios
read it for the mean log-ratio first, and gather the surviving slopes before c is shared out.
Traffic: 4 bytes a token for each input and output, two or three times for sequence ratios. Sums are
per completion, in order, no atomics. Which family, which KL and which inputs exist are compile-time
flags; every number is an argument. Legend: B completions, N packed tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonrl.kernels.common import available, bounded_exp, exp_minus_linear, finite, flag

__all__ = ["available", "coefficients", "named", "policy_loss", "shares"]

RATIO = {"token": 0, "sequence": 1, "sequence_token": 2}
SURROGATE = {"clip": 0, "cispo": 1, "sapo": 2, "gmpo": 3, "reinforce": 4}
KL = {"k1": 1, "k2": 2, "k3": 3}
SUMS = ("low", "high", "dual", "kl", "rho", "top", "tokens", "nonfinite", "active", "loss")


@triton.jit
def _token(
    i, end, ptrs, OLD: tl.constexpr, REF: tl.constexpr, W: tl.constexpr, ENT: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Inputs of the tokens i with bad places at 0, and which of them count and are finite."""
    logp_ptr, old_ptr, adv_ptr, ref_ptr, w_ptr, ent_ptr, mask_ptr = ptrs
    keep = i < end
    if MASK:
        keep &= tl.load(mask_ptr + i, mask=keep, other=0) != 0
    logp = tl.load(logp_ptr + i, mask=keep, other=0.0)
    a = tl.load(adv_ptr + i, mask=keep, other=0.0)
    good = keep & finite(logp) & finite(a)
    old, ref, w, h = logp, logp, tl.zeros_like(logp) + 1.0, tl.zeros_like(logp)
    if OLD:
        old = tl.load(old_ptr + i, mask=keep, other=0.0)
        good &= finite(old)
    if REF:
        ref = tl.load(ref_ptr + i, mask=keep, other=0.0)
        good &= finite(ref)
    if W:
        w = tl.load(w_ptr + i, mask=keep, other=0.0)
        good &= finite(w)
    if ENT:
        h = tl.load(ent_ptr + i, mask=keep, other=0.0)
        good &= finite(h)
    d, r = tl.where(good, logp - old, 0.0), tl.where(good, ref - logp, 0.0)
    logp, a = tl.where(good, logp, 0.0), tl.where(good, a, 0.0)
    return keep, good, logp, d, a, r, tl.where(good, w, 0.0), tl.where(good, h, 0.0)


@triton.jit
def _free(d, a, log_low, log_high):
    """GMPO's clipped log-ratio, and where it still moves with d; both 0 where A is."""
    clipped = tl.minimum(tl.maximum(d, -log_low), log_high)
    moves = (a != 0) & tl.where(a > 0, d <= clipped, d >= clipped)
    return tl.where(a != 0, tl.where(moves, d, clipped), 0.0), moves


@triton.jit
def _surrogate(
    logp, a, rho, inside, low, high, delta, dual, pos, neg,
    SURROGATE: tl.constexpr, DELTA: tl.constexpr, DUAL: tl.constexpr,
):  # fmt: skip
    """Per-token loss and its slope by the exponent of rho (by logp where there is no ratio)."""
    moving = tl.where(inside, rho, 0.0)
    if SURROGATE == 4:
        value, slope = -a * logp, -a
    elif SURROGATE == 1:
        value, slope = -tl.minimum(rho, high) * a * logp, -tl.minimum(rho, high) * a
    elif SURROGATE == 2:
        t = tl.where(a > 0, pos, neg)
        s = 1.0 / (1.0 + tl.exp(-t * (rho - 1.0)))
        value, slope = -4.0 / t * s * a, -4.0 * s * (1.0 - s) * moving * a
    else:
        free = rho
        if DELTA:
            free = tl.minimum(rho, delta)
            moving = tl.where(rho <= delta, moving, 0.0)
        clipped = tl.minimum(tl.maximum(rho, low), high)
        first = free * a <= clipped * a
        value, slope = -tl.where(first, free, clipped) * a, tl.where(first, -moving * a, 0.0)
        if DUAL:
            most = dual * tl.abs(a)
            over = (a < 0) & (value > most)
            value, slope = tl.where(over, most, value), tl.where(over, 0.0, slope)
    return value, slope


@triton.jit
def _kl(r, KIND: tl.constexpr):
    """k and dk/dlogp of r = ref - logp."""
    if KIND == 1:
        value, slope = -r, 1.0 + 0.0 * r
    elif KIND == 2:
        value, slope = 0.5 * r * r, -r
    else:
        value, slope = exp_minus_linear(r)
        slope = -slope
    return value, slope


@triton.jit
def _means(
    start, end, ptrs, log_low, log_high, OLD: tl.constexpr, REF: tl.constexpr, W: tl.constexpr,
    ENT: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Over the unmasked tokens of a completion: their number, the finite ones, means of d, l, A,
    w."""
    n = tl.zeros([BLOCK], tl.float32)
    fine, sum_d, sum_l, sum_a, sum_w = n, n, n, n, n
    for at in range(start, end, BLOCK):
        keep, good, _, d, a, _, w, _ = _token(
            at + tl.arange(0, BLOCK).to(tl.int64), end, ptrs, OLD, REF, W, ENT, MASK
        )
        n += tl.where(keep, 1.0, 0.0)
        fine += tl.where(good, 1.0, 0.0)
        sum_d += d
        sum_l += _free(d, a, log_low, log_high)[0]
        sum_a += a
        sum_w += w
    count = tl.maximum(tl.sum(n, 0), 1.0)
    means = (tl.sum(sum_d, 0), tl.sum(sum_l, 0), tl.sum(sum_a, 0), tl.sum(sum_w, 0))
    d, log, a, w = means
    return count, tl.sum(fine, 0), d / count, log / count, a / count, w / count


@triton.jit
def kernel(
    logp_ptr, old_ptr, adv_ptr, ref_ptr, w_ptr, ent_ptr, mask_ptr, cu_ptr, share_ptr, bonus_ptr,
    c_ptr, eta_ptr, sums_ptr, low, high, log_low, log_high, delta, dual, pos, neg, kl_coef,
    RATIO: tl.constexpr, SURROGATE: tl.constexpr, KL: tl.constexpr, KL_ON: tl.constexpr,
    DELTA: tl.constexpr, DUAL: tl.constexpr, OLD: tl.constexpr, REF: tl.constexpr, W: tl.constexpr,
    ENT: tl.constexpr, MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    start, end = tl.load(cu_ptr + b), tl.load(cu_ptr + b + 1)
    ptrs = (logp_ptr, old_ptr, adv_ptr, ref_ptr, w_ptr, ent_ptr, mask_ptr)
    share, bonus = tl.load(share_ptr + b), tl.load(bonus_ptr + b)
    lane = tl.arange(0, BLOCK).to(tl.int64)
    zero = tl.zeros([BLOCK], tl.float32)
    count, fine, mean_d, mean_l, mean_a, mean_w = 1.0, 1.0, 0.0, 0.0, 0.0, 0.0
    if RATIO != 0:
        count, fine, mean_d, mean_l, mean_a, mean_w = _means(
            start, end, ptrs, log_low, log_high, OLD, REF, W, ENT, MASK, BLOCK
        )
    pooled = 0.0
    if RATIO == 1 and SURROGATE == 0:
        slopes = zero
        for at in range(start, end, BLOCK):
            _, _, logp, _, a, _, w, _ = _token(at + lane, end, ptrs, OLD, REF, W, ENT, MASK)
            rho, inside = bounded_exp(mean_d + zero)
            slopes += (
                w
                * _surrogate(
                    logp, a, rho, inside, low, high, delta, dual, pos, neg, SURROGATE, DELTA, DUAL
                )[1]
            )
        pooled = tl.sum(slopes, 0) / count
    geo, geo_inside = bounded_exp(mean_l + zero)
    low_n, high_n, dual_n, kl_n, rho_n, top = zero, zero, zero, zero, zero, zero
    tokens, lost, active, loss = zero, zero, zero, zero
    for at in range(start, end, BLOCK):
        i = at + lane
        keep, good, logp, d, a, r, w, h = _token(i, end, ptrs, OLD, REF, W, ENT, MASK)
        x = mean_d + zero
        if RATIO == 0:
            x = d
        rho, inside = bounded_exp(x)
        under, over = rho < low, rho > high
        if SURROGATE == 3:
            _, moves = _free(d, a, log_low, log_high)
            value = -geo * mean_a * (mean_w if W else 1.0)
            slope = tl.where(moves & geo_inside, value, 0.0) * (fine / count)
            under, over = d < -log_low, d > log_high
        else:
            value, slope = _surrogate(
                logp, a, rho, inside, low, high, delta, dual, pos, neg, SURROGATE, DELTA, DUAL
            )
            value, slope = w * value, w * slope
            if RATIO == 1:
                slope = pooled + zero
        if SURROGATE == 0 or SURROGATE == 3:
            low_n += tl.where(good & under & (a < 0), 1.0, 0.0)
        if SURROGATE == 0 or SURROGATE == 1 or SURROGATE == 3:
            high_n += tl.where(good & over & (a > 0), 1.0, 0.0)
        if DELTA:
            dual_n += tl.where(good & (a < 0) & (rho > delta), 1.0, 0.0)
        if DUAL:
            cut = good & (a < 0) & (rho > dual)
            if DELTA:
                cut &= rho <= delta
            dual_n += tl.where(cut, 1.0, 0.0)
        if REF:
            k, dk = _kl(r, KL)
            kl_n += tl.where(good, k, 0.0)
            if KL_ON:
                value += kl_coef * k
                slope += kl_coef * dk
        c, eta = tl.where(good, share * slope, 0.0), tl.where(good, bonus, 0.0)
        loss += tl.where(good, share * value - bonus * h, 0.0)
        rho_n += tl.where(good, rho, 0.0)
        top = tl.maximum(top, tl.where(good, rho, 0.0))
        tokens += tl.where(keep, 1.0, 0.0)
        lost += tl.where(keep & (good == 0), 1.0, 0.0)
        active += tl.where((c != 0) | (eta != 0), 1.0, 0.0)
        tl.store(c_ptr + i, c, mask=i < end)
        if ENT:
            tl.store(eta_ptr + i, -eta, mask=i < end)
    sums_ptr += b * 10
    tl.store(sums_ptr, tl.sum(low_n, 0))
    tl.store(sums_ptr + 1, tl.sum(high_n, 0))
    tl.store(sums_ptr + 2, tl.sum(dual_n, 0))
    tl.store(sums_ptr + 3, tl.sum(kl_n, 0))
    tl.store(sums_ptr + 4, tl.sum(rho_n, 0))
    tl.store(sums_ptr + 5, tl.max(top, 0))
    tl.store(sums_ptr + 6, tl.sum(tokens, 0))
    tl.store(sums_ptr + 7, tl.sum(lost, 0))
    tl.store(sums_ptr + 8, tl.sum(active, 0))
    tl.store(sums_ptr + 9, tl.sum(loss, 0))


class Policy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logp, entropy, inputs, spec):
        c, eta, sums = coefficients(logp, entropy, inputs, spec)
        ctx.save_for_backward(c, eta)
        ctx.mark_non_differentiable(sums)
        return sums[:, 9].sum().float(), sums

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[override]
        c, eta = ctx.saved_tensors
        return grad * c, grad * eta if eta.numel() else None, None, None


def policy_loss(
    logp: Tensor,  # (N,)
    old_logp: Tensor | None,
    advantage: Tensor,
    spec: Any,
    cu: Tensor,
    mask: Tensor | None,
    ref_logp: Tensor | None,
    entropy: Tensor | None,
    is_weight: Tensor | None,
    denominator: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    share, bonus = shares(spec, cu, mask, denominator)
    inputs = Inputs(old_logp, advantage, ref_logp, is_weight, mask, cu, share, bonus)
    loss, sums = Policy.apply(logp, entropy, inputs, spec)
    return loss, named(sums)


@dataclass
class Inputs:
    """All that has no gradient: (N,) values, (B+1,) offsets, (B,) shares."""

    old: Tensor | None
    advantage: Tensor
    ref: Tensor | None
    weight: Tensor | None
    mask: Tensor | None
    cu: Tensor
    share: Tensor
    bonus: Tensor


def coefficients(
    logp: Tensor, entropy: Tensor | None, given: Inputs, spec: Any
) -> tuple[Tensor, Tensor, Tensor]:  # dL/dlogp (N,), dL/dentropy (N,) or (0,), sums (B, 10) float64
    rows, n = given.cu.numel() - 1, logp.numel()
    c = torch.empty_like(logp)
    eta = torch.empty_like(logp) if entropy is not None else logp.new_empty(0)
    sums = torch.empty((rows, len(SUMS)), dtype=torch.float32, device=logp.device)
    if rows and n:
        kernel[(rows,)](
            logp, flag(given.old, logp), given.advantage, flag(given.ref, logp),
            flag(given.weight, logp), flag(entropy, logp), flag(given.mask, logp), given.cu,
            given.share, given.bonus, c, eta, sums, 1 - spec.clip_low, 1 + spec.clip_high,
            spec.clip_low, spec.clip_high, spec.delta or 0.0, spec.dual_clip or 0.0, spec.sapo_pos,
            spec.sapo_neg, spec.kl_coef, **flags(spec, entropy, given), BLOCK=512, num_warps=4,
        )  # fmt: skip
    else:
        sums.zero_()
    return c, eta, sums.double()


def flags(spec: Any, entropy: Tensor | None, given: Inputs) -> dict[str, Any]:
    return {
        "RATIO": RATIO[spec.ratio],
        "SURROGATE": SURROGATE[spec.surrogate],
        "KL": KL[spec.kl] if spec.kl_coef else KL["k3"],
        "KL_ON": spec.kl_coef != 0,
        "DELTA": spec.delta is not None,
        "DUAL": spec.dual_clip is not None,
        "OLD": given.old is not None,
        "REF": given.ref is not None,
        "W": given.weight is not None,
        "ENT": entropy is not None,
        "MASK": given.mask is not None,
    }


def shares(
    spec: Any, cu: Tensor, mask: Tensor | None, denominator: float | Tensor | None
) -> tuple[Tensor, Tensor]:  # (B,) fp32 each: a token's share of the loss, and of the entropy bonus
    length = cu.diff().double()
    if mask is not None:
        before = torch.nn.functional.pad(mask.double().cumsum(0), (1, 0))
        length = before[cu].diff()
    rows, tokens = max(length.numel(), 1), length.sum().clamp(min=1)
    own = {"seq_mean": rows, "token_mean": tokens, "fixed": rows * (spec.max_length or 0)}[
        spec.reduce
    ]
    share = torch.ones_like(length) / (own if denominator is None else denominator)
    if spec.reduce == "seq_mean":
        share = share / length.clamp(min=1)
    bonus = share
    if spec.entropy_reduce == "token_mean" and spec.reduce != "token_mean":
        bonus = torch.ones_like(length) / tokens
    return share.float(), (spec.entropy_coef * bonus).float()


def named(sums: Tensor) -> dict[str, Tensor]:
    """Sums of completions (B, 10) -> the metrics."""
    total = sums.sum(0)
    top = sums[:, SUMS.index("top")].max() if sums.shape[0] else total[SUMS.index("top")]
    mean = (total / total[SUMS.index("tokens")].clamp(min=1)).float()
    whole, top = total.float(), top.float()
    at = {name: (mean[i], whole[i]) for i, name in enumerate(SUMS)}
    return {
        "clip_ratio/low_mean": at["low"][0],
        "clip_ratio/high_mean": at["high"][0],
        "clip_ratio/region_mean": at["low"][0] + at["high"][0],
        "clip_ratio/dual_mean": at["dual"][0],
        "kl": at["kl"][0],
        "ratio/mean": at["rho"][0],
        "ratio/max": top,
        "tokens": at["tokens"][1],
        "nonfinite": at["nonfinite"][1],
        "rows/active": at["active"][0],
    }
