"""The products of a decoder layer (decoder.py) on the CPU, and what stands between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reasonrl.kernels.decoder import Between, DecoderLayer, Known, Norms, Turn
from reasonrl.kernels.native import DTYPES, core, pointer, threads
from reasonrl.kernels.native_layers import joined_swiglu
from reasonrl.kernels.native_products import products

SHARES = 64  # of tokens, for the gradient of heads' norms: sums in one order for any threads
DOTS = True  # False: without the instruction for pairs of bf16


def decoder_layer(
    x: Tensor,  # (L, D) fp32, contiguous
    cos: Tensor,  # (L, d)
    sin: Tensor,  # (L, d)
    known: Sequence,
    weights: Sequence[Tensor],  # fp32, contiguous, in the order of decoder.Weights
    biases: Sequence[Tensor | None],  # of q, k, v, o, gate, up, down
    norms: Sequence[Tensor | None] = (None, None),  # of q's heads and k's
) -> Tensor:  # (L, D) fp32
    return DecoderLayer.apply(x, cos, sin, Known(*known), BETWEEN, *weights, *biases, *norms)


def norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype):
    """The norm of x + delta, the sum, and 1 / rms of its rows."""
    y, scale = torch.empty(x.shape, dtype=dtype), torch.empty(len(x))
    total = x if delta is None else torch.empty_like(x)
    added = (0, 0, 0) if delta is None else (pointer(delta), pointer(total), DTYPES[delta.dtype])
    core().rms_norm(_task(x, weight, scale, eps, dtype), *added, pointer(y), threads())
    return y, total, scale


def norm_grad(
    x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor, beside: Tensor, learnt: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """By the rows of a norm, with the gradient that came beside it: in fp32, in grad's dtype; what
    the norm gave; by its weight."""
    out, narrow, again = torch.empty_like(x), torch.empty_like(grad), torch.empty_like(grad)
    by_weight = torch.empty_like(weight) if learnt else None
    given = (pointer(t) for t in (grad, beside, out, narrow, by_weight, again))
    task = _task(x, weight, scale, 0.0, grad.dtype)
    core().rms_norm_grad(task, *given, DTYPES[grad.dtype], threads())
    return out, narrow, again, by_weight


def gate_grad(both: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """By gate and up, (L, 2 F), and what they gave, (L, F)."""
    rows, width = grad.shape
    out, again, step = torch.empty_like(both), torch.empty_like(grad), width * both.element_size()
    gate, into = both.data_ptr(), out.data_ptr()
    task = core().GateTask(gate, gate + step, rows, width, 2 * width, DTYPES[both.dtype])
    given = pointer(grad), into, into + step, pointer(again), 2 * width
    core().swiglu_grad(task, *given, threads())
    return out, again


def attend(
    qkv: Tensor, turn: Turn, known: Known, key_heads: int, norms: Norms
) -> tuple[Tensor, list[Tensor]]:
    """What was seen, and what weights are made of again. q and k are turned where they stand, but
    where they are normed, since the norm's gradient wants them as they came."""
    heads = qkv.shape[1] // known.size - 2 * key_heads
    seen = torch.empty((len(qkv), heads * known.size), dtype=qkv.dtype)
    shares = torch.empty(len(qkv), heads, 2)
    given, how = (qkv, turn) if not norms else (_normed(qkv, turn, known, key_heads, norms), None)
    core().attend_packed(_packed(given, how, known, key_heads, shares, seen), threads())
    return seen, [shares]


def attend_grad(
    grad: Tensor, qkv: Tensor, seen: Tensor, kept: Sequence[Tensor], turn: Turn, known: Known,
    key_heads: int, norms: Norms, learnt: bool,
) -> tuple[Tensor, Sequence[Tensor | None]]:  # fmt: skip
    by_qkv, heads = torch.empty_like(qkv), qkv
    if norms:
        heads = _normed(qkv, turn, known, key_heads, norms)
    task = _packed(heads, turn, known, key_heads, kept[0], None)
    core().attend_packed_grad(task, pointer(grad), pointer(by_qkv), threads())
    if not norms:
        return by_qkv, (None, None)
    parts = torch.empty(min(len(qkv), SHARES), 2, known.size)
    task = _norms(qkv, by_qkv, turn, known, key_heads, norms)
    core().norm_heads_grad(task, pointer(parts), len(parts), threads())
    return by_qkv, parts.sum(0).unbind() if learnt else (None, None)


def _normed(qkv: Tensor, turn: Turn, known: Known, key_heads: int, norms: Norms) -> Tensor:
    """Heads as attention reads them."""
    out = torch.empty_like(qkv)
    core().norm_heads(_norms(qkv, out, turn, known, key_heads, norms), threads())
    return out


def _norms(qkv: Tensor, out: Tensor, turn: Turn, known: Known, key_heads: int, norms: Norms):
    heads = qkv.shape[1] // known.size - 2 * key_heads
    given = (pointer(x) for x in (qkv, out, *turn, *norms))
    sizes = len(qkv), heads, key_heads, known.size
    kinds = DTYPES[qkv.dtype], DTYPES[turn.cos.dtype]
    return core().HeadsTask(*given, *sizes, *kinds, known.eps[2])


def _packed(
    qkv: Tensor, turn: Turn | None, known: Known, key_heads: int, shares: Tensor, seen: Any
):
    blocks, heads = known.packing, shares.shape[1]
    given = (pointer(x) for x in (qkv, *(turn or (None, None)), blocks, shares, seen))
    sizes = len(qkv), len(blocks), heads, key_heads, known.size
    kinds = DTYPES[qkv.dtype], DTYPES[turn.cos.dtype if turn else torch.float32]
    return core().PackedTask(*given, *sizes, *kinds, known.scaling, DOTS)


def _task(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype):
    kinds = DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[dtype]
    return core().NormTask(pointer(x), pointer(weight), pointer(scale), *x.shape, *kinds, eps)


BETWEEN = Between(norm, norm_grad, joined_swiglu, gate_grad, attend, attend_grad, products)
