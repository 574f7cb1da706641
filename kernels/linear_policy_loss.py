"""The policy loss from hidden states with its gradients, Triton: one pass for token ratios.

For a chunk of rows: u = x W^T + b (a matrix product), `logp`'s statistics, `policy_loss`'s
coefficients, dL/du in place of u, then dX = dU W and dW += dU^T X. Loss, dX, dW and db are ready
after the forward, 6 N D V FLOP; backward only scales them. A sequence ratio needs every log p of a
completion first: then u is made twice, 8 N D V. Masked rows are left out before the forward; rows
whose coefficients are 0 (clipped, dead, non-finite) before the two gradient products, where they
are enough to pay for moving the others together. Extra memory: one chunk of logits (`linear_logp`).
Legend: B completions, N rows, K unmasked rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reasonrl.kernels.common import available, scaled
from reasonrl.kernels.linear_logp import Gradients, Head, Rows
from reasonrl.kernels.policy_loss import SUMS, Inputs, coefficients, named, shares

__all__ = ["available", "linear_policy_loss"]

WORTH = 0.85  # rows are moved together where at most this share of them is live


class LinearPolicy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, given, spec, scale):
        head = Head(hidden, weight, bias, target, scale)
        grads = Gradients(head)
        walk = one_pass if spec.ratio == "token" else two_pass
        sums = walk(head, grads, given, spec)
        ctx.save_for_backward(*grads.of(hidden, weight, bias))
        ctx.mark_non_differentiable(sums)
        return sums[:, SUMS.index("loss")].sum().float(), sums

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[override]
        found = (None if x is None else scaled(x, grad) for x in ctx.saved_tensors)
        return *found, None, None, None, None


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
    share, bonus = shares(spec, cu, mask, denominator)
    given = Inputs(old_logp, advantage, ref_logp, is_weight, mask, cu, share, bonus)
    scale = (temperature, softcap)
    loss, sums = LinearPolicy.apply(hidden, weight, bias, target, given, spec, scale)
    return loss, named(sums)


def one_pass(head: Head, grads: Gradients, given: Inputs, spec: Any) -> Tensor:  # sums (B, 10)
    rows, given = unmasked(head, given)
    shape, top = (given.cu.numel() - 1, len(SUMS)), SUMS.index("top")
    sums = torch.zeros(shape, dtype=torch.float64, device=head.x.device)
    for at in head.chunks(head.x.shape[0] if rows is None else rows.numel()):
        own_rows = at if rows is None else rows[at]
        u, taken, stats = head.scored(own_rows, bool(spec.entropy_coef))
        assert u is not None
        c, eta, own = coefficients(
            taken, stats[:, 2].contiguous() if spec.entropy_coef else None, cut(given, at), spec
        )
        most = torch.maximum(sums[:, top], own[:, top])
        sums += own
        sums[:, top] = most
        grow(grads, u, own_rows, stats, c, eta if eta.numel() else None)
    return sums


def two_pass(head: Head, grads: Gradients, given: Inputs, spec: Any) -> Tensor:  # sums (B, 10)
    rows, given = unmasked(head, given)
    if rows is None:
        rows = torch.arange(head.x.shape[0], device=head.x.device)
    entropy = bool(spec.entropy_coef)
    parts = [rows[at] for at in head.chunks(rows.numel(), keep=False)]
    stats = [head.scored(part, entropy, keep=False)[1:] for part in parts]
    taken, stats = (torch.cat([s[i] for s in stats]) for i in range(2))
    c, eta, sums = coefficients(
        taken, stats[:, 2].contiguous() if spec.entropy_coef else None, given, spec
    )
    live = ((c != 0) | (eta != 0) if eta.numel() else c != 0).nonzero()[:, 0]
    for part in head.chunks(live.numel()):
        at = live[part]
        own, entropy = rows[at], eta[at] if eta.numel() else None
        grads.add(head.logits(own), own, stats[at], c[at], entropy, head.x[own])
    return sums


def grow(
    grads: Gradients, u: Tensor, rows: Rows, stats: Tensor, c: Tensor, eta: Tensor | None
) -> None:
    """Add what the live rows of a chunk contribute."""
    live = c != 0 if eta is None else (c != 0) | (eta != 0)
    count = int(live.sum())  # the one wait for the device in a chunk
    if count == 0:
        return
    x = grads.head.x[rows]
    if count <= WORTH * live.numel():
        at = live.nonzero()[:, 0]
        u, stats, c, x = (v.index_select(0, at) for v in (u, stats, c, x))
        eta = None if eta is None else eta.index_select(0, at)
        rows = at + rows.start if isinstance(rows, slice) else rows.index_select(0, at)
    elif count < live.numel():
        x = x.masked_fill(~live[:, None], 0.0)  # their dU is 0, but 0 times NaN is not
    grads.add(u, rows, stats, c, eta, x)


def unmasked(head: Head, given: Inputs) -> tuple[Tensor | None, Inputs]:
    """The rows in use (None: all), and the inputs of these rows with offsets that count them."""
    if given.mask is None:
        return None, given
    rows = given.mask.nonzero()[:, 0]
    cu = torch.nn.functional.pad(given.mask.cumsum(0), (1, 0))[given.cu].contiguous()
    return rows, replace(given, **pick(given, rows), mask=None, cu=cu)


def cut(given: Inputs, at: slice) -> Inputs:
    """The inputs of a run of rows; completions outside it are empty."""
    if at.start == 0 and at.stop == given.advantage.numel():
        return given
    cu = given.cu.clamp(at.start, at.stop) - at.start
    return replace(given, **pick(given, at), cu=cu.contiguous())


def pick(given: Inputs, rows: Tensor | slice) -> dict[str, Tensor | None]:
    tokens = {name: getattr(given, name) for name in ("old", "advantage", "ref", "weight")}
    return {name: None if x is None else x[rows].contiguous() for name, x in tokens.items()}
