"""A decoder layer on a CPU as one function of its input and weights (kernels/native_decoder.py),
where everything in it is as that function has it and nobody listens to a part of it.

Against its modules: q, k, v and gate, up are one product each; weights are cast a layer at a time,
so that no second set stands in memory; 16 KB a token are kept for the gradient of a layer of
SmolLM2-135M instead of 22.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from reasonrl import attention
from reasonrl.implementations import native
from reasonrl.watchdog import beat

TYPES = (Tensor, nn.Parameter)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PRODUCTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def computed(layer: Any, x: Tensor, angles: tuple[Tensor, Tensor], plan: Any) -> Tensor | None:
    """What the layer (attention and gated MLP behind a norm each) makes of x (1, L, D); None where
    its modules must."""
    attn, mlp = layer.self_attn, layer.mlp
    norms = layer.input_layernorm, layer.post_attention_layernorm
    linears = [getattr(attn if i < 4 else mlp, name) for i, name in enumerate(PRODUCTS)]
    size, width = attn.head_dim, x.shape[-1]
    cos, sin = angles
    if torch.compiler.is_compiling() or not (
        isinstance(plan, attention.Packed) and plan.by_blocks(linears[0].out_features // size)
        and x.dim() == 3 and len(x) == 1 and _plain(x, x.shape) and not hasattr(attn, "q_norm")
        and not (attn.training and attn.attention_dropout)
        and all(_plain(norm.weight, (width,)) for norm in norms)
        and all(map(_is_plain, linears)) and cos.dtype in DTYPES and cos.dtype == sin.dtype
        and cos.shape == sin.shape == (1, x.shape[1], size)
    ):  # fmt: skip
        return None
    beat()
    half = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if half else torch.float32
    eps = norms[0].variance_epsilon, norms[1].variance_epsilon
    products = [linear.weight for linear in linears]
    weights = norms[0].weight, *products[:4], norms[1].weight, *products[4:]
    biases = [linear.bias for linear in linears]
    known = size, eps, attn.scaling, dtype, plan.places
    with torch.autocast("cpu", enabled=False):
        turn = cos[0].contiguous(), sin[0].contiguous()
        return native("decoder_layer")(x[0].contiguous(), *turn, known, weights, biases)[None]


def _plain(x: Any, shape: Any) -> bool:
    plain = type(x) in TYPES and x.is_cpu and x.dtype == torch.float32 and x.shape == shape
    return plain and x.is_contiguous()


def _is_plain(linear: Any) -> bool:
    if type(linear) is not nn.Linear or "forward" in vars(linear):
        return False
    bias = linear.bias is None or _plain(linear.bias, (linear.out_features,))
    return bias and _plain(linear.weight, (linear.out_features, linear.in_features))
