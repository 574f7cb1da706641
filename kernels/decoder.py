"""A decoder layer as one function, forward and backward: torch's matrix products, kernels of ours
between them (`Between`: a CPU's or a GPU's).

    s = x + o(attention(q, k, v of n1(x))),  y = s + down(silu(gate) up of n2(s))

q, k, v and gate, up are one product each, of weights that are cast and joined a layer at a time,
again in the backward. Kept for the gradient: x, s, q k v, what attention keeps and what it saw,
gate and up; what the norms and SwiGLU gave is made again on the way back.
Legend: L tokens of width D, H query and K key heads of size d, F wide inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

QKV, OUT, BOTH, DOWN = ("q", "k", "v"), ("o",), ("gate", "up"), ("down",)
BIASES = [f"{name}_bias" for name in (*QKV, *OUT, *BOTH, *DOWN)]
HEADS = ["q_norm", "k_norm"]  # (d,) both, where q's and k's heads are normed before they are turned
Norms = Sequence[Tensor]  # of HEADS, or none


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


NAMES = (*Weights._fields, *BIASES, *HEADS)


class Known(NamedTuple):
    size: int  # d
    eps: tuple[float, float, float]  # of both norms, and of the heads'
    scaling: float
    dtype: torch.dtype  # of the products
    packing: Any  # where the tokens stand: blocks of `places` on a CPU, calls.Calls on a GPU


class Turn(NamedTuple):
    """What turns q and k."""

    cos: Tensor  # (L, d)
    sin: Tensor  # (L, d)


class Between(NamedTuple):
    """What stands between the products. Heads are (L, (H + 2 K) d): q, k, v side by side."""

    # x, delta or None, weight, eps, dtype -> norm of x + delta, x + delta, 1 / rms of its rows
    norm: Callable[..., tuple[Tensor, Tensor, Tensor]]
    # x, weight, scale, grad, beside, learnt -> by x in its dtype and in grad's, the norm, by weight
    norm_grad: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor | None]]
    gate: Callable[[Tensor], Tensor]  # (L, 2 F) -> (L, F)
    gate_grad: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]  # by both, and what `gate` gave
    # heads, turn, known, key heads, norms -> what was seen (L, H d), what to keep
    attend: Callable[..., tuple[Tensor, Sequence[Tensor]]]
    # gradient, heads, what was seen, what was kept, turn, known, key heads, norms, whether these
    # learn -> by the heads, by the norms
    attend_grad: Callable[..., tuple[Tensor, Sequence[Tensor | None]]]


class DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, known, between, *given):
        layer, turn = Layer(known, given), Turn(cos, sin)
        y, _, scale1 = between.norm(x, None, layer.w.norm1, known.eps[0], known.dtype)
        qkv = layer.product(QKV, y)
        seen, extra = between.attend(qkv, turn, known, layer.key_heads, layer.norms)
        delta = layer.product(OUT, seen)
        y, total, scale2 = between.norm(x, delta, layer.w.norm2, known.eps[1], known.dtype)
        both = layer.product(BOTH, y)
        down = layer.product(DOWN, between.gate(both))
        ctx.known, ctx.between, ctx.extra = known, between, len(extra)
        kept = x, cos, sin, total, scale1, scale2, qkv, seen, both
        ctx.save_for_backward(*kept, *extra, *given)
        return total + down

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, cos, sin, total, scale1, scale2, qkv, seen, both, *rest = ctx.saved_tensors
        known, between, turn = ctx.known, ctx.between, Turn(cos, sin)
        extra, given = rest[: ctx.extra], rest[ctx.extra :]
        layer = Layer(known, given, ctx.needs_input_grad[5:])
        grad = grad.contiguous()
        above = grad.to(known.dtype)
        by_both, read = between.gate_grad(both, layer.below(DOWN, above))
        layer.learn(DOWN, above, read)
        grad, above, read, layer.found["norm2"] = between.norm_grad(
            total, layer.w.norm2, scale2, layer.below(BOTH, by_both), grad, layer.wants["norm2"]
        )
        layer.learn(BOTH, by_both, read)
        layer.learn(OUT, above, seen)
        by_seen = layer.below(OUT, above)
        learnt = any(layer.wants[name] for name in HEADS)
        given = by_seen, qkv, seen, extra, turn, known, layer.key_heads, layer.norms, learnt
        by_qkv, by_norms = between.attend_grad(*given)
        layer.found |= zip(HEADS, by_norms, strict=True)
        grad, _, read, layer.found["norm1"] = between.norm_grad(
            x, layer.w.norm1, scale1, layer.below(QKV, by_qkv), grad, layer.wants["norm1"]
        )
        layer.learn(QKV, by_qkv, read)
        return grad, None, None, None, None, *(layer.found.get(name) for name in NAMES)


class Layer:
    """The products of a layer, and the gradients of their weights as they are found."""

    def __init__(self, known: Known, given: Sequence[Any], wants: Sequence[bool] = ()):
        self.known, self.w = known, Weights(*given[: len(Weights._fields)])
        self.given = dict(zip(NAMES, given, strict=True))
        self.wants = dict(zip(NAMES, wants, strict=False))
        self.key_heads = len(self.w.k) // known.size
        self.norms = [x for name in HEADS if (x := self.given[name]) is not None]
        self.found: dict[str, Tensor | None] = {}

    def joined(self, names: Sequence[str]) -> Tensor:
        """Weights of one input as one, in the dtype of the products."""
        parts = [self.given[name] for name in names]
        if len(parts) == 1:
            return parts[0].to(self.known.dtype)
        shape = sum(map(len, parts)), parts[0].shape[1]
        out = parts[0].new_empty(shape, dtype=self.known.dtype)
        torch._foreach_copy_(out.split([len(part) for part in parts]), parts)
        return out

    def product(self, names: Sequence[str], x: Tensor) -> Tensor:
        weight = self.joined(names).t()
        biases = [self.given[f"{name}_bias"] for name in names]
        if all(bias is None for bias in biases):
            return torch.mm(x, weight)
        widths = [len(self.given[name]) for name in names]
        every = [
            self.w.q.new_zeros(n) if b is None else b for n, b in zip(widths, biases, strict=True)
        ]
        return torch.addmm(torch.cat(every).to(x.dtype), x, weight)

    def below(self, names: Sequence[str], above: Tensor) -> Tensor:
        """The gradient by what a product read, from that by what it gave."""
        return torch.mm(above, self.joined(names))

    def learn(self, names: Sequence[str], above: Tensor, read: Tensor) -> None:
        """Gradients of a product's weights."""
        widths, biases = [len(self.given[name]) for name in names], [f"{n}_bias" for n in names]
        if any(self.wants[name] for name in names):
            self._keep(names, _outer(above, read).split(widths))
        if any(self.wants[name] for name in biases):
            self._keep(biases, above.sum(0, dtype=torch.float32).split(widths))

    def _keep(self, names: Sequence[str], parts: Sequence[Tensor]) -> None:
        for name, part in zip(names, parts, strict=True):
            if self.wants[name]:
                self.found[name] = part.to(torch.float32)


def _outer(above: Tensor, read: Tensor) -> Tensor:  # (L, N), (L, D) -> (N, D)
    """Summed over the tokens; a GPU rounds half types once, to fp32."""
    if above.is_cuda and above.dtype != torch.float32:
        return torch.mm(above.t(), read, out_dtype=torch.float32)
    return torch.mm(above.t(), read)
