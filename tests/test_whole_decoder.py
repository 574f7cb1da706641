"""A decoder on a CPU without the calls of its modules: the same bits, and the modules wherever one
of them is another or somebody listens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_cpu_layers import NAMES, loss_of, twins
from test_native import native  # noqa: F401, fixture
from test_packing import gradients
from torch import nn

from reasonrl import attention, whole_decoder


@pytest.fixture
def seen(native, monkeypatch) -> list[bool]:  # noqa: F811
    """Of every batch: whether it went through without the modules."""
    inner, seen = whole_decoder.computed, []

    def computed(*given):
        out = inner(*given)
        seen.append(out is not None)
        return out

    monkeypatch.setattr(whole_decoder, "computed", computed)
    return seen


def by_modules(policy, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(whole_decoder, "computed", lambda *given: None)
        return gradients(policy, loss_of(policy)), loss_of(policy)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny", *NAMES])
def test_the_bits_of_the_modules(seen, name, compute, monkeypatch):
    _, fused = twins(name)
    fused.compute = compute
    wanted, loss = by_modules(fused, monkeypatch)
    assert torch.equal(loss_of(fused), loss)
    found = gradients(fused, loss_of(fused))
    assert all(torch.equal(found[n], wanted[n]) for n in wanted) and set(found) == set(wanted)
    assert set(seen) == {name != "SmolLM3"}  # layers without a position


def listen(module: nn.Module) -> None:
    module.register_forward_hook(lambda *given: None)


CHANGES: dict[str, Any] = {
    "somebody listens to the decoder": listen,
    "to the embedding": lambda m: listen(m.embed_tokens),
    "to the angles": lambda m: listen(m.rotary_emb),
    "to a layer": lambda m: listen(m.layers[1]),
    "to a product": lambda m: listen(m.layers[2].mlp.up_proj),
    "to the last norm": lambda m: listen(m.norm),
    "a layer has a weight in half precision": lambda m: m.layers[1].input_layernorm.bfloat16(),
    "a layer is another": lambda m: vars(m.layers[0]).pop("forward"),
    "activations are made again": lambda m: [
        setattr(layer, "gradient_checkpointing", True) for layer in m.train().layers
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_goes_by_its_modules(seen, change, monkeypatch):
    _, fused = twins("Qwen2")
    CHANGES[change](fused.model.model)
    assert torch.equal(loss_of(fused), by_modules(fused, monkeypatch)[1])
    assert seen and not any(seen)


def test_kept_keys_a_compiler_and_fewer_layers(seen, monkeypatch):
    _, fused = twins("Llama")
    ids, positions = torch.arange(5, 10), torch.arange(5)
    plan = attention.Packed([(0, 5, [])], "cpu", keep=True)
    fused.hidden(ids, positions, plan)
    assert len(plan.cache) == 3 and seen == [False]
    plan = attention.Packed([(0, 5, [])], "cpu")
    whole = fused.hidden(ids, positions, plan)
    fused.model.model.config.num_hidden_layers = 2
    fewer = fused.hidden(ids, positions, plan)
    assert seen[1:] == [True, True] and not torch.equal(whole, fewer)
    with monkeypatch.context() as patch:
        patch.setattr(whole_decoder, "computed", lambda *given: None)
        assert torch.equal(fewer, fused.hidden(ids, positions, plan))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert whole_decoder.computed(fused.model.model, ids, positions, plan) is None
