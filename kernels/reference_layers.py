"""The specification of what stands between a decoder's products, in plain torch (see `reference`).

    y = w n,  n = x / sqrt(mean(x^2) + eps) in x's dtype
    h = silu(g) u
    a' = a cos_a - b sin_a,  b' = b cos_b + a sin_b  of a head's halves a, b

Legend: D width, H query and K key heads of width d.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu


def rms_norm(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
    dtype: torch.dtype,  # of the result
) -> Tensor:  # (..., D)
    """As transformers' RMSNorm rounds: made in fp32 at least, n in x's dtype, then the product."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    n = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (weight * n.to(x.dtype)).to(dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Made in fp32 at least and rounded once."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


def add_rms_norm(
    x: Tensor,  # (..., D)
    delta: Tensor,  # (..., D)
    weight: Tensor,  # (D,)
    eps: float,
    dtype: torch.dtype,  # of the norm
) -> tuple[Tensor, Tensor]:  # (..., D) in x's dtype, (..., D)
    total = (x + delta).to(x.dtype)
    return total, rms_norm(total, weight, eps, dtype)


def rotary(
    q: Tensor,  # (N, H, d), d even
    k: Tensor,  # (N, K, d)
    cos: Tensor,  # (N, d)
    sin: Tensor,  # (N, d)
    dtype: torch.dtype,  # of the results
) -> tuple[Tensor, Tensor]:
    """Made in fp32 at least and rounded once."""
    wide = torch.promote_types(torch.promote_types(q.dtype, cos.dtype), torch.float32)
    c, s = (x.to(wide)[:, None] for x in (cos, sin))

    def turned(x: Tensor) -> Tensor:
        a, b = x.to(wide).chunk(2, -1)
        return (x.to(wide) * c + torch.cat([-b, a], -1) * s).to(dtype)

    return turned(q), turned(k)
