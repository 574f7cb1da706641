"""A decoder on the CPU from embedded tokens to last hidden states and back, without a graph: layers
of one call each way (native_decoder.py), norm. A small model's graph takes a tenth as long as its
kernels. Legend: L tokens of width D, A of them asked for (or all), V words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from reasonrl.kernels.decoder import Known
from reasonrl.kernels.native import core, pointer, threads
from reasonrl.kernels.native_decoder import (
    Given,
    Held,
    Scratch,
    held_layer,
    held_layer_grad,
    holds,
)


class Chain:
    """One pass each way. Its tensors are fp32 and contiguous, and stay what they are from `forward`
    to `backward`."""

    def __init__(
        self,
        ids: Tensor,  # (L,) int64
        x: Tensor,  # (L, D), rows of the table
        table: Tensor,  # (V, D)
        turn: tuple[Tensor, Tensor],  # cos and sin (L, d)
        layers: Sequence[tuple[Sequence, Given]],  # what decoder.Known holds, and its weights
        norm: Tensor,  # (D,)
        eps: float,
        padding: int = -1,  # the word that learns nothing
        asked: Tensor | None = None,  # (A,) int64, ascending
    ):
        self.ids, self.x, self.table, self.turn = ids, x, table, turn
        self.layers = [(Known(*known), given) for known, given in layers]
        self.norm, self.eps, self.padding, self.asked = norm, eps, padding, asked
        self.held: list[Held] = []
        self.scratch = Scratch()

    def takes(self) -> bool:
        """Whether every layer is one call."""
        return all(holds(len(self.ids), known.dtype, given) for known, given in self.layers)

    def forward(self, each: Callable[[], None]) -> Tensor:  # (A, D)
        """each: called before each layer, as in `backward`."""
        x = self.x
        for i, (known, given) in enumerate(self.layers, 1):
            each()
            asked = self.asked if i == len(self.layers) else None
            x, held = held_layer(x, *self.turn, known, asked, given, self.scratch)
            self.held.append(held)
        self.last, y, self.scale = x, torch.empty_like(x), torch.empty(len(x))
        core().rms_norm(self._norm_task(), 0, 0, 0, pointer(y), threads())
        return y

    def backward(
        self, grad: Tensor, learn: Callable[[Tensor, Tensor], None], each: Callable[[], None]
    ) -> None:
        """learn(weight, its gradient) for all that require one, from the last layer's on; what a
        layer kept is let go with it."""
        grad, out = grad.contiguous(), torch.empty_like(grad)
        by_norm = torch.empty_like(self.norm) if self.norm.requires_grad else None
        places = pointer(grad), 0, pointer(out), 0, pointer(by_norm), 0
        core().rms_norm_grad(self._norm_task(), *places, 0, threads())
        if by_norm is not None:
            learn(self.norm, by_norm)
        while self.held:
            each()
            held = self.held.pop()
            wants = [w is not None and w.requires_grad for w in held.given]
            out, found = held_layer_grad(held, out, wants, self.scratch)
            for weight, part in zip(held.given, found, strict=True):
                if weight is not None and part is not None:
                    learn(weight, part)
        if self.table.requires_grad:
            self._learn_words(out, learn)

    def _learn_words(self, grad: Tensor, learn: Callable[[Tensor, Tensor], None]) -> None:
        """Onto what the table has learnt already, as a head's words: no second one is made."""
        known = self.table.grad
        if known is None:
            given = self.ids, len(self.table), self.padding, False
            return learn(self.table, torch.ops.aten.embedding_dense_backward(grad, *given))
        if self.padding >= 0:
            grad.masked_fill_((self.ids == self.padding)[:, None], 0.0)
        known.index_add_(0, self.ids, grad)

    def _norm_task(self):
        x, scale = pointer(self.last), pointer(self.scale)
        return core().NormTask(x, pointer(self.norm), scale, *self.last.shape, 0, 0, 0, self.eps)
