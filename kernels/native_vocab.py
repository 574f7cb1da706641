"""A part of the vocabulary on the CPU: `linear_logp`'s statistics and gradients of the words that
one rank holds; what the parts make together is `reasonrl/vocab_parallel.py`'s.
Legend: N tokens, D hidden, V words of this part.
"""

from __future__ import annotations

from torch import Tensor

from reasonrl.kernels.native_head import Head
from reasonrl.kernels.native_linear import backward_only, forward_only


def vocab_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64, any word where the row's own stands elsewhere
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """log p (N,) among these words, and (max, log of the sum above it, entropy) (N, 3)."""
    head = Head(hidden, weight, bias, (temperature, softcap or 0.0))
    taken, _, stats = forward_only(head, target, False)
    return taken, stats


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
    """What these words contribute to dX, dW and db; rows without a gradient are left out."""
    head = Head(hidden, weight, bias, (temperature, softcap or 0.0))
    head.want(True, True, bias is not None)
    backward_only(head, target, stats, g, h)
    dx, dw, db = head.grads()
    assert dx is not None and dw is not None
    return dx, dw, db
