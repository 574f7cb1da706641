"""A decoder on the CPU that makes new tokens in one call: its packed weights, its slots, the batch.

Shapes: S slots of W tokens, N rows, D hidden, K key heads of d, V words; R completions of at most
T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonrl.kernels.native import DTYPES, core, pointer, threads

Linear = tuple[Tensor, Tensor | None]  # weight (N, K), bias (N,)


@dataclass(frozen=True)
class PackedLinear:
    """Linear layers of one input, their outputs one after the other."""

    weight: Tensor  # int32, in panels
    bias: Tensor | None  # fp32, in the panels' order

    @property
    def pointers(self) -> tuple[int, int]:
        return pointer(self.weight), pointer(self.bias)


@dataclass(frozen=True)
class DecodeLayer:
    norms: tuple[Tensor, Tensor]  # (D,) before the attention, before the gate
    eps: tuple[float, float]
    scaling: float
    qkv: PackedLinear
    out: PackedLinear
    both: PackedLinear  # gate and up, `halves` of a panel
    down: PackedLinear


@dataclass(frozen=True)
class WholeDecoder:
    layers: Sequence[DecodeLayer]
    embedding: Tensor  # (V, D), in the residual's dtype
    norm: Tensor
    eps: float
    head: PackedLinear
    angles: tuple[Tensor, Tensor]  # cos and sin (positions, d)
    sizes: tuple[int, int, int, int, int, int]  # D, inner, query heads, K, d, V
    dtype: torch.dtype  # of products and slots
    dots: bool = True  # False: without the instruction for pairs of bf16

    def holding(self, slots: Sequence[Tensor]) -> Any:
        """The kernel's view of itself with slots (2, S, K, W, d) for the keys and values of each
        layer; all must live as long as it."""
        layers = [
            core().DecodeLayer(
                [
                    *map(pointer, layer.norms),
                    *layer.qkv.pointers, *layer.out.pointers,
                    *layer.both.pointers, *layer.down.pointers,
                    *map(pointer, slot),
                ],
                [*layer.eps, layer.scaling],
            )
            for layer, slot in zip(self.layers, slots, strict=True)
        ]  # fmt: skip
        kinds = self.dtype, self.embedding.dtype, self.norm.dtype, self.angles[0].dtype
        given = pointer(self.embedding), pointer(self.norm), *self.head.pointers
        return core().DecodeModel(
            layers, [*given, *map(pointer, self.angles)], self.eps,
            [*self.sizes, slots[0].shape[3]], [DTYPES[kind] for kind in kinds], self.dots,
        )  # fmt: skip

    def logits(
        self,
        held: Any,  # self.holding(slots)
        token: Tensor,  # (N,) int64
        slot: Tensor,  # (N,) int64
        length: Tensor,  # (N,) int64, tokens of its slot before it
        asked: Tensor,  # (N,) bool
        together: bool,  # some slots have several of the tokens, in order
    ) -> Tensor:  # (asked rows, V)
        """Places tokens in their slots; logits of what follows those that are asked."""
        out = torch.empty((int(asked.sum()), self.sizes[-1]), dtype=self.dtype)
        given = [pointer(x) for x in (token, slot, length, asked)]
        core().decode_logits(held, given, len(token), together, pointer(out), threads())
        return out


def pack_linear(parts: Sequence[Linear], dtype: torch.dtype, halves: bool = False) -> PackedLinear:
    """Weights and biases as `dtype` holds them; halves: two of one shape, side by side."""
    inputs, outputs = parts[0][0].shape[1], [len(weight) for weight, _ in parts]
    most = 2 * lanes_up(outputs[0]) if halves else sum(outputs)
    weight = torch.zeros(core().packed_words(DTYPES[dtype], inputs, most), dtype=torch.int32)
    bias = None
    if any(b is not None for _, b in parts):
        bias = torch.zeros(core().packed_words(0, 1, most))
    first = 0
    for i, (w, b) in enumerate(parts):
        known = first, i if halves else -1
        _pack(w.detach().contiguous(), weight, dtype, known)
        if b is not None and bias is not None:
            column = b.detach().to(dtype).float()[:, None].contiguous()
            _pack(column, bias, torch.float32, known)
        first += len(w)
    return PackedLinear(weight, bias)


def lanes_up(outputs: int) -> int:
    """Outputs in whole halves of a panel."""
    half = core().packed_words(0, 1, 1) // 2
    return -(-outputs // half) * half


def _pack(weight: Tensor, out: Tensor, dtype: torch.dtype, known: tuple[int, int]) -> None:
    first, half = known
    kinds = DTYPES[weight.dtype], DTYPES[dtype]
    core().pack(pointer(weight), pointer(out), *weight.shape, first, *kinds, half, threads())


@dataclass(frozen=True)
class DecodeBatch:
    """What goes on from token to token, written in place."""

    token: Tensor  # (S,) int64
    length: Tensor  # (S,) int64
    row: Tensor  # (S,) int64, the completion in a slot
    done: Tensor  # (S,) bool
    uniform: Tensor  # (R, T) float64 in [0, 1)
    tokens: Tensor  # (R, T + 1) int64
    count: Tensor  # (R,) int64
    logp: Tensor  # (R, T + 1) fp32
    eos: Tensor  # (E,) int64

    def go_on(self, held: Any, temperature: float, most: int, until: int) -> None:
        """Up to `most` tokens for every slot that is not done, while more than `until` are."""
        given = [pointer(x) for x in vars(self).values()]
        sizes = [len(self.token), len(self.eos), self.uniform.shape[1]]
        state = core().DecodeState(given, sizes, temperature)
        core().decode_tokens(held, state, most, until, threads())
