"""Fused layers on a GPU: in one instance, by the installed liger-kernel's own calls.

What they compute is compared on a GPU (test_gpu.py); those of a CPU stand in test_cpu_layers.py.
"""

from __future__ import annotations

import inspect
import sys
from importlib.util import find_spec

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM

from reasonrl import gpu_layers, layers, models
from reasonrl.records import InputError

SMALL = ("hidden_size", "intermediate_size", "vocab_size", "head_dim")
KNOWN = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma2")


@pytest.fixture
def liger(require):
    require("liger", None if find_spec("liger_kernel") else "pip install liger-kernel")
    return pytest.importorskip("liger_kernel.transformers.monkey_patch")


def test_options_are_checked():
    with pytest.raises(InputError, match="liger: expected one of auto, ours, off, got 'on'"):
        models.load("tiny", width=32, layers=1, liger="on")
    with pytest.raises(InputError, match="attn: expected one of auto, flash, sdpa, got 'flash2'"):
        models.load("tiny", width=32, layers=1, attn="flash2")


def test_a_model_on_a_cpu_has_none_of_ligers():
    policy = models.load("tiny", width=32, layers=1, liger="auto")
    assert "Liger" not in repr(policy.model)


@pytest.mark.parametrize("kind", KNOWN)
def test_the_call_fits_the_installed_version(liger, kind):
    """Every name that is passed is one the package's function for the architecture takes."""
    taken = inspect.signature(liger.MODEL_TYPE_TO_APPLY_LIGER_FN[kind]).parameters
    assert {"model", "rope", "cross_entropy", "fused_linear_cross_entropy"} <= set(taken)


def test_one_instance_alone_is_changed(liger, monkeypatch):
    policy = models.load("tiny", width=32, layers=1)
    home = vars(sys.modules[type(policy.model).__module__])
    before = {k: v for k, v in home.items() if k.startswith("Llama") or "rotary" in k}
    monkeypatch.setattr(type(policy.model), "device", models.torch.device("cuda"))
    assert layers.fuse(policy.model, "auto")
    assert "LigerRMSNorm" in repr(policy.model)
    assert all(home[name] is value for name, value in before.items())
    assert type(policy.model).forward is policy.model.forward.__func__  # its losses are not ours
    monkeypatch.undo()
    assert "Liger" not in repr(models.load("tiny", width=32, layers=1).model)


def test_whole_layers_of_a_gpu_are_taken_where_they_are_known(monkeypatch):
    policy = models.load("tiny", width=32, layers=2)
    monkeypatch.setattr(type(policy.model), "device", models.torch.device("cuda"))
    with pytest.raises(InputError, match="liger: ours: impl='triton' cannot run decoder_layer: "):
        layers.fuse(policy.model, "ours")
    monkeypatch.setattr(layers, "_ligers", lambda model: False)
    assert not layers.fuse(policy.model, "auto")  # without Triton
    monkeypatch.setattr(gpu_layers, "triton", lambda op: None)
    assert not layers.fuse(policy.model, "off")
    assert not any("forward" in vars(layer) for layer in policy.model.model.layers)
    for liger in ("auto", "ours"):
        assert layers.fuse(policy.model, liger)
        whole = [vars(layer).pop("forward").__func__ for layer in policy.model.model.layers]
        assert whole == [gpu_layers._layer] * 2
    other = GemmaForCausalLM(GemmaConfig(**{k: 16 for k in SMALL}, num_hidden_layers=1))
    monkeypatch.setattr(type(other), "device", models.torch.device("cuda"))
    with pytest.raises(InputError, match="liger: ours knows the layers of llama.*, got gemma$"):
        layers.fuse(other, "ours")
    assert not layers.fuse(other, "auto")


def test_a_model_beside_a_gpus_policy_takes_its_layers(monkeypatch):
    one, beside, apart = (models.load("tiny", width=32, layers=2) for _ in range(3))
    monkeypatch.setattr(type(one.model), "device", models.torch.device("cuda"))
    monkeypatch.setattr(gpu_layers, "triton", lambda op: None)
    monkeypatch.setattr(layers, "_ligers", lambda model: False)
    assert not gpu_layers.fused(apart.follow(one).model)
    layers.fuse(one.model, "auto")
    assert gpu_layers.fused(beside.follow(one).model) and gpu_layers.fused(one.frozen().model)


def test_a_decoder_goes_without_modules_where_all_of_it_is_known(monkeypatch):
    monkeypatch.setattr(gpu_layers, "triton", lambda op: None)

    def lean(change=lambda model: None, **options):
        model = models.load("tiny", width=32, layers=2, **options).model
        gpu_layers.fuse(model)
        change(model.model)
        return gpu_layers.lean(model.model)

    def biased(decoder):
        decoder.layers[1].self_attn.k_proj.bias = torch.nn.Parameter(torch.zeros(32))

    def listened(decoder):
        decoder.layers[0].mlp.register_forward_hook(lambda *given: None)

    def own(decoder):
        decoder.layers[1].mlp.forward = lambda x: x

    def wrapped(decoder):
        decoder.layers[0].self_attn.o_proj = torch.nn.Sequential(decoder.layers[0].self_attn.o_proj)

    assert lean()
    for change in (biased, listened, own, wrapped):
        assert not lean(change), change.__name__
    assert not gpu_layers.lean(models.load("tiny", width=32, layers=2).model.model)


def test_a_model_beside_the_policy_takes_its_attention_and_dtype():
    policy = models.load("tiny", width=32, layers=1, dtype="fp32", attn="sdpa")
    other = models.load("tiny", width=32, layers=1, dtype="bf16")
    assert other.follow(policy) is other
    assert (other.attn, other.compute) == ("sdpa", policy.compute)
    assert policy.frozen().attn == "sdpa"


def test_off_is_off(liger, monkeypatch):
    policy = models.load("tiny", width=32, layers=1)
    monkeypatch.setattr(type(policy.model), "device", models.torch.device("cuda"))
    assert not layers.fuse(policy.model, "off") and "Liger" not in repr(policy.model)
