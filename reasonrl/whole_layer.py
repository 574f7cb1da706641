"""A decoder layer as one function of its input and weights (kernels/decoder.py, on a CPU and on a
GPU), where everything in it is as that function has it and nobody listens to a part of it.

Against its modules: q, k, v and gate, up are one product each; weights are cast a layer at a time,
or read as they are (kernels/native_products.py), so that no second set stands in memory; 14 KB a
token are kept for the gradient of a layer of SmolLM2-135M instead of 22.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reasonrl import attention, structure
from reasonrl.implementations import native, triton
from reasonrl.watchdog import beat

TYPES = (Tensor, nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LINEARS = len(structure.IN_ATTENTION + structure.IN_MLP)


def computed(layer: Any, x: Tensor, angles: Any, plan: Any) -> Tensor | None:
    """What the layer (attention and gated MLP behind a norm each) makes of x (1, L, D), turned by
    cos and sin (1, L, d); None where its modules must."""
    if angles is None or not isinstance(plan, attention.Packed) or torch.compiler.is_compiling():
        return None
    if any(map(structure.heard, structure.parts(layer)[1:])):  # torch calls who hears the layer
        return None
    given = asked(layer, x, angles, plan)
    if given is None:
        return None
    beat()
    op = (triton if x.is_cuda else native)("decoder_layer")
    return op(x.squeeze(0).contiguous(), *turn(angles), *given)[None]


def turn(angles: Any) -> tuple[Tensor, Tensor]:  # (L, d), (L, d)
    cos, sin = angles
    return cos.squeeze(0).contiguous(), sin.squeeze(0).contiguous()


def asked(layer: Any, x: Tensor, angles: Any, plan: attention.Packed) -> list[Any] | None:
    """What the function is told of a layer beside x and its angles; None where it has no such."""
    _, attn, _, _, *parts = structure.parts(layer)
    norms, heads, linears = parts[:2], parts[2:-LINEARS], parts[-LINEARS:]
    size, width, at = attn.head_dim, x.shape[-1], x.device
    half = torch.is_autocast_enabled(at.type)
    dtype = torch.get_autocast_dtype(at.type) if half else torch.float32
    cos, sin = angles
    products, biases = [[*map(of, linears)] for of in (structure.weight, structure.bias)]
    own, heads_own = [[*map(structure.weight, of)] for of in (norms, heads)]
    if not (
        _fits(plan, at, dtype, size)
        and x.dim() == 3 and len(x) == 1 and _plain(x, x.shape, at)
        and not (attn.training and attn.attention_dropout)
        and all([_plain(weight, (width,), at) for weight in own])
        and all([_plain(weight, (size,), at) for weight in heads_own])
        and all(map(_is_plain, linears, products, biases, [at] * LINEARS))
        and cos.dtype in DTYPES and cos.dtype == sin.dtype
        and cos.shape == sin.shape == (1, x.shape[1], size)
    ):  # fmt: skip
        return None
    eps = *(norm.variance_epsilon for norm in norms), heads[0].variance_epsilon if heads else 0.0
    known = size, eps, attn.scaling, dtype, plan.calls if x.is_cuda else plan.places
    weights = own[0], *products[:4], own[1], *products[4:]
    return [known, weights, biases, heads_own or [None, None]]


def _fits(plan: attention.Packed, at: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether the attention is one that the layer has."""
    return plan.by_flash(dtype, size) if at.type == "cuda" else plan.by_blocks()


def _plain(x: Any, shape: Any, at: torch.device) -> bool:
    plain = type(x) in TYPES and x.device == at and x.dtype == torch.float32 and x.shape == shape
    return plain and x.is_contiguous()


def _is_plain(linear: Any, weight: Any, bias: Any, at: torch.device) -> bool:
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    known = bias is None or _plain(bias, (linear.out_features,), at)
    return known and _plain(weight, (linear.out_features, linear.in_features), at)
