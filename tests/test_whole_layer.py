"""A decoder layer on a CPU as one function: when it is, and that it is what its modules are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_cpu_layers import NAMES, SIZES, built, far, loss_of, twins
from test_native import native  # noqa: F401, fixture
from test_packing import gradients
from torch import nn

from reasonrl import attention, layers, whole_decoder, whole_layer
from reasonrl.kernels import native_decoder
from reasonrl.models import Policy
from reasonrl.records import InputError


@pytest.fixture
def whole(native, monkeypatch) -> list[bool]:  # noqa: F811
    """Of every layer that a test computes: whether it was one function, called by the modules."""
    inner, seen = whole_layer.computed, []

    def computed(*given):
        out = inner(*given)
        seen.append(out is not None)
        return out

    monkeypatch.setattr(whole_layer, "computed", computed)
    monkeypatch.setattr(whole_decoder, "computed", lambda *given: None)
    return seen


@pytest.mark.parametrize("name", ["tiny", *NAMES])
def test_a_layer_is_one_function_where_all_of_it_is_known(whole, name):
    _, fused = twins(name)
    gradients(fused, loss_of(fused))
    known = {"SmolLM3": set()}  # layers without a position
    assert set(whole) == known.get(name, {True})


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Qwen2", "Qwen3"])
def test_a_layer_of_products_by_torch(whole, name, compute, monkeypatch):
    """As on a CPU whose tiles are torch's."""
    monkeypatch.setattr(native_decoder, "fast", lambda *of: False)
    plain, fused = twins(name)
    plain.compute = fused.compute = compute
    wanted, found = (gradients(policy, loss_of(policy)) for policy in (plain, fused))
    assert far(found, wanted) <= (1e-5 if compute == torch.float32 else 0.05) and all(whole)


def test_a_layer_with_biases_some_of_which_learn(whole):
    plain = built("Llama", attention_bias=True, mlp_bias=True)
    for name, parameter in plain.model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0.0, 0.1)
    fused = Policy(copy.deepcopy(plain.model), plain.tokenizer)
    assert layers.fuse(fused.model, "auto")
    fused.model.model.layers[1].mlp.gate_proj.bias = None  # and one that has none
    plain.model.model.layers[1].mlp.gate_proj.bias.data.zero_()
    found, wanted = gradients(fused, loss_of(fused)), gradients(plain, loss_of(plain))
    assert set(wanted) - set(found) == {"model.layers.1.mlp.gate_proj.bias"}
    assert far({n: wanted[n] for n in found}, found) <= 1e-5 and all(whole)
    few = ("0.self_attn.v_proj.weight", "1.mlp.up_proj.bias", "2.input_layernorm.weight")
    for policy in (plain, fused):
        for name, parameter in policy.model.named_parameters():
            parameter.requires_grad_(name.endswith(few))
    found, wanted = (
        dict(zip(few, torch.autograd.grad(loss_of(policy), learning(policy)), strict=True))
        for policy in (fused, plain)
    )
    assert far(found, wanted) <= 1e-5


def learning(policy: Policy) -> list[nn.Parameter]:
    return [p for p in policy.model.parameters() if p.requires_grad]


def test_a_graph_that_is_kept_gives_its_gradient_twice(whole):
    _, fused = twins("Llama")
    loss = loss_of(fused)
    weights = list(fused.model.parameters())
    once = torch.autograd.grad(loss, weights, retain_graph=True)
    again = torch.autograd.grad(loss, weights)
    assert all(map(torch.equal, once, again)) and all(whole)


def apart(linear: nn.Linear) -> None:
    linear.weight.data = linear.weight.data.t().contiguous().t()


CHANGES: dict[str, Any] = {
    "somebody listens": lambda m: m.layers[0].mlp.act_fn.register_forward_hook(lambda *x: None),
    "a product that is another": lambda m: setattr(
        m.layers[0].mlp, "down_proj", Twice(m.layers[0].mlp.down_proj)
    ),
    "a weight in half precision": lambda m: m.layers[0].input_layernorm.bfloat16(),
    "a weight that does not stand together": lambda m: apart(m.layers[0].mlp.up_proj),
    "dropout": lambda m: setattr(m.train().layers[0].self_attn, "attention_dropout", 1e-9),
    "kept keys": None,
    "flash": None,
}


ALL = ("dropout", "flash")  # what concerns the first layer alone does not stop others


class Twice(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_layer_cannot_be_one_function_of(whole, change):
    """Its modules compute, to the same numbers, or say what is wrong."""
    plain, fused = twins("Llama")
    want = loss_of(plain).item()
    if CHANGES[change]:
        CHANGES[change](fused.model.model)
    if change in ("kept keys", "flash"):
        how: dict[str, Any] = {"keep": True} if change == "kept keys" else {"attn": "flash"}
        plan, usual = (attention.Packed([(0, 5, [])], "cpu", **o) for o in (how, {}))
        given = torch.arange(5, 10), torch.arange(5)
        if change == "flash":
            with pytest.raises(InputError, match="attn: flash needs"):
                fused.hidden(*given, plan)
        else:  # a rollout's prompts
            torch.testing.assert_close(fused.hidden(*given, plan), fused.hidden(*given, usual))
            assert len(plan.cache) == 3
    elif change == "dropout":
        with pytest.raises(ValueError, match="attention dropout must be 0"):
            loss_of(fused)
    else:
        assert loss_of(fused).item() == pytest.approx(want, rel=1e-2 if "half" in change else 1e-6)
    assert whole.count(True) == (3 if change == "kept keys" else 0 if change in ALL else 2)


def test_a_compiler_sees_the_modules(native, monkeypatch):  # noqa: F811
    _, fused = twins("Llama")
    decoder, x = fused.model.model, torch.randn(1, 5, SIZES["hidden_size"])
    angles = decoder.rotary_emb(x, torch.arange(5)[None])
    given = decoder.layers[0], x, angles, attention.Packed([(0, 3, [2])], "cpu")
    assert whole_layer.computed(*given) is not None
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert whole_layer.computed(*given) is None
