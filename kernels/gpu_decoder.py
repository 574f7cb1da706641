"""What stands between the products of a decoder layer (decoder.py) on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from reasonrl.kernels import layers, packed
from reasonrl.kernels.common import available
from reasonrl.kernels.decoder import Between, Known, Norms, Turn, by_parts
from reasonrl.kernels.turn import head_norm_grad_, turn_, turned

__all__ = ["available", "decoder_layer", "read_prompts"]


def decoder_layer(
    x: Tensor,  # (L, D) fp32, contiguous
    cos: Tensor,  # (L, d)
    sin: Tensor,  # (L, d)
    known: Sequence,  # of a half type, with calls.Calls
    weights: Sequence[Tensor],  # fp32, contiguous, in the order of decoder.Weights
    biases: Sequence[Tensor | None],  # of q, k, v, o, gate, up, down
    norms: Sequence[Tensor | None] = (None, None),  # of q's heads and k's
) -> Tensor:  # (L, D) fp32
    return by_parts(x, cos, sin, Known(*known), BETWEEN, *weights, *biases, *norms)


def read_prompts(
    qkv: Tensor,  # (L, (H + 2 K) d), contiguous; q and k are turned where they are
    cos: Tensor,  # (L, d)
    sin: Tensor,  # (L, d)
    size: int,  # d
    key_heads: int,
    where: Any,  # calls.Calls
    scaling: float,
    norms: Sequence[Tensor] = (),  # as of `turn_`
    eps: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:  # (L, H d), and keys and values (L, K, d)
    """Attention of packed prompts, without a gradient."""
    heads = qkv.unflatten(1, (-1, size))
    turn_(heads, cos, sin, key_heads, norms, eps)
    q, k, v = _split(heads, key_heads)
    return packed.attend(q, k, v, where, scaling)[0].flatten(1), k, v


def attend(
    qkv: Tensor, turn: Turn, known: Known, key_heads: int, norms: Norms
) -> tuple[Tensor, list[Tensor]]:
    """What was seen; its log-sum-exp and random states. q and k are turned where they are, but
    where they are normed, since the norm's gradient wants them as they came."""
    heads = qkv.unflatten(1, (-1, known.size))
    if not norms:
        turn_(heads, *turn, key_heads)
    given = _turned(heads, turn, known, key_heads, norms)
    out, lse, states = packed.attend(*given, known.packing, known.scaling)
    return out.flatten(1), [lse, *(x for state in states for x in state)]


def attend_grad(
    grad: Tensor, qkv: Tensor, seen: Tensor, kept: Sequence[Tensor], turn: Turn, known: Known,
    key_heads: int, norms: Norms, learnt: bool,
) -> tuple[Tensor, Sequence[Tensor | None]]:  # fmt: skip
    lse, *rest = kept
    calls = 1 if known.packing.shared is None else 2
    each = len(rest) // calls
    states = [rest[i * each : (i + 1) * each] for i in range(calls)]
    grad, seen, heads = (x.unflatten(1, (-1, known.size)) for x in (grad, seen, qkv))
    given = grad, *_turned(heads, turn, known, key_heads, norms), seen, lse, states
    out, by_norms = packed.attend_grad(*given, turn, known.packing, known.scaling), None
    if norms:
        by_norms = head_norm_grad_(out, heads, key_heads, norms, known.eps[2], learnt)
    return out.flatten(1), (None, None) if by_norms is None else by_norms.unbind()


def _turned(
    heads: Tensor, turn: Turn, known: Known, key_heads: int, norms: Norms
) -> tuple[Tensor, ...]:
    """q, k and v as attention reads them, of heads that are turned unless they are to be normed."""
    if not norms:
        return _split(heads, key_heads)
    made = turned(heads, *turn, key_heads, norms, known.eps[2])
    queries = made.shape[1] - key_heads
    return made[:, :queries], made[:, queries:], heads[:, queries + key_heads :]


def _split(heads: Tensor, key_heads: int) -> tuple[Tensor, ...]:
    return heads.split([heads.shape[1] - 2 * key_heads, key_heads, key_heads], 1)


BETWEEN = Between(layers.norm, layers.norm_grad, layers.gate, layers.gate_grad, attend, attend_grad)
