"""A decoder layer as one function, forward and backward: matrix products (products.py), kernels of
ours between them (`Between`: a CPU's or a GPU's).

    s = x + o(attention(q, k, v of n1(x))),  y = s + down(silu(gate) up of n2(s))

q, k, v and gate, up are one product each. Kept for the gradient: x, s, q k v, what attention keeps
and what it saw, gate and up; what the norms and SwiGLU gave is made again on the way back.
Legend: L tokens of width D, H query and K key heads of size d, F wide inside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonrl.kernels.products import Products

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
    products: Callable[..., Products] = Products


def by_parts(x: Tensor, cos: Tensor, sin: Tensor, known: Known, between: Between, *given):
    """The layer of NAMES; what autocast would cast has its dtype already."""
    with torch.autocast(x.device.type, enabled=False):
        return DecoderLayer.apply(x, cos, sin, known, between, *given)


class DecoderLayer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, known, between, *given):
        layer, turn = Layer(known, between, len(x), given), Turn(cos, sin)
        y, _, scale1 = between.norm(x, None, layer.w.norm1, known.eps[0], known.dtype)
        qkv = layer.qkv.forward(y)
        seen, extra = between.attend(qkv, turn, known, layer.key_heads, layer.norms)
        delta = layer.out.forward(seen)
        y, total, scale2 = between.norm(x, delta, layer.w.norm2, known.eps[1], known.dtype)
        both = layer.both.forward(y)
        down = layer.down.forward(between.gate(both))
        ctx.known, ctx.between, ctx.extra = known, between, len(extra)
        kept = x, cos, sin, total, scale1, scale2, qkv, seen, both
        ctx.save_for_backward(*kept, *extra, *given)
        return total + down

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, cos, sin, total, scale1, scale2, qkv, seen, both, *rest = ctx.saved_tensors
        known, between, turn = ctx.known, ctx.between, Turn(cos, sin)
        extra, given = rest[: ctx.extra], rest[ctx.extra :]
        # weights that are gathered for a forward stand elsewhere in its backward
        layer = Layer(known, between, len(x), given, ctx.needs_input_grad[5:])
        grad = grad.contiguous()
        above = grad.to(known.dtype)
        by_both, read = between.gate_grad(both, layer.down.by_input(above))
        layer.learn(DOWN, layer.down, above, read)
        grad, above, read, layer.found["norm2"] = between.norm_grad(
            total, layer.w.norm2, scale2, layer.both.by_input(by_both), grad, layer.wants["norm2"]
        )
        layer.learn(BOTH, layer.both, by_both, read)
        layer.learn(OUT, layer.out, above, seen)
        by_seen = layer.out.by_input(above)
        learnt = any(layer.wants[name] for name in HEADS)
        given = by_seen, qkv, seen, extra, turn, known, layer.key_heads, layer.norms, learnt
        by_qkv, by_norms = between.attend_grad(*given)
        layer.found |= zip(HEADS, by_norms, strict=True)
        grad, _, read, layer.found["norm1"] = between.norm_grad(
            x, layer.w.norm1, scale1, layer.qkv.by_input(by_qkv), grad, layer.wants["norm1"]
        )
        layer.learn(QKV, layer.qkv, by_qkv, read)
        return grad, None, None, None, None, *(layer.found.get(name) for name in NAMES)


class Layer:
    """The products of a layer, and the gradients of their weights as they are found."""

    def __init__(
        self, known: Known, between: Between, tokens: int, given: Sequence[Any],
        wants: Sequence[bool] = (),
    ):  # fmt: skip
        self.w = Weights(*given[: len(Weights._fields)])
        self.given = dict(zip(NAMES, given, strict=True))
        self.key_heads = self.w.k.shape[0] // known.size
        self.norms = [x for name in HEADS if (x := self.given[name]) is not None]
        self.wants = dict(zip(NAMES, wants, strict=False))
        self.found: dict[str, Tensor | None] = {}

        def products(names: Sequence[str]) -> Products:
            parts = [self.given[name] for name in names]
            biases = [self.given[f"{name}_bias"] for name in names]
            return between.products(parts, biases, tokens, known.dtype)

        self.qkv, self.out = products(QKV), products(OUT)
        self.both, self.down = products(BOTH), products(DOWN)

    def learn(self, names: Sequence[str], of: Products, above: Tensor, read: Tensor) -> None:
        """Gradients of weights that have a product."""
        if any(self.wants[name] for name in names):
            self._keep(names, of.by_weight(above, read).split(of.widths))
        biases = [f"{name}_bias" for name in names]
        if any(self.wants[name] for name in biases):
            self._keep(biases, above.sum(0, dtype=torch.float32).split(of.widths))

    def _keep(self, names: Sequence[str], parts: Sequence[Tensor]) -> None:
        for name, part in zip(names, parts, strict=True):
            if self.wants[name]:
                self.found[name] = part
