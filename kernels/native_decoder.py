"""What stands between the products of a decoder layer (decoder.py) on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from reasonrl.kernels import native_packed
from reasonrl.kernels.decoder import Between, DecoderLayer, Known, Norms, Turn
from reasonrl.kernels.native import DTYPES, core, pointer, threads
from reasonrl.kernels.native_layers import joined_swiglu
from reasonrl.kernels.native_packed import Heads


def decoder_layer(
    x: Tensor,  # (L, D) fp32, contiguous
    cos: Tensor,  # (L, d)
    sin: Tensor,  # (L, d)
    known: Sequence,
    weights: Sequence[Tensor],  # fp32, contiguous, in the order of decoder.Weights
    biases: Sequence[Tensor | None],  # of q, k, v, o, gate, up, down
) -> Tensor:  # (L, D) fp32
    return DecoderLayer.apply(x, cos, sin, Known(*known), BETWEEN, *weights, *biases, None, None)


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
    """What was seen, and the softmax' weights. There are no norms of heads here."""
    heads = _heads(qkv, turn, known, key_heads)
    seen, soft = native_packed.attend(*heads, known.packing, known.scaling)
    return seen.flatten(1), soft


def attend_grad(
    grad: Tensor, qkv: Tensor, seen: Tensor, soft: Sequence[Tensor], turn: Turn, known: Known,
    key_heads: int, norms: Norms, learnt: bool,
) -> tuple[Tensor, Sequence[None]]:  # fmt: skip
    by_qkv = torch.empty_like(qkv)
    heads = _heads(qkv, turn, known, key_heads)
    into = [part.x for part in _heads(by_qkv, turn, known, key_heads)]
    above = grad.unflatten(1, (-1, known.size))
    native_packed.attend_grad(above, *heads, soft, known.packing, known.scaling, into)
    return by_qkv, (None, None)


def _heads(qkv: Tensor, turn: Turn, known: Known, key_heads: int) -> tuple[Heads, Heads, Heads]:
    parts = qkv.unflatten(1, (-1, known.size))
    q, k, v = parts.split([parts.shape[1] - 2 * key_heads, key_heads, key_heads], 1)
    return Heads(q, *turn), Heads(k, *turn), Heads(v)


def _task(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype):
    kinds = DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[dtype]
    return core().NormTask(pointer(x), pointer(weight), pointer(scale), *x.shape, *kinds, eps)


BETWEEN = Between(norm, norm_grad, joined_swiglu, gate_grad, attend, attend_grad)
