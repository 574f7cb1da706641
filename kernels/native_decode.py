"""A decoder on the CPU that makes new tokens in one call: its packed weights, its slots, the batch.

What the completions of a prompt share is kept once, what each has for itself in a slot of its own.
Shapes: S slots of W tokens, N rows, D hidden, K key heads of d, V words; R completions of at most
T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonrl.kernels.native import DTYPES, core, pointer, threads

Linear = tuple[Tensor, Tensor | None]  # weight (N, K), bias (N,)
Kept = tuple[Tensor, Tensor]  # keys and values of all layers


class PackedLinear(NamedTuple):
    """Linear layers of one input, their outputs one after the other."""

    weight: Tensor  # int32, in panels
    bias: Tensor | None  # fp32, in the panels' order

    @property
    def pointers(self) -> tuple[int, int]:
        return pointer(self.weight), pointer(self.bias)


class DecodeLayer(NamedTuple):
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

    def empty(self, slots: int, width: int) -> Kept:
        """Of every layer the keys (L, S, K, panels, words) and values (L, S, K, W, d), d in whole
        vectors, of slots of at least so many tokens."""
        panel, (_, _, _, heads, size, _) = core().panel(), self.sizes
        panels, depth = -(-width // panel), len(self.layers)
        words = panel * (size if self.dtype == torch.float32 else (size + 1) // 2)
        wide = -(-size // (panel // 2)) * (panel // 2)
        keys = torch.empty(depth, slots, heads, panels, words, dtype=torch.int32)
        return keys, torch.empty(depth, slots, heads, panels * panel, wide, dtype=self.dtype)

    def holding(self, prompts: Kept, own: Kept) -> Any:
        """The kernel's view of itself with slots for prompts and for what follows them; all must
        live as long as it."""
        slots = (*prompts, *own)
        first = [pointer(kept) for kept in slots]
        apart = [kept.stride(0) * kept.element_size() for kept in slots]
        layers = [
            core().DecodeLayer(
                [
                    *map(pointer, (*layer.norms, *layer.heads)),
                    *layer.qkv.pointers, *layer.out.pointers,
                    *layer.both.pointers, *layer.down.pointers,
                    *(at + i * step for at, step in zip(first, apart, strict=True)),
                ],
                [*layer.eps, layer.scaling],
            )
            for i, layer in enumerate(self.layers)
        ]  # fmt: skip
        kinds = self.dtype, self.embedding.dtype, self.norm.dtype, self.angles[0].dtype
        given = pointer(self.embedding), pointer(self.norm), *self.head.pointers
        return core().DecodeModel(
            layers, [*given, *map(pointer, self.angles)], self.eps,
            [*self.sizes, prompts[1].shape[3], own[1].shape[3]], [DTYPES[x] for x in kinds],
            self.dots,
        )  # fmt: skip

    def prompts(
        self, held: Any, prompts: Sequence[Sequence[int]], homes: Sequence[int]
    ) -> Tensor:  # (P, V)
        """Keeps prompts in slots of theirs; logits of what follows each."""
        out = torch.empty((len(prompts), self.sizes[-1]), dtype=self.dtype)
        core().decode_prompts(held, prompts, homes, pointer(out), threads())
        return out

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


def pack_linears(
    products: Sequence[tuple[Sequence[Linear], bool]], dtype: torch.dtype
) -> list[PackedLinear]:
    """Weights and biases of linear layers of one input as `dtype` holds them, for each of these
    products; True: two of one shape, side by side."""
    weights = _packed([([w for w, _ in parts], halves) for parts, halves in products], dtype)
    biased = [i for i, (parts, _) in enumerate(products) if any(b is not None for _, b in parts)]
    biases: list[Tensor | None] = [None] * len(products)
    if biased:
        known = [(_columns(products[i][0], dtype), products[i][1]) for i in biased]
        for i, bias in zip(biased, _packed(known, torch.float32), strict=True):
            biases[i] = bias.view(torch.float32)
    return [*map(PackedLinear, weights, biases)]


def _columns(parts: Sequence[Linear], dtype: torch.dtype) -> list[Tensor]:
    """Biases as weights of one input."""
    known = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in parts]
    return [b.to(dtype).float()[:, None] for b in known]


def _packed(
    products: Sequence[tuple[Sequence[Tensor], bool]], dtype: torch.dtype
) -> Sequence[Tensor]:
    """One after the other in memory."""
    kind, given = DTYPES[dtype], []
    products = [([w.contiguous() for w in weights], halves) for weights, halves in products]
    for weights, halves in products:
        parts = [(w.data_ptr(), w.shape[0], DTYPES[w.dtype]) for w in weights]
        given.append((parts, weights[0].shape[1], halves))
    sizes = core().packed_words(given, kind)
    out = torch.empty(sum(sizes), dtype=torch.int32)
    core().pack(given, pointer(out), kind, threads())
    return out.split(sizes)


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

    def enter(
        self,
        held: Any,
        prompts: Sequence[Sequence[int]],
        homes: Sequence[int],
        at: Sequence[int],
        first: int,
        temperature: float,
    ) -> None:
        """Prompts into slots of theirs; completions first, first + 1, ..., as many of each, and
        their first tokens into the slots `at`."""
        core().decode_enter(held, self._state(temperature), prompts, homes, at, first, threads())

    def go_on(self, held: Any, temperature: float, most: int, until: int) -> None:
        """Up to `most` tokens for every slot that is not done, while more than `until` are."""
        core().decode_tokens(held, self._state(temperature), most, until, threads())

    def _state(self, temperature: float) -> Any:
        given = [pointer(x) for x in vars(self).values()]
        sizes = [len(self.token), len(self.eos), self.uniform.shape[1]]
        return core().DecodeState(given, sizes, temperature)
