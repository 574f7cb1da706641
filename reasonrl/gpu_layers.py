"""Decoder layers of a transformers model on a GPU: each as one function of ours where all of it is
known and nobody listens to a part (`whole_layer`), else transformers' own with whatever its parts
are, as liger-kernel's. On this instance alone: the layers' `forward` is a method bound to them.
"""

from __future__ import annotations

import types
from typing import Any

from torch import nn

from reasonrl import structure, whole_layer
from reasonrl.implementations import triton

GROUPS = (("self_attn", ("q_proj", "k_proj", "v_proj")), ("mlp", ("gate_proj", "up_proj")))


def fuse(model: nn.Module) -> bool:
    """Whether layers of the model are one function each now; KernelUnavailable without Triton."""
    triton("decoder_layer")
    found = [module for module in model.modules() if structure.is_layer(module)]
    for layer in found:
        layer.forward = types.MethodType(_layer, layer)
    return bool(found)


def fused(model: nn.Module) -> bool:
    return any(structure.way(module) is _layer for module in model.modules())


def joinable(decoder: Any) -> list[tuple[nn.Module, list[Any]]]:
    """Modules of a `lean` decoder with the linear layers that read one input."""
    return [group for layer in decoder.layers for group in _groups(layer)]


def lean(decoder: Any) -> bool:
    """Whether a decoder is embedding, fused layers of plain products, and norm, and nobody listens
    to any of its modules."""
    if not structure.of(decoder, "Model", structure.TURNED) or not _own(decoder.norm):
        return False
    fits = (structure.way(x) is _layer and known(x) and _is_plain(x) for x in decoder.layers)
    return all(fits) and not any(map(structure.heard, decoder.modules()))


def known(layer: Any) -> bool:
    """Whether a layer's parts compute what their classes say."""
    attn, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    norms += [attn.q_norm, attn.k_norm] if hasattr(attn, "q_norm") else []
    return (
        structure.turns(attn) and "forward" not in vars(attn)
        and structure.is_gated(mlp) and _own(mlp)
        and all(structure.is_norm(norm) and _own(norm) for norm in norms)
    )  # fmt: skip


def _groups(layer: Any) -> list[tuple[nn.Module, list[Any]]]:
    found = ((getattr(layer, name), parts) for name, parts in GROUPS)
    return [(module, [getattr(module, part) for part in parts]) for module, parts in found]


def _is_plain(layer: Any) -> bool:
    """Whether its products are, and those of one input all have a bias or none has."""
    groups = [parts for _, parts in _groups(layer)] + [
        [layer.self_attn.o_proj, layer.mlp.down_proj]
    ]
    plain = all(type(part) is nn.Linear for parts in groups for part in parts)
    return plain and all(len({part.bias is None for part in parts}) == 1 for parts in groups[:2])


def _own(module: nn.Module) -> bool:
    """Whether it computes by its own class, or by liger-kernel's of the same."""
    if "forward" not in vars(module):
        return True
    return getattr(structure.way(module), "__module__", "").startswith("liger_kernel.")


def _layer(self: Any, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
    if known(self):
        angles, plan = kwargs.get("position_embeddings"), kwargs.get("plan")
        out = whole_layer.computed(self, hidden_states, angles, plan)
        if out is not None:
            return out
    return type(self).forward(self, hidden_states, *args, **kwargs)


_layer.__name__ = "forward"  # pickled by this name: read back, a module computes as before
