"""A decoder on the CPU that makes new tokens in one call: its packed weights, its slots, the batch.

What the completions of a prompt share is kept once, what each has for itself in a slot of its own.
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
Kept = tuple[Tensor, Tensor]  # keys and values


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
    heads: tuple[Tensor | None, Tensor | None]  # (d,) of queries and keys before they are turned
    eps: tuple[float, float, float]  # of both norms, of the heads'
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

    def empty(self, slots: int, width: int) -> list[Kept]:
        """For every layer: the keys (S, K, panels, words) and values (S, K, W, d), d in whole
        vectors, of slots of at least so many tokens."""
        panel, (_, _, _, heads, size, _) = core().panel(), self.sizes
        panels = -(-width // panel)
        words = panel * (size if self.dtype == torch.float32 else (size + 1) // 2)
        wide = -(-size // (panel // 2)) * (panel // 2)
        shapes = (slots, heads, panels, words), (slots, heads, panels * panel, wide)
        kinds = torch.int32, self.dtype
        pairs = [[torch.empty(s, dtype=k) for s, k in zip(shapes, kinds, strict=True)]
                 for _ in self.layers]  # fmt: skip
        return [(keys, values) for keys, values in pairs]

    def holding(self, prompts: Sequence[Kept], own: Sequence[Kept]) -> Any:
        """The kernel's view of itself with slots for prompts and for what follows them; all must
        live as long as it."""
        layers = [
            core().DecodeLayer(
                [
                    *map(pointer, (*layer.norms, *layer.heads)),
                    *layer.qkv.pointers, *layer.out.pointers,
                    *layer.both.pointers, *layer.down.pointers,
                    *map(pointer, shared), *map(pointer, mine),
                ],
                [*layer.eps, layer.scaling],
            )
            for layer, shared, mine in zip(self.layers, prompts, own, strict=True)
        ]  # fmt: skip
        kinds = self.dtype, self.embedding.dtype, self.norm.dtype, self.angles[0].dtype
        given = pointer(self.embedding), pointer(self.norm), *self.head.pointers
        rooms = (kept[0][1].shape[2] for kept in (prompts, own))
        return core().DecodeModel(
            layers, [*given, *map(pointer, self.angles)], self.eps,
            [*self.sizes, *rooms], [DTYPES[kind] for kind in kinds], self.dots,
        )  # fmt: skip

    def logits(
        self,
        held: Any,  # self.holding(prompts, own)
        token: Tensor,  # (N,) int64, those of one prompt beside each other
        home: Tensor,  # (N,) int64, the prompt's slot
        seen: Tensor,  # (N,) int64, tokens of the prompt that it sees: itself too, if it is one
        slot: Tensor | None,  # (N,) int64, the completion's slot; None: these are prompts, in order
        position: Tensor,  # (N,) int64, tokens before it
        asked: Tensor,  # (N,) bool
    ) -> Tensor:  # (asked rows, V)
        """Keeps the tokens; logits of what follows those that are asked."""
        out = torch.empty((int(asked.sum()), self.sizes[-1]), dtype=self.dtype)
        given = [pointer(x) for x in (token, home, seen, slot, position, asked)]
        core().decode_logits(held, given, len(token), pointer(out), threads())
        return out


def pack_linear(parts: Sequence[Linear], dtype: torch.dtype, halves: bool = False) -> PackedLinear:
    """Weights and biases as `dtype` holds them; halves: two of one shape, side by side."""
    bias = None
    if any(b is not None for _, b in parts):
        known = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in parts]
        bias = _packed([b.to(dtype).float()[:, None] for b in known], torch.float32, halves)
    weight = _packed([w.detach() for w, _ in parts], dtype, halves)
    return PackedLinear(weight, None if bias is None else bias.view(torch.float32))


def _packed(weights: Sequence[Tensor], dtype: torch.dtype, halves: bool) -> Tensor:
    weights = [weight.contiguous() for weight in weights]
    outputs, inputs = [weight.shape[0] for weight in weights], weights[0].shape[1]
    half = core().panel() // 2
    most = -(-outputs[0] // half) * 2 * half if halves else sum(outputs)
    out = torch.empty(core().packed_words(DTYPES[dtype], inputs, most), dtype=torch.int32)
    parts = [(w.data_ptr(), n, DTYPES[w.dtype]) for w, n in zip(weights, outputs, strict=True)]
    core().pack(parts, pointer(out), inputs, DTYPES[dtype], halves, threads())
    return out


@dataclass(frozen=True)
class DecodeBatch:
    """What goes on from token to token, written in place."""

    token: Tensor  # (S,) int64
    length: Tensor  # (S,) int64, tokens kept of the completion
    row: Tensor  # (S,) int64, the completion
    home: Tensor  # (S,) int64, the slot of its prompt
    prompt: Tensor  # (S,) int64, the prompt's tokens
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
