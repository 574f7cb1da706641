"""A decoder layer on the CPU, forward and backward as one function: torch's matrix products, our
kernels between them.

    s = x + o(attention(q, k, v of n1(x))),  y = s + down(silu(gate) up of n2(s))

q, k, v and gate, up are one product each, of weights that are cast and joined a layer at a time,
again in the backward. Kept for the gradient: x, s, q k v, the softmax' weights, what it saw, gate
and up; what the norms and SwiGLU gave is made again on the way back.
Legend: L tokens of width D, H query and K key heads of size d, F wide inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonrl.kernels import native_packed
from reasonrl.kernels.native import DTYPES, core, pointer, threads
from reasonrl.kernels.native_layers import joined_swiglu
from reasonrl.kernels.native_packed import Heads

QKV, OUT, BOTH, DOWN = ("q", "k", "v"), ("o",), ("gate", "up"), ("down",)
BIASES = [f"{name}_bias" for name in (*QKV, *OUT, *BOTH, *DOWN)]


class Weights(NamedTuple):
    norm1: Tensor  # (D,)
    q: Tensor  # (H d, D)
    k: Tensor  # (K d, D)
    v: Tensor  # (K d, D)
    o: Tensor  # (D, H d)
    norm2: Tensor  # (D,)
    gate: Tensor  # (F, D)
    up: Tensor  # (F, D)
    down: Tensor  # (D, F)


class Known(NamedTuple):
    size: int  # d
    eps: tuple[float, float]
    scaling: float
    dtype: torch.dtype  # of the products
    packing: Any  # places.Packing


def decoder_layer(
    x: Tensor,  # (L, D) fp32, contiguous
    cos: Tensor,  # (L, d)
    sin: Tensor,  # (L, d)
    known: Sequence[Any],
    weights: Sequence[Tensor],  # fp32, contiguous, in the order of Weights
    biases: Sequence[Tensor | None],  # of q, k, v, o, gate, up, down
) -> Tensor:  # (L, D) fp32
    return _DecoderLayer.apply(x, cos, sin, Known(*known), *weights, *biases)


class _DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, known, *given):
        layer = Layer(known, given)
        y, _, scale1 = _normed(x, None, layer.w.norm1, known.eps[0], known.dtype)
        qkv = layer.product(QKV, y)
        heads = layer.heads(qkv, cos, sin)
        seen, soft = native_packed.attend(*heads, known.packing, known.scaling)
        seen = seen.flatten(1)
        delta = layer.product(OUT, seen)
        y, total, scale2 = _normed(x, delta, layer.w.norm2, known.eps[1], known.dtype)
        both = layer.product(BOTH, y)
        down = layer.product(DOWN, joined_swiglu(both))
        ctx.known, ctx.soft = known, len(soft)
        kept = x, cos, sin, total, scale1, scale2, qkv, seen, both
        ctx.save_for_backward(*kept, *soft, *given)
        return total + down

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, cos, sin, total, scale1, scale2, qkv, seen, both, *rest = ctx.saved_tensors
        known, soft, given = ctx.known, rest[: ctx.soft], rest[ctx.soft :]
        layer = Layer(known, given, ctx.needs_input_grad[4:])
        grad = grad.contiguous()
        above = grad.to(known.dtype)
        by_both, read = _swiglu_grad(both, layer.below(DOWN, above))
        layer.learn(DOWN, above, read)
        grad, above, read = layer.norm_grad(
            "norm2", total, scale2, layer.below(BOTH, by_both), grad
        )
        layer.learn(BOTH, by_both, read)
        layer.learn(OUT, above, seen)
        above = layer.below(OUT, above).unflatten(1, (-1, known.size))
        by_qkv = torch.empty_like(qkv)
        heads, into = layer.heads(qkv, cos, sin), layer.heads(by_qkv, cos, sin)
        native_packed.attend_grad(
            above, *heads, soft, known.packing, known.scaling, [part.x for part in into]
        )
        grad, _, read = layer.norm_grad("norm1", x, scale1, layer.below(QKV, by_qkv), grad)
        layer.learn(QKV, by_qkv, read)
        return grad, None, None, None, *(layer.found.get(name) for name in NAMES)


NAMES = (*Weights._fields, *BIASES)


class Layer:
    """The products of a layer, and the gradients of their weights as they are found."""

    def __init__(self, known: Known, given: Sequence[Any], wants: Sequence[bool] = ()):
        self.known, self.w = known, Weights(*given[: len(Weights._fields)])
        self.given = dict(zip(NAMES, given, strict=True))
        self.wants = dict(zip(NAMES, wants, strict=False))
        self.found: dict[str, Tensor] = {}

    def joined(self, names: Sequence[str]) -> Tensor:
        """Weights of one input as one, in the dtype of the products."""
        parts = [self.given[name] for name in names]
        if len(parts) == 1:
            return parts[0].to(self.known.dtype)
        out = torch.empty((sum(map(len, parts)), parts[0].shape[1]), dtype=self.known.dtype)
        for part, place in zip(parts, out.split([len(part) for part in parts]), strict=True):
            place.copy_(part)
        return out

    def product(self, names: Sequence[str], x: Tensor) -> Tensor:
        weight = self.joined(names).t()
        biases = [self.given[f"{name}_bias"] for name in names]
        if all(bias is None for bias in biases):
            return torch.mm(x, weight)
        widths = [len(self.given[name]) for name in names]
        every = [torch.zeros(n) if b is None else b for n, b in zip(widths, biases, strict=True)]
        return torch.addmm(torch.cat(every).to(x.dtype), x, weight)

    def below(self, names: Sequence[str], above: Tensor) -> Tensor:
        """The gradient by what a product read, from that by what it gave."""
        return torch.mm(above, self.joined(names))

    def learn(self, names: Sequence[str], above: Tensor, read: Tensor) -> None:
        """Gradients of a product's weights."""
        widths, biases = [len(self.given[name]) for name in names], [f"{n}_bias" for n in names]
        if any(self.wants[name] for name in names):
            self._keep(names, torch.mm(above.t(), read).split(widths))
        if any(self.wants[name] for name in biases):
            self._keep(biases, above.sum(0, dtype=torch.float32).split(widths))

    def norm_grad(self, name: str, x: Tensor, scale: Tensor, grad: Tensor, beside: Tensor):
        """By the rows of a norm, with the gradient that came beside it: in fp32, in the dtype of
        the products; and what the norm gave."""
        weight = self.given[name]
        out, narrow, again = torch.empty_like(x), torch.empty_like(grad), torch.empty_like(grad)
        by_weight = torch.empty_like(weight) if self.wants[name] else None
        given = (pointer(t) for t in (grad, beside, out, narrow, by_weight, again))
        task = _task(x, weight, scale, 0.0, grad.dtype)
        core().rms_norm_grad(task, *given, DTYPES[grad.dtype], threads())
        if by_weight is not None:
            self.found[name] = by_weight
        return out, narrow, again

    def _keep(self, names: Sequence[str], parts: Sequence[Tensor]) -> None:
        for name, part in zip(names, parts, strict=True):
            if self.wants[name]:
                self.found[name] = torch.empty(part.shape).copy_(part)

    def heads(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Heads, Heads, Heads]:
        parts = qkv.split([len(self.w.q), len(self.w.k), len(self.w.v)], 1)
        q, k, v = (part.unflatten(1, (-1, self.known.size)) for part in parts)
        return Heads(q, cos, sin), Heads(k, cos, sin), Heads(v)


def _task(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype):
    kinds = DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[dtype]
    return core().NormTask(pointer(x), pointer(weight), pointer(scale), *x.shape, *kinds, eps)


def _normed(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype):
    """The norm of x + delta, the sum, and 1 / rms of its rows."""
    y, scale = torch.empty(x.shape, dtype=dtype), torch.empty(len(x))
    total = x if delta is None else torch.empty_like(x)
    added = (0, 0, 0) if delta is None else (pointer(delta), pointer(total), DTYPES[delta.dtype])
    core().rms_norm(_task(x, weight, scale, eps, dtype), *added, pointer(y), threads())
    return y, total, scale


def _swiglu_grad(both: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """By gate and up, (L, 2 F), and what they gave, (L, F)."""
    rows, width = grad.shape
    out, again, step = torch.empty_like(both), torch.empty_like(grad), width * both.element_size()
    gate, into = both.data_ptr(), out.data_ptr()
    task = core().GateTask(gate, gate + step, rows, width, 2 * width, DTYPES[both.dtype])
    given = pointer(grad), into, into + step, pointer(again), 2 * width
    core().swiglu_grad(task, *given, threads())
    return out, again
