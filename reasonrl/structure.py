"""What a module of transformers computes, told by its class and parts; and who listens to it."""

from __future__ import annotations

from typing import Any

from torch import nn

# whose RMSNorm is w * x / rms, and whose decoder layers read their two norms by linear layers alone
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smollm3")
READ_BY_LINEAR = ("input_layernorm", "post_attention_layernorm")
TURNED = ("llama", "mistral", "qwen2", "qwen3")  # whose attention turns all its queries and keys
HEAD_NORMS = ("q_norm", "k_norm")
IN_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
IN_MLP = ("gate_proj", "up_proj", "down_proj")
SILU = ("SiLU", "SiLUActivation")


def way(module: Any) -> Any:
    """The function that was bound to this instance as `forward`; None where it is the class'."""
    return getattr(vars(module).get("forward"), "__func__", None)


def heard(module: Any) -> bool:
    """Whether somebody listens, as a trainer does that brings weights."""
    return bool(
        module._forward_pre_hooks or module._forward_hooks
        or module._backward_hooks or module._backward_pre_hooks
    )  # fmt: skip


def linears(layer: Any) -> list[Any]:
    """The linear layers of a decoder layer: q, k, v, o, gate, up, down."""
    own = layer._modules  # not by name: that costs ten times
    attn, mlp = own["self_attn"]._modules, own["mlp"]._modules
    return [*map(attn.__getitem__, IN_ATTENTION), *map(mlp.__getitem__, IN_MLP)]


def norms(layer: Any) -> list[Any]:
    """Its norms: before the attention, before the gate, of q's and k's heads where they are."""
    own = layer._modules
    attn = own["self_attn"]._modules
    return [own[name] for name in READ_BY_LINEAR] + [attn[x] for x in HEAD_NORMS if x in attn]


def parts(layer: Any) -> list[Any]:
    """Itself and all of its modules that are called."""
    attn, mlp = layer._modules["self_attn"], layer._modules["mlp"]
    return [layer, attn, mlp, mlp._modules["act_fn"], *norms(layer), *linears(layer)]


def weight(module: Any) -> Any:
    """None where it has none of its own, as one that something else computes."""
    return module._parameters.get("weight")


def bias(module: Any) -> Any:
    return module._parameters.get("bias")


def of(module: nn.Module, end: str, known: tuple[str, ...] = KNOWN) -> bool:
    kind = type(module)
    home = kind.__module__.split(".")
    return (
        kind.__name__.endswith(end) and home[:2] == ["transformers", "models"] and home[2] in known
    )


def is_norm(module: nn.Module) -> bool:
    return of(module, "RMSNorm") and hasattr(module, "variance_epsilon")


def is_gated(module: Any) -> bool:
    """Whether it is down(silu(gate) up)."""
    parts = ("gate_proj", "up_proj", "down_proj", "act_fn")
    return (
        of(module, "MLP")
        and all(hasattr(module, part) for part in parts)
        and type(module.act_fn).__name__ in SILU
    )


def turns(module: Any) -> bool:
    """Whether it is attention without a window that turns all its queries and keys."""
    windows = [getattr(x, "sliding_window", None) for x in (module, getattr(module, "config", 0))]
    return of(module, "Attention", TURNED) and windows == [None, None]


def is_layer(module: Any) -> bool:
    return of(module, "DecoderLayer", TURNED) and is_norm(module.post_attention_layernorm)
