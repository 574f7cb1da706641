"""The specification of what stands between a decoder's products, in plain torch (see `reference`).

    y = w n,  n = x / sqrt(mean(x^2) + eps) in x's dtype
    h = silu(g) u

Legend: D width.
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
