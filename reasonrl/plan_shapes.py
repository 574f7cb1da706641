"""The shape of a decoder: what the memory of a job depends on, counted without any weights.

A model is built from its config on PyTorch's meta device, where tensors have sizes and no memory,
so parameter counts are exact, tied weights once. Left out and refused: mixtures of experts, whose
activations depend on the routing, and encoder-decoder models.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, Qwen2Config

from reasonrl import tiny
from reasonrl.records import InputError

# published configs: hidden, intermediate, layers, heads, key/value heads, vocabulary, tied
NAMED: dict[str, tuple[type, tuple[int, int, int, int, int, int, bool]]] = {
    "smollm2": (LlamaConfig, (576, 1536, 30, 9, 3, 49152, True)),
    "qwen2.5-1.5b": (Qwen2Config, (1536, 8960, 28, 12, 2, 151936, True)),
    "qwen2.5-7b": (Qwen2Config, (3584, 18944, 28, 28, 4, 152064, False)),
    "qwen2.5-32b": (Qwen2Config, (5120, 27648, 64, 40, 8, 152064, False)),
    "llama-3.1-8b": (LlamaConfig, (4096, 14336, 32, 32, 8, 128256, False)),
    "llama-3.1-70b": (LlamaConfig, (8192, 28672, 80, 64, 8, 128256, False)),
}
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
NEEDED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


@dataclass(frozen=True)
class Shape:
    """A decoder of gated MLP blocks, as Llama and Qwen are."""

    name: str
    params: int
    layers: int
    hidden: int  # D
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int  # V
    linear_io: int  # sum of inputs + outputs over the linear layers but the head: a rank-1 adapter
    block: int  # parameters of the largest part that is gathered at once under ZeRO-3
    kind: str = ""  # transformers' model type

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim


def shape_of(model: str) -> Shape:
    """`tiny`, a name of NAMED, a folder (or file) with config.json, or a hub id; InputError where
    there is no such config or the arithmetic does not hold for it."""
    if model == "tiny":
        return counted(model, tiny.build()[0].config)
    if model in NAMED:
        kind, numbers = NAMED[model]
        hidden, intermediate, layers, heads, kv_heads, vocab, tied = numbers
        config = kind(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            vocab_size=vocab,
            tie_word_embeddings=tied,
        )
        return counted(model, config)
    path = Path(model)
    if not path.exists() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        known = ", ".join(["tiny", *NAMED])
        raise InputError(f"model {model}: expected {known}, a folder with config.json or a hub id")
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"model {model}: expected a folder with config.json, found none")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise InputError(f"model {model}: {reason}") from None
    return counted(path.resolve().name if path.is_dir() else model, config)


def counted(name: str, config: Any) -> Shape:
    """The shape of a transformers config, parameters counted on the meta device."""
    text = config.get_text_config()
    for field in EXPERTS:
        if (getattr(text, field, None) or 0) > 1:
            raise InputError(f"model {name}: {field} {getattr(text, field)}: mixtures of experts")
    for field in NEEDED:
        if not isinstance(getattr(text, field, None), int):
            raise InputError(f"model {name}: its config has no {field}, which the plan needs")
    if config.is_encoder_decoder:
        raise InputError(f"model {name}: expected a decoder-only model, got {config.model_type}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
    blocks = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    parts = [sum(p.numel() for p in layer.parameters()) for part in blocks for layer in part]
    heads = text.num_attention_heads
    return Shape(
        name=name,
        params=sum(p.numel() for p in model.parameters()),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=head.weight.shape[0],
        linear_io=sum(m.in_features + m.out_features for m in linear),
        block=max([head.weight.numel(), *parts]),
        kind=text.model_type,
    )


def described(
    params: float,
    layers: int,
    hidden: int,
    vocab: int,
    kv_heads: int | None = None,
    head_dim: int = 128,
) -> Shape:
    """A Llama-like shape from a few numbers; the MLP takes what the other parts leave of `params`.

    InputError where they leave nothing. Embedding and head are two matrices.
    """
    heads = max(1, hidden // head_dim)
    keys = (kv_heads or heads) * head_dim
    attention = hidden * (2 * heads * head_dim + 2 * keys)
    left = (params - 2 * vocab * hidden - hidden) / layers - attention - 2 * hidden
    intermediate = round(left / (3 * hidden))
    if intermediate < 1:
        raise InputError(
            f"--params {params:g}: {layers} layers of hidden {hidden} with vocabulary {vocab} need"
            " more"
        )
    block = attention + 3 * hidden * intermediate + 2 * hidden
    io = 2 * hidden + 2 * heads * head_dim + 2 * (hidden + keys) + 3 * (hidden + intermediate)
    return Shape(
        name=f"{params:g} parameters",
        params=2 * vocab * hidden + hidden + layers * block,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        kv_heads=kv_heads or heads,
        head_dim=head_dim,
        vocab=vocab,
        linear_io=layers * io,
        block=max(vocab * hidden, block),
        kind="llama",
    )
