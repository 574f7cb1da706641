"""Models that learn: all of their weights, or a LoRA adapter (arXiv 2106.09685) beside them.

Adapters are peft's. A model with one is saved twice: folded into plain weights for everybody, and
the adapter alone for going on. Left out: adapters on embeddings, quantised base weights.
"""

from __future__ import annotations

import contextlib
import copy
from pathlib import Path

import torch

from reasonrl.models import Policy
from reasonrl.records import InputError
from reasonrl.state_file import load_state, save_state


def trainable(initial: Policy, lora_rank: int = 0, seed: int = 0) -> Policy:
    """`initial` itself made ready to learn: all of its weights, or a LoRA adapter on them."""
    model = initial.model
    if lora_rank == 0:
        return Policy(
            model.requires_grad_(True), initial.tokenizer, initial.compute, initial.processor
        )
    try:
        import peft
    except ImportError:
        raise InputError("algo.lora_rank: needs peft; pip install 'reasonrl[lora]'") from None
    settings = peft.LoraConfig(
        r=lora_rank, lora_alpha=2 * lora_rank, target_modules="all-linear", lora_dropout=0.0
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = peft.get_peft_model(model, settings).get_base_model()
    return Policy(model, initial.tokenizer, initial.compute, initial.processor)


def save(prm: Policy, folder: Path) -> None:
    """An ordinary checkpoint in folder/prm; beside an adapter, its parameters for going on."""
    if adapted(prm):
        named = {n: p.detach() for n, p in prm.model.named_parameters() if p.requires_grad}
        save_state(folder / "prm_adapter", named)
        merged(prm).save_pretrained(folder / "prm")
    else:
        prm.model.save_pretrained(folder / "prm")
    for part in (prm.tokenizer, prm.processor):
        if part is not None:
            part.save_pretrained(folder / "prm")


def restore(prm: Policy, folder: Path) -> None:
    """Put the parameters of `save_prm` back into a model built the same way."""
    if adapted(prm):
        saved = load_state(folder / "prm_adapter")
    else:
        saved = type(prm.model).from_pretrained(folder / "prm", dtype=torch.float32).state_dict()
    here = dict(prm.model.named_parameters())
    with torch.no_grad():
        for name, parameter in here.items():
            if parameter.requires_grad:
                parameter.copy_(saved[name])


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
