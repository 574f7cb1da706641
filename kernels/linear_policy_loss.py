"""The policy loss from hidden states with its gradients, Triton: one pass for token ratios.

For a chunk of rows: u = x W^T + b (a matrix product), `logp`'s statistics, `policy_loss`'s
coefficients, dL/du in place of u, then dX = dU W and dW += dU^T X. Loss, dX, dW and db are ready
after the forward, 6 N D V FLOP; backward only scales them. A sequence ratio needs every log p of a
completion first: then u is made twice, 8 N D V. Masked rows are left out before the forward; rows
whose coefficients are 0 (clipped, dead, non-finite) before the two gradient products. Extra memory:
one chunk of logits, at most SCRATCH bytes. Half-precision logits are rounded to their type.
Legend: B completions, N rows, K unmasked rows, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from reasonrl.kernels.common import available
from reasonrl.kernels.logp import row_grad, row_stats
from reasonrl.kernels.policy_loss import SUMS, Inputs, coefficients, named, shares

__all__ = ["available", "linear_policy_loss"]

SCRATCH = 1 << 28  # bytes of logits alive at one time


@dataclass
class Head:
    """The matrix product and the gradients that grow while chunks pass."""

    x: Tensor  # (N, D)
    w: Tensor  # (V, D)
    bias: Tensor | None
    target: Tensor  # (N,)
    scale: tuple[float, float | None]  # temperature, softcap

    def __post_init__(self) -> None:
        self.dx = torch.zeros_like(self.x)
        self.dw = torch.zeros_like(self.w, dtype=torch.float32)
        self.db = torch.zeros(self.w.shape[0], dtype=torch.float32, device=self.w.device)

    def logits(self, rows: Tensor) -> Tensor:
        u = self.x[rows] @ self.w.t()
        return u if self.bias is None else u.add_(self.bias.to(u.dtype))

    def stats(self, u: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return row_stats(u, self.target[rows], *self.scale)

    def grow(self, u: Tensor, rows: Tensor, stats: Tensor, c: Tensor, eta: Tensor) -> None:
        """Add what these rows contribute; u becomes dL/du."""
        live = c != 0 if eta.numel() == 0 else (c != 0) | (eta != 0)
        if not bool(live.all()):
            u, rows, stats, c = u[live], rows[live], stats[live], c[live]
            eta = eta[live] if eta.numel() else eta
        h = eta if eta.numel() else None
        row_grad(u, self.target[rows], stats, c, h, u, *self.scale)
        self.dx.index_copy_(0, rows, u @ self.w)
        self.dw += u.t() @ self.x[rows]
        self.db += u.sum(0, dtype=torch.float32)


class LinearPolicy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, given, spec, scale):
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        head = Head(hidden.to(dtype), weight.to(dtype), bias, target, scale)
        sums = one_pass(head, given, spec) if spec.ratio == "token" else two_pass(head, given, spec)
        db = None if bias is None else head.db.to(bias.dtype)
        ctx.save_for_backward(head.dx.to(hidden.dtype), head.dw.to(weight.dtype), db)
        ctx.mark_non_differentiable(sums)
        return sums[:, SUMS.index("loss")].sum().float(), sums

    @staticmethod
    def backward(ctx, grad, _):  # type: ignore[override]
        dx, dw, db = ctx.saved_tensors
        scaled = [None if x is None else (grad * x).to(x.dtype) for x in (dx, dw, db)]
        return *scaled, None, None, None, None


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


def one_pass(head: Head, given: Inputs, spec: Any) -> Tensor:  # sums (B, 10)
    rows, given = unmasked(head, given)
    sums = torch.zeros((given.cu.numel() - 1, len(SUMS)), dtype=torch.float64, device=rows.device)
    size = chunk(head)
    for start in range(0, rows.numel(), size):
        at = slice(start, min(start + size, rows.numel()))
        u = head.logits(rows[at])
        taken, stats = head.stats(u, rows[at])
        c, eta, own = coefficients(
            taken, stats[:, 2].contiguous() if spec.entropy_coef else None, cut(given, at), spec
        )
        top = torch.maximum(sums[:, SUMS.index("top")], own[:, SUMS.index("top")])
        sums += own
        sums[:, SUMS.index("top")] = top
        head.grow(u, rows[at], stats, c, eta)
    return sums


def two_pass(head: Head, given: Inputs, spec: Any) -> Tensor:  # sums (B, 10)
    rows, given = unmasked(head, given)
    parts = rows.split(chunk(head))
    stats = [head.stats(head.logits(part), part) for part in parts]
    taken, stats = (torch.cat([s[i] for s in stats]) for i in range(2))
    c, eta, sums = coefficients(
        taken, stats[:, 2].contiguous() if spec.entropy_coef else None, given, spec
    )
    live = ((c != 0) | (eta != 0) if eta.numel() else c != 0).nonzero()[:, 0]
    for at in live.split(chunk(head)):
        own = eta[at] if eta.numel() else eta
        head.grow(head.logits(rows[at]), rows[at], stats[at], c[at], own)
    return sums


def unmasked(head: Head, given: Inputs) -> tuple[Tensor, Inputs]:
    """The rows in use, and the inputs of these rows with offsets that count them."""
    n = head.x.shape[0]
    if given.mask is None:
        return torch.arange(n, device=head.x.device), given
    rows = given.mask.nonzero()[:, 0]
    cu = torch.nn.functional.pad(given.mask.cumsum(0), (1, 0))[given.cu].contiguous()
    return rows, replace(given, **pick(given, rows), mask=None, cu=cu)


def cut(given: Inputs, at: slice) -> Inputs:
    """The inputs of a run of rows; completions outside it are empty."""
    cu = given.cu.clamp(at.start, at.stop) - at.start
    return replace(given, **pick(given, at), cu=cu.contiguous())


def pick(given: Inputs, rows: Tensor | slice) -> dict[str, Tensor | None]:
    tokens = {name: getattr(given, name) for name in ("old", "advantage", "ref", "weight")}
    return {name: None if x is None else x[rows].contiguous() for name, x in tokens.items()}


def chunk(head: Head) -> int:
    return max(1, SCRATCH // max(1, head.w.shape[0] * head.x.element_size()))
