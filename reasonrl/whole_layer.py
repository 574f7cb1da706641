"""A decoder layer as one function of its input and weights (kernels/decoder.py, on a CPU and on a
GPU), where everything in it is as that function has it and nobody listens to a part of it.

Against its modules: q, k, v and gate, up are one product each; weights are cast a layer at a time,
so that no second set stands in memory; 14 KB a token are kept for the gradient of a layer of
SmolLM2-135M instead of 22.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reasonrl import attention
from reasonrl.implementations import native, triton
from reasonrl.watchdog import beat

TYPES = (Tensor, nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def computed(layer: Any, x: Tensor, angles: Any, plan: Any) -> Tensor | None:
    """What the layer (attention and gated MLP behind a norm each) makes of x (1, L, D), turned by
    cos and sin (1, L, d); None where its modules must."""
    attn, mlp = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    heads = (attn.q_norm, attn.k_norm) if hasattr(attn, "q_norm") else ()
    linears = [getattr(attn if i < 4 else mlp, name) for i, name in enumerate(PRODUCTS)]
    size, width, at = attn.head_dim, x.shape[-1], x.device
    half = torch.is_autocast_enabled(at.type)
    dtype = torch.get_autocast_dtype(at.type) if half else torch.float32
    if torch.compiler.is_compiling() or angles is None:
        return None
    cos, sin = angles
    if not (
        isinstance(plan, attention.Packed) and _fits(plan, at, dtype, size)
        and x.dim() == 3 and len(x) == 1 and _plain(x, x.shape, at)
        and not (attn.training and attn.attention_dropout)
        and all(_plain(norm.weight, (width,), at) for norm in norms)
        and all(_plain(norm.weight, (size,), at) for norm in heads)
        and all(_is_plain(linear, at) for linear in linears)
        and cos.dtype in DTYPES and cos.dtype == sin.dtype
        and cos.shape == sin.shape == (1, x.shape[1], size)
    ):  # fmt: skip
        return None
    beat()
    eps = *(norm.variance_epsilon for norm in norms), heads[0].variance_epsilon if heads else 0.0
    products = [linear.weight for linear in linears]
    weights = norms[0].weight, *products[:4], norms[1].weight, *products[4:]
    biases = [linear.bias for linear in linears]
    op = (triton if x.is_cuda else native)("decoder_layer")
    known = size, eps, attn.scaling, dtype, plan.calls if x.is_cuda else plan.places
    given = [known, weights, biases] + ([[norm.weight for norm in heads]] if heads else [])
    with torch.autocast(at.type, enabled=False):
        turn = cos[0].contiguous(), sin[0].contiguous()
        return op(x[0].contiguous(), *turn, *given)[None]


def _fits(plan: attention.Packed, at: torch.device, dtype: torch.dtype, size: int) -> bool:
    """Whether the attention is one that the layer has."""
    return plan.by_flash(dtype, size) if at.type == "cuda" else plan.by_blocks()


def _plain(x: Any, shape: Any, at: torch.device) -> bool:
    plain = type(x) in TYPES and x.device == at and x.dtype == torch.float32 and x.shape == shape
    return plain and x.is_contiguous()


def _is_plain(linear: Any, at: torch.device) -> bool:
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    bias = linear.bias is None or _plain(linear.bias, (linear.out_features,), at)
    return bias and _plain(linear.weight, (linear.out_features, linear.in_features), at)
