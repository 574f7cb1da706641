"""Linear layers while nobody learns: weights are cast to the compute dtype once, on a CPU packed
as oneDNN reads them, and those of one input are joined where a module of `cpu_layers`, or on a GPU
a decoder without modules (`lean`), reads them so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reasonrl import cpu_layers, gpu_layers

HALF = (torch.bfloat16, torch.float16)
PACKED = 1 << 16  # numbers of an fp32 weight from which packing pays


@contextlib.contextmanager
def prepared(model: nn.Module, compute: torch.dtype) -> Iterator[None]:
    """The model's linear layers are; its parameters stay as they are."""
    layers = [m for m in model.modules() if type(m) is nn.Linear]
    if compute == torch.float32:
        layers = [m for m in layers if _packs(m.weight, torch.float32)]
    joined = _joinable(model, compute)
    together = {id(part) for _, parts in joined for part in parts}
    layers = [m for m in layers if id(m) not in together]
    packed, cast = {}, Cast(compute)
    try:
        for module, parts in joined:
            one = Joined(parts, compute)
            setattr(module, "joined", one)  # noqa: B010
            if not one.packed:  # else the module reads the whole
                for part, how in zip(parts, one.parts(cast), strict=True):
                    setattr(part, "forward", how)  # noqa: B010
        for layer in layers:
            setattr(layer, "forward", _prepared(layer, cast, packed))  # noqa: B010
        yield
    finally:
        for module, parts in joined:
            module.__dict__.pop("joined", None)
            for part in parts:
                part.__dict__.pop("forward", None)
        for layer in layers:
            layer.__dict__.pop("forward", None)


def _joinable(model: Any, compute: torch.dtype) -> list[tuple[nn.Module, list[nn.Linear]]]:
    """Modules with the layers of one input that are joined: on a CPU where all are packed, on a GPU
    where weights are cast anyway and the decoder is one that reads them so."""
    first = next(model.parameters(), None)
    if first is not None and first.is_cuda:
        decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
        fits = compute in HALF and decoder is not None and gpu_layers.lean(decoder)
        return gpu_layers.joinable(decoder) if fits else []
    found = cpu_layers.joinable(model)
    return [one for one in found if all(_packs(part.weight, compute) for part in one[1])]


class Cast:
    """A tensor in the compute dtype; the last one is kept, for layers that share their input."""

    def __init__(self, dtype: torch.dtype):
        self.dtype, self.known, self.out = dtype, None, torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        if self.known is None or self.known[0] is not x or self.known[1] != x._version:
            self.known, self.out = (x, x._version), x.to(self.dtype)
        return self.out


def _prepared(layer: nn.Linear, cast: Cast, packed: dict[int, Tensor]):
    dtype = cast.dtype
    key = layer.weight.data_ptr()  # tied or shared weights are prepared once
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    if key not in packed:
        weight = layer.weight.detach().to(dtype)
        if _packs(weight, dtype):
            weight = torch.ops.mkldnn._reorder_linear_weight(weight)
        packed[key] = weight
    weight = packed[key]
    if weight.is_mkldnn:
        linear = torch.ops.mkldnn._linear_pointwise
        return lambda x: linear(cast(x), weight, bias, "none", [], "")
    return partial(_linear, cast, weight, bias)


class Joined:
    """Linear layers of one input as one product; called, it gives each its part, as views."""

    def __init__(self, parts: Sequence[nn.Linear], dtype: torch.dtype):
        self.dtype, self.widths = dtype, [part.out_features for part in parts]
        weight = torch.cat([part.weight.detach().to(dtype) for part in parts])
        self.packed = _packs(weight, dtype)
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self.packed else weight
        biases = [part.bias for part in parts if part.bias is not None]
        self.bias = torch.cat([b.detach().to(dtype) for b in biases]) if biases else None
        self.linear = torch.ops.mkldnn._linear_pointwise

    def product(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        if not self.packed:
            return nn.functional.linear(x, self.weight, self.bias)
        return self.linear(x, self.weight, self.bias, "none", [], "")

    def parts(self, cast: Cast) -> Iterator[Callable[[Tensor], Tensor]]:
        """Each layer's own product, by its rows of the joined weight."""
        biases = [None] * len(self.widths) if self.bias is None else self.bias.split(self.widths)
        for weight, bias in zip(self.weight.split(self.widths), biases, strict=True):
            yield partial(_linear, cast, weight, bias)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.product(x).split(self.widths, -1)


def _linear(cast: Cast, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return nn.functional.linear(cast(x), weight, bias)


def _packs(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN takes this weight packed here (bf16 needs AVX-512) and is faster for it: in
    fp32, for a few rows, up to twice as fast as torch's own product, but not with a small weight.
    """
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and weight.numel() >= PACKED
