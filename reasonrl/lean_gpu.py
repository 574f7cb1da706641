"""One new token a row through a decoder on a GPU, without its modules.

A layer is four products and five kernels: norm with the residual; q, k and v; turned, placed into
the slots and attended in one; its product; norm with the residual; gate and up; SwiGLU; its
product. Through its modules it is 38, of which most take longer to start than to run. The numbers
are the modules'. Shapes: B rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonrl import flash
from reasonrl.implementations import triton
from reasonrl.models import Policy
from reasonrl.slots import Slots


class Layer(NamedTuple):
    qkv: Callable[[Tensor], Tensor]
    norms: tuple[Tensor, ...]  # of q's heads and of k's, or none
    eps: float
    out: Callable[[Tensor], Tensor]
    norm: tuple[Tensor, float, torch.dtype]  # weight, eps, dtype of the result
    both: Callable[[Tensor], Tensor]  # gate and up
    down: Callable[[Tensor], Tensor]
    after: tuple[Tensor, float, torch.dtype]  # the next layer's first, or the decoder's own
    index: int
    scaling: float


class Decoder:
    """`Policy.hidden` of one token a row whose prompt's keys and values are in the slots."""

    def __init__(self, decoder: Any, dtype: torch.dtype):
        self.decoder = decoder
        self.attend, self.gate = triton("place_and_attend"), triton("gate")
        self.norm, self.draw = (
            triton("add_rms_norm_"),
            triton("draw"),
        )  # the token's, by decoding.py
        own, residual = decoder.norm.weight.dtype, decoder.embed_tokens.weight.dtype
        firsts = [_norm(layer.input_layernorm, dtype) for layer in decoder.layers]
        self.first, *later = *firsts, _norm(decoder.norm, torch.promote_types(own, residual))
        self.layers = [_layer(*each, dtype) for each in zip(decoder.layers, later, strict=True)]

    def __call__(self, ids: Tensor, position: Tensor, slots: Slots) -> Tensor:
        """(B,), (B,) -> (B, D)."""
        x: Tensor = self.decoder.embed_tokens(ids)  # the residual, added to in place
        cos, sin = (a[0].contiguous() for a in self.decoder.rotary_emb(x[None], position[None]))
        y = self.norm(x, None, *self.first)
        for layer in self.layers:
            keys, values = slots.cache[layer.index]
            turn = cos, sin, keys, values, slots.length, layer.scaling, layer.norms, layer.eps
            y = self.norm(x, layer.out(self.attend(layer.qkv(y), *turn)), *layer.norm)
            y = self.norm(x, layer.down(self.gate(layer.both(y))), *layer.after)
        return y


def decoder(policy: Policy) -> Decoder | None:
    """The decoder without its modules where it fits, inside of `policy.inference()`."""
    inner: Any = policy.model.get_decoder()
    heads = next((getattr(x.self_attn, "head_dim", 0) for x in getattr(inner, "layers", ())), 0)
    if not (
        policy.compute in flash.HALF and policy.attn != "sdpa" and heads
        and flash.unfit(heads, policy.device) is None and _prepared(inner)
        and inner.embed_tokens.weight.dtype in (torch.float32, policy.compute)
    ):  # fmt: skip
        return None
    return Decoder(inner, policy.compute)


def _prepared(decoder: Any) -> bool:
    """Whether all its products are joined and cast (products.prepared)."""
    return all(
        "joined" in vars(m) for layer in decoder.layers for m in (layer.self_attn, layer.mlp)
    )


def _norm(norm: Any, dtype: torch.dtype) -> tuple[Tensor, float, torch.dtype]:
    return norm.weight, norm.variance_epsilon, dtype


def _layer(layer: Any, after: tuple[Tensor, float, torch.dtype], dtype: torch.dtype) -> Layer:
    attn, mlp = layer.self_attn, layer.mlp
    normed = hasattr(attn, "q_norm")
    norms = (attn.q_norm.weight, attn.k_norm.weight) if normed else ()
    return Layer(
        attn.joined.product, norms, attn.q_norm.variance_epsilon if normed else 0.0,
        attn.o_proj.forward, _norm(layer.post_attention_layernorm, dtype), mlp.joined.product,
        mlp.down_proj.forward, after, attn.layer_idx, attn.scaling,
    )  # fmt: skip
