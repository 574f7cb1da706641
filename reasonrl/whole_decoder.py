"""A packed batch through a decoder on a CPU, layer by layer, where each layer is one function
(`whole_layer`) and nobody listens to any module: without the calls of transformers' modules between
them, which a small layer waits for as long as for a product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from reasonrl import attention, cpu_layers, whole_layer
from reasonrl.implementations import native
from reasonrl.watchdog import beat


def computed(decoder: Any, ids: Tensor, positions: Tensor, plan: Any) -> Tensor | None:
    """Last hidden states (L, D) of ids (L,) at positions (L,); None where the modules must."""
    if not isinstance(plan, attention.Packed) or not plan.by_blocks():
        return None
    if torch.compiler.is_compiling() or not cpu_layers.known(decoder):
        return None
    layers = list(decoder.layers)[: decoder.config.num_hidden_layers]
    if decoder.training and any(getattr(x, "gradient_checkpointing", 0) for x in layers):
        return None
    x = decoder.embed_tokens(ids[None])
    angles = decoder.rotary_emb(x, positions[None])
    every = [given for one in layers if (given := whole_layer.asked(one, x, angles, plan))]
    if len(every) < len(layers):
        return None
    op, x = native("decoder_layer"), x.squeeze(0)
    for known, *parts in every:
        beat()
        x = op(x, *whole_layer.turn(angles), known, *parts)
    return decoder.norm(x)
