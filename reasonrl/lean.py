"""One new token a row, and on a GPU prompts too, through a decoder without its modules.

A token of a small model is hundreds of small calls, and on a GPU most of its time is starting
kernels. Where every layer is of known build, nobody listens to one (hooks), and the products stand
ready (`Policy.inference`), a layer is four products and four kernels: norm with the residual; q, k
and v; turned, placed into the slots and attended in one; its product; norm with the residual; gate
and up; SwiGLU; its product. The numbers are the modules'. Shapes: B rows, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonrl import cpu_layers, flash
from reasonrl.attention import Packed
from reasonrl.implementations import native, triton
from reasonrl.models import Policy
from reasonrl.slots import Slots

Product = Callable[[Tensor], Tensor]
Norm = tuple[Tensor, float, torch.dtype]  # weight, eps, dtype of the result


class Kernels(NamedTuple):
    """What stands between the products."""

    attend: Callable[..., Tensor]
    gate: Callable[[Tensor], Tensor]
    norm: Callable[..., Tensor]  # x, what is added to it in place or None, Norm -> its norm
    draw: Callable[..., tuple[Tensor, Tensor]] | None = None  # for the batch that is decoded
    read: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None  # attention of prompts


class Layer(NamedTuple):
    qkv: Product
    heads: tuple[Any, ...]  # norms of q's and k's heads and their eps, where there are any
    out: Product
    norm: Norm
    both: Product  # gate and up
    down: Product
    after: Norm  # the next layer's first, or the decoder's own
    index: int
    scaling: float
    sizes: tuple[int, int]  # of a head; heads of keys


class Decoder:
    """`Policy.hidden` of one token a row whose prompt's keys and values are in the slots, and of
    packed prompts where there is a kernel to `read` them."""

    def __init__(self, decoder: Any, dtype: torch.dtype, kernels: Kernels):
        self.decoder = decoder
        self.attend, self.gate, self.norm, self.draw, self._read = kernels
        own, residual = decoder.norm.weight.dtype, decoder.embed_tokens.weight.dtype
        firsts = [_norm(layer.input_layernorm, dtype) for layer in decoder.layers]
        self.first, *later = *firsts, _norm(decoder.norm, torch.promote_types(own, residual))
        self.layers = [_layer(*each, dtype) for each in zip(decoder.layers, later, strict=True)]

    def __call__(self, ids: Tensor, position: Tensor, slots: Slots) -> Tensor:
        """(B,), (B,) -> (B, D)."""

        def seen(layer: Layer, qkv: Tensor, *turn: Tensor) -> Tensor:
            where = *turn, *slots.cache[layer.index], slots.length, layer.scaling
            return self.attend(qkv, *where, *layer.heads)

        return self._through(ids, position, seen)

    def reads(self, plan: Packed, images: Sequence[Any]) -> bool:
        return self._read is not None and not images and plan.attn != "sdpa"

    def read(self, ids: Tensor, position: Tensor, plan: Packed) -> Tensor:
        """(L,), (L,) -> (L, D); the plan keeps their keys and values."""
        read = self._read
        assert read is not None

        def seen(layer: Layer, qkv: Tensor, *turn: Tensor) -> Tensor:
            known = *layer.sizes, plan.calls, layer.scaling
            out, k, v = read(qkv, *turn, *known, *layer.heads)
            plan.keep(layer.index, k, v)
            return out

        return self._through(ids, position, seen)

    def _through(self, ids: Tensor, position: Tensor, see: Callable[..., Tensor]) -> Tensor:
        x: Tensor = self.decoder.embed_tokens(ids)  # the residual, added to in place
        turn = [a[0].contiguous() for a in self.decoder.rotary_emb(x[None], position[None])]
        y = self.norm(x, None, *self.first)
        for layer in self.layers:
            seen = see(layer, layer.qkv(y), *turn)
            y = self.norm(x, layer.out(seen), *layer.norm)
            y = self.norm(x, layer.down(self.gate(layer.both(y))), *layer.after)
        return y


def of(policy: Policy) -> Callable[[Tensor, Tensor, Slots], Tensor]:
    """The decoder without its modules where it fits, inside of `policy.inference()`; else
    `policy.hidden`."""
    decoder: Any = policy.model.get_decoder()
    on_a_gpu = policy.device.type == "cuda"
    if not (_on_a_gpu(policy, decoder) if on_a_gpu else cpu_layers.lean(decoder)):
        return policy.hidden
    if decoder.embed_tokens.weight.dtype not in (torch.float32, policy.compute):
        return policy.hidden
    return Decoder(decoder, policy.compute, gpu_kernels() if on_a_gpu else cpu_kernels())


def cpu_kernels() -> Kernels:
    return Kernels(*map(native, ("turned_slot_attention", "joined_swiglu", "add_rms_norm_")))


def gpu_kernels() -> Kernels:
    ops = "place_and_attend", "gate", "add_rms_norm_", "draw", "read_prompts"
    return Kernels(*map(triton, ops))


def _on_a_gpu(policy: Policy, decoder: Any) -> bool:
    """Whether all its products are joined and cast (products.prepared), and the kernels have its
    heads."""
    if policy.compute not in flash.HALF or policy.attn == "sdpa":
        return False
    layers = getattr(decoder, "layers", ())
    parts = [module for layer in layers for module in (layer.self_attn, layer.mlp)]
    if not parts or not all("joined" in vars(part) for part in parts):
        return False
    return flash.unfit(parts[0].head_dim, policy.device) is None


def _norm(norm: Any, dtype: torch.dtype) -> Norm:
    return norm.weight, norm.variance_epsilon, dtype


def _layer(layer: Any, after: Norm, dtype: torch.dtype) -> Layer:
    attn, mlp, heads = layer.self_attn, layer.mlp, ()
    if hasattr(attn, "q_norm"):
        heads = (attn.q_norm.weight, attn.k_norm.weight), attn.q_norm.variance_epsilon
    return Layer(
        attn.joined.product, heads, attn.o_proj.forward,
        _norm(layer.post_attention_layernorm, dtype), mlp.joined.product, mlp.down_proj.forward,
        after, attn.layer_idx, attn.scaling,
        (attn.head_dim, attn.k_proj.out_features // attn.head_dim),
    )  # fmt: skip
