"""The products of linear layers that learn (products.py) by csrc/cpu/linear.cpp, on CPUs where it
is at least as fast as torch's: fp32 and bf16 with AVX-512. Gradients of weights are summed in fp32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from reasonrl.kernels.native import DTYPES, core, threads
from reasonrl.kernels.products import Products


class NativeProducts(Products):
    """What is read is contiguous, and stands where torch puts it: bf16 is read in pairs."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inputs, self.outputs = self.weights[0].shape[1], sum(self.widths)
        given = zip(self.weights, self.widths, self.biases, strict=True)
        parts = [(w.data_ptr(), n, 0 if b is None else b.data_ptr()) for w, n, b in given]
        self.task = core().LinearTask(parts, self.tokens, self.inputs, DTYPES[self.dtype])

    def forward(self, x: Tensor) -> Tensor:
        out = x.new_empty((self.tokens, self.outputs))
        core().linear(self.task, x.data_ptr(), out.data_ptr(), threads())
        return out

    def by_input(self, grad: Tensor) -> Tensor:
        out = grad.new_empty((self.tokens, self.inputs))
        core().linear_by_input(self.task, grad.data_ptr(), out.data_ptr(), threads())
        return out

    def by_weight(self, grad: Tensor, x: Tensor) -> Tensor:
        out = torch.empty((self.outputs, self.inputs))
        given = grad.data_ptr(), x.data_ptr(), out.data_ptr()
        core().linear_by_weight(self.task, *given, threads())
        return out


def products(
    weights: Sequence[Tensor], biases: Sequence[Tensor | None], tokens: int, dtype: torch.dtype
) -> Products:
    """By whichever is faster here."""
    outputs, inputs = sum(weight.shape[0] for weight in weights), weights[0].shape[1]
    even = outputs % 2 == inputs % 2 == 0
    ours = fast(core().isa(), dtype) and tokens and (even or dtype == torch.float32)
    return (NativeProducts if ours else Products)(weights, biases, tokens, dtype)


@cache
def fast(isa: str, dtype: torch.dtype) -> bool:
    """Tiles of another kind (AMX) are torch's."""
    if isa != "avx512" or dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or (core().has_dots() and not torch.cpu._is_amx_tile_supported())
