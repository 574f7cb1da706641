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

from reasonrl import cpu_layers, lean_gpu
from reasonrl.implementations import native
from reasonrl.models import Policy
from reasonrl.slots import Slots

Product = Callable[[Tensor], Tensor]
Norm = tuple[Tensor, float, torch.dtype]  # weight, eps, dtype of the result


@dataclass(frozen=True)
class Layer:
    qkv: Product
    out: Product
    norm: Norm
    both: Product  # gate and up
    down: Product
    after: Norm  # the next layer's first, or the decoder's own
    index: int
    scaling: float


class Decoder:
    """`Policy.hidden` of one token a row whose prompt's keys and values are in the slots."""

    def __init__(self, decoder: Any, dtype: torch.dtype):
        self.decoder = decoder
        self.attend, self.swiglu = native("turned_slot_attention"), native("joined_swiglu")
        self.norm, self.add_norm = native("rms_norm"), native("add_rms_norm_")
        own, residual = decoder.norm.weight.dtype, decoder.embed_tokens.weight.dtype
        firsts = [_norm(layer.input_layernorm, dtype) for layer in decoder.layers]
        self.first, *later = *firsts, _norm(decoder.norm, torch.promote_types(own, residual))
        self.layers = [_layer(*each, dtype) for each in zip(decoder.layers, later, strict=True)]

    def __call__(self, ids: Tensor, position: Tensor, slots: Slots) -> Tensor:
        """(B,), (B,) -> (B, D)."""
        x: Tensor = self.decoder.embed_tokens(ids)  # the residual, added to in place
        cos, sin = (a[0] for a in self.decoder.rotary_emb(x[None], position[None]))
        y = self.norm(x, *self.first)
        for layer in self.layers:
            keys, values = slots.cache[layer.index]
            seen = self.attend(layer.qkv(y), cos, sin, keys, values, slots.length, layer.scaling)
            y = self.add_norm(x, layer.out(seen), *layer.norm)
            y = self.add_norm(x, layer.down(self.swiglu(layer.both(y))), *layer.after)
        return y


def of(policy: Policy) -> Callable[[Tensor, Tensor, Slots], Tensor]:
    """The decoder without its modules where it fits, inside of `policy.inference()`; else
    `policy.hidden`."""
    if policy.device.type == "cuda":
        return lean_gpu.decoder(policy) or policy.hidden
    decoder: Any = policy.model.get_decoder()
    if not cpu_layers.lean(decoder):
        return policy.hidden
    if decoder.embed_tokens.weight.dtype not in (torch.float32, policy.compute):
        return policy.hidden
    return Decoder(decoder, policy.compute)


def _norm(norm: Any, dtype: torch.dtype) -> Norm:
    return norm.weight, norm.variance_epsilon, dtype


def _layer(layer: Any, after: Norm, dtype: torch.dtype) -> Layer:
    attn, mlp = layer.self_attn, layer.mlp
    return Layer(
        attn.joined.product, attn.o_proj.forward, _norm(layer.post_attention_layernorm, dtype),
        mlp.joined.product, mlp.down_proj.forward, after, attn.layer_idx, attn.scaling,
    )  # fmt: skip
