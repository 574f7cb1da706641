"""The products of linear layers that learn and read one input, by torch.

Weights (n, D) are fp32 and count as one (N, D), each with a bias (n,) or None; they are cast to the
products' dtype each time, so that no second set stands in memory. Legend: L tokens of width D, N
outputs in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Products:
    weights: Sequence[Tensor]
    biases: Sequence[Tensor | None]
    tokens: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        self.widths = [weight.shape[0] for weight in self.weights]

    def forward(self, x: Tensor) -> Tensor:  # (L, D) -> (L, N)
        weight = self._joined().t()
        if all(bias is None for bias in self.biases):
            return torch.mm(x, weight)
        pairs = zip(self.widths, self.biases, strict=True)
        every = [self.weights[0].new_zeros(n) if b is None else b for n, b in pairs]
        return torch.addmm(torch.cat(every).to(x.dtype), x, weight)

    def by_input(self, grad: Tensor) -> Tensor:  # (L, N) -> (L, D)
        return torch.mm(grad, self._joined())

    def by_weight(self, grad: Tensor, x: Tensor) -> Tensor:  # (L, N), (L, D) -> (N, D) fp32
        """Summed over the tokens; a GPU rounds half types once, to fp32."""
        if grad.is_cuda and grad.dtype != torch.float32:
            return torch.mm(grad.t(), x, out_dtype=torch.float32)
        return torch.mm(grad.t(), x).to(torch.float32)

    def _joined(self) -> Tensor:
        if len(self.weights) == 1:
            return self.weights[0].to(self.dtype)
        shape = sum(self.widths), self.weights[0].shape[1]
        out = self.weights[0].new_empty(shape, dtype=self.dtype)
        torch._foreach_copy_(out.split(self.widths), list(self.weights))
        return out
