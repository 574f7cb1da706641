"""Fused layers on a GPU: in one instance, by the installed liger-kernel's own calls.

What they compute is compared on a GPU (test_gpu.py); those of a CPU stand in test_cpu_layers.py.
"""

from __future__ import annotations

import inspect
import sys
from importlib.util import find_spec

import pytest

from reasonrl import layers, models
from reasonrl.records import InputError

KNOWN = ("llama", "mistral", "qwen2", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma2")


@pytest.fixture
def liger(require):
    require("liger", None if find_spec("liger_kernel") else "pip install liger-kernel")
    return pytest.importorskip("liger_kernel.transformers.monkey_patch")


def test_options_are_checked():
    with pytest.raises(InputError, match="liger: expected one of auto, off, got 'on'"):
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
