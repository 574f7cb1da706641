"""One new token a row through a decoder on a CPU, without its modules.

A token of a small model is hundreds of small calls. Where every layer is of known build, nobody
listens to one (hooks), and the products stand ready (`Policy.inference`), a layer is four products
and four kernels: norm with the residual; q, k and v; rotary embedding and attention over the slots;
its product; norm with the residual; gate and up; SwiGLU; its product. The numbers are the modules'.
Shapes: B rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from reasonrl import cpu_layers
from reasonrl.implementations import native
from reasonrl.models import Policy
from reasonrl.slots import Slots

Product = Callable[[Tensor], Tensor]
Norm = tuple[Tensor, float]  # weight, eps


@dataclass(frozen=True)
class Layer:
    norms: tuple[Norm, Norm]
    qkv: Product
    out: Product
    both: Product  # gate and up
    down: Product
    index: int
    scaling: float


class Decoder:
    """`Policy.hidden` of one token a row whose prompt's keys and values are in the slots."""

    def __init__(self, decoder: Any, layers: list[Layer], dtype: torch.dtype):
        self.decoder, self.layers, self.dtype = decoder, layers, dtype
        self.attend, self.swiglu = native("turned_slot_attention"), native("joined_swiglu")
        self.norm, self.add_norm = native("rms_norm"), native("add_rms_norm_")

    def __call__(self, ids: Tensor, position: Tensor, slots: Slots) -> Tensor:
        """(B,), (B,) -> (B, D)."""
        x: Tensor = self.decoder.embed_tokens(ids)
        delta = torch.empty(0)
        cos, sin = (a[0] for a in self.decoder.rotary_emb(x[None], position[None]))
        for n, layer in enumerate(self.layers):
            first, second = layer.norms
            if n == 0:
                y = self.norm(x, *first, self.dtype)
            else:
                y = self.add_norm(x, delta, *first, self.dtype)
            keys, values = slots.cache[layer.index]
            seen = self.attend(layer.qkv(y), cos, sin, keys, values, slots.length, layer.scaling)
            y = self.add_norm(x, layer.out(seen), *second, self.dtype)
            delta = layer.down(self.swiglu(layer.both(y)))
        weight, eps = cpu_layers.parts_of(self.decoder.norm)
        return self.add_norm(x, delta, weight, eps, torch.promote_types(weight.dtype, x.dtype))


def of(policy: Policy) -> Callable[[Tensor, Tensor, Slots], Tensor]:
    """The decoder without its modules where it fits, inside of `policy.inference()`; else
    `policy.hidden`."""
    decoder: Any = policy.model.get_decoder()
    if not cpu_layers.lean(decoder):
        return policy.hidden
    if decoder.embed_tokens.weight.dtype not in (torch.float32, policy.compute):
        return policy.hidden
    return Decoder(decoder, [_layer(layer) for layer in decoder.layers], policy.compute)


def _layer(layer: Any) -> Layer:
    attn, mlp = layer.self_attn, layer.mlp
    first, second = layer.input_layernorm, layer.post_attention_layernorm
    norms = cpu_layers.parts_of(first), cpu_layers.parts_of(second)
    products = attn.joined.product, attn.o_proj.forward, mlp.joined.product, mlp.down_proj.forward
    return Layer(norms, *products, attn.layer_idx, attn.scaling)
