"""Models that learn: all of their weights, or a LoRA adapter (arXiv 2106.09685) beside them.

Adapters are peft's. A model with one is saved twice: folded into plain weights for everybody, and
the adapter alone for going on. Left out: adapters on embeddings, quantised base weights.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reasonrl.models import Policy
from reasonrl.records import InputError
from reasonrl.state_file import load_state, save_state


def trainable(
    initial: Policy, lora_rank: int = 0, seed: int = 0, alpha: float | None = None
) -> Policy:
    """`initial` itself made ready to learn: all of its weights, or a LoRA adapter on every linear
    layer but the head; on an image tower that is frozen there is none. alpha: 2 * rank."""
    model = initial.model
    if lora_rank == 0:
        return replace(initial, model=model.requires_grad_(True))
    try:
        import peft
    except ImportError:
        raise InputError("LoRA needs peft; pip install 'reasonrl[lora]'") from None
    settings = peft.LoraConfig(
        r=lora_rank,
        lora_alpha=2 * lora_rank if alpha is None else alpha,  # type: ignore[arg-type]
        target_modules=_layers(model),
        lora_dropout=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, settings).get_base_model()
    return replace(initial, model=model)


def _layers(model: Any) -> list[str]:
    """Names of the linear layers that get an adapter."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    learns = any(p.requires_grad for p in model.parameters())
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear)
        and layer is not head
        and (layer.weight.requires_grad or not learns)
    ]


def save(policy: Policy, folder: Path, adapter: Path) -> None:
    """An ordinary checkpoint in `folder`; beside an adapter, its parameters for going on."""
    model = policy.model
    if adapted(policy):
        named = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        save_state(adapter, named)
        model = merged(policy)
    replace(policy, model=model).save(folder)


def restore(policy: Policy, folder: Path, adapter: Path) -> None:
    """Put the parameters of `save` back into a model built the same way."""
    if adapted(policy):
        saved = load_state(adapter)
    else:
        saved = (
            type(policy.model)
            .from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
            .state_dict()
        )
    here = dict(policy.model.named_parameters())
    with torch.no_grad():
        for name, parameter in here.items():
            if parameter.requires_grad:
                parameter.copy_(saved[name])


def frozen(policy: Policy) -> Policy:
    """A copy of the weights as they are now, an adapter folded in: a reference."""
    if not adapted(policy):
        return policy.frozen()
    model = merged(policy).eval().requires_grad_(False)
    return replace(policy, model=model, engine=None)


def merged(prm: Policy):
    """The model with its adapter folded into the weights, as a plain transformers model."""
    from peft.tuners.lora import LoraLayer

    model = copy.deepcopy(prm.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()  # type: ignore[attr-defined]
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    return model


@contextlib.contextmanager
def adapter_off(prm: Policy):
    """The model without its adapter, inside the block."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in prm.model.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def adapted(prm: Policy) -> bool:
    """Whether the model carries a LoRA adapter."""
    return any(hasattr(module, "lora_A") for module in prm.model.modules())
