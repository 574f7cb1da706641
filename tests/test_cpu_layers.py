"""Fused layers of a model on a CPU: the numbers of transformers' own, in copies and under wrappers,
and wherever they do not fit, transformers' own."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers
from test_native import native  # noqa: F401, fixture
from test_packing import gradients, made_up, packed_loss
from test_vision import POLICIES, written
from torch import nn

from reasonrl import attention, burst, cpu_layers, layers, lean, models, products
from reasonrl.batch import pack
from reasonrl.logprobs import batch_logp
from reasonrl.loss import LossSpec
from reasonrl.models import Policy
from reasonrl.records import Problem
from reasonrl.rollout import Sampling, sample

SIZES: dict[str, Any] = {
    "hidden_size": 72, "intermediate_size": 100, "num_hidden_layers": 3, "num_attention_heads": 6,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 256,
}  # fmt: skip
NAMES = ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")


def built(name: str, **options: Any) -> Policy:
    """SmolLM2's architecture is Llama's with tied words; every norm has a weight of its own."""
    _, tokenizer = models.tiny.build(width=32, layers=1)
    kind = getattr(transformers, f"{name}Config")
    marks: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if name == "Mistral":
        marks["sliding_window"] = None
    config = kind(
        vocab_size=len(tokenizer), tie_word_embeddings=name == "Llama", **SIZES, **marks, **options
    )
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for place, parameter in model.named_parameters():
        if "norm" in place:
            parameter.data.normal_(1.0, 0.3)
    model.set_attn_implementation(attention.NAME)
    return Policy(model, tokenizer)


def twins(name: str) -> tuple[Policy, Policy]:
    """The same weights, with transformers' layers and with ours."""
    plain = models.load("tiny", dtype="fp32", width=64, layers=2) if name == "tiny" else built(name)
    fused = Policy(copy.deepcopy(plain.model), plain.tokenizer)
    assert layers.fuse(fused.model, "auto")
    return plain, fused


def replaced(model: nn.Module) -> list[str]:
    return [type(m).__name__ for m in model.modules() if "forward" in vars(m)]


def loss_of(policy: Policy) -> Any:
    rollout = made_up([[7, 1, 12], [3, 0, 8, 8]])
    advantage = torch.randn(39, generator=torch.Generator().manual_seed(1))
    with policy.autocast():
        return packed_loss(policy, rollout, advantage, 10_000, LossSpec.named("reinforce"))


def far(a: dict, b: dict) -> float:
    """The largest distance of two gradients, in the second's norm. That of a key's bias is 0 but
    for rounding: softmax does not see it."""
    return max(
        float((a[n] - b[n]).norm() / b[n].norm().clamp(min=1e-12))
        for n in b
        if not n.endswith("k_proj.bias")
    )


@pytest.mark.parametrize("name", ["tiny", *NAMES])
def test_loss_and_gradients_are_the_same(native, name):  # noqa: F811
    plain, fused = twins(name)
    depth, found = len(fused.model.model.layers), replaced(fused.model)
    assert sum(n.endswith("RMSNorm") for n in found) == (4 if name == "Qwen3" else 2) * depth + 1
    assert sum(n.endswith("MLP") for n in found) == depth
    a, b = loss_of(fused), loss_of(plain)
    assert a.item() == pytest.approx(b.item(), rel=1e-6)
    assert far(gradients(fused, a), gradients(plain, b)) <= 1e-6


@pytest.mark.parametrize("kind", POLICIES)
def test_gradients_of_a_model_with_eyes_are_the_same(native, kind):  # noqa: F811
    plain = POLICIES[kind]()
    fused = copy.deepcopy(plain)
    assert layers.fuse(fused.model, "auto")
    (batch,) = pack(written(plain), None, 4096)
    weight = torch.randn(len(batch.target), generator=torch.manual_seed(1))
    both = []
    for policy in (fused, plain):
        policy.model.zero_grad()
        (batch_logp(policy, batch) * weight).sum().backward()
        named = policy.model.named_parameters()
        both.append({n: p.grad for n, p in named if p.grad is not None})
    assert any("visual" in n for n in both[0]) and far(*both) <= 1e-6


def test_bf16_errs_no_more_than_transformers(native):  # noqa: F811
    """Of each gradient against fp32; a norm's, a product's and the embedding's are strata."""
    plain, fused = twins("Llama")
    truth = gradients(plain, loss_of(plain))
    plain.compute = fused.compute = torch.bfloat16
    yard, got = gradients(plain, loss_of(plain)), gradients(fused, loss_of(fused))
    for part in ("layernorm", "norm.weight", "self_attn", "mlp", "embed"):
        t, y, g = (
            torch.cat([v.flatten() for n, v in x.items() if part in n]) for x in (truth, yard, got)
        )
        assert (g - t).norm() <= 1.25 * (y - t).norm(), part


def test_under_autocast_a_norm_gives_what_products_would_round_to(native):  # noqa: F811
    _, fused = twins("Llama")
    decoder, seen = fused.model.model, {}
    for name, module in decoder.named_modules():
        if name.endswith("norm"):
            module.register_forward_hook(
                lambda m, x, y, name=name: seen.update({name: (m, x[0].detach(), y.detach())})
            )
    fused.compute = torch.bfloat16
    loss_of(fused)
    for name, (module, x, y) in seen.items():
        own = type(module).forward(module, x).detach()
        read_by_linear = name != "norm"
        assert y.dtype == (torch.bfloat16 if read_by_linear else torch.float32)
        torch.testing.assert_close(y, own.to(y.dtype), rtol=4 * torch.finfo(y.dtype).eps, atol=0)
        if read_by_linear:
            assert (y == own.to(y.dtype)).double().mean() > 0.99


@pytest.mark.parametrize("name", ["tiny", "Llama", "Qwen3"])
def test_greedy_text_is_generates(native, name):  # noqa: F811
    plain, fused = twins(name)
    prompts = [[5, 6, 7, 8], [20, 21], [9, 30, 31, 32, 33, 34]]
    problems = [Problem(str(i), "") for i in range(3)]
    rollout = sample(fused, problems, prompts, 1, Sampling(24, temperature=0), seed=0)
    plain.model.set_attn_implementation("sdpa")
    for ids, completion in zip(prompts, rollout.completion_ids, strict=True):
        out = plain.model.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, pad_token_id=0
        )
        assert out[0, len(ids) :].tolist() == completion


def sampled(policy: Policy) -> Any:
    problems = [Problem(str(i), "") for i in range(3)]
    prompts = [[5, 6, 7, 8], [20, 21], [9, 30, 31, 32, 33, 34]]
    return sample(policy, problems, prompts, 4, Sampling(20), seed=3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "Llama", "Mistral", "Qwen2"])
def test_without_its_modules_a_token_has_the_same_bits(native, monkeypatch, name, dtype):  # noqa: F811
    monkeypatch.setattr(products, "PACKED", 1)  # of fp32: also small ones
    monkeypatch.setattr(burst, "MOST", 0)  # nor several tokens a call
    _, fused = twins(name)
    fused.compute, steps = dtype, []
    inner = lean.Decoder.__call__
    monkeypatch.setattr(lean.Decoder, "__call__", lambda *a: steps.append(1) or inner(*a))
    ours = sampled(fused)
    assert len(steps) >= 19 and not any("joined" in vars(m) for m in fused.model.modules())
    monkeypatch.setattr(lean, "of", lambda policy: policy.hidden)
    count, theirs = len(steps), sampled(fused)
    assert len(steps) == count and ours.completion_ids == theirs.completion_ids
    for a, b in zip(ours.logp, theirs.logp, strict=True):
        assert torch.equal(a, b)


def test_whoever_listens_or_changes_a_layer_gets_its_modules(native, monkeypatch):  # noqa: F811
    monkeypatch.setattr(products, "PACKED", 1)

    def whole(change: Any = None, name: str = "Llama") -> bool:
        _, fused = twins(name)
        if change:
            change(fused.model.model)
        with fused.inference():
            return lean.of(fused) != fused.hidden

    def other(decoder: Any) -> None:
        decoder.layers[1].self_attn.o_proj = nn.Sequential(decoder.layers[1].self_attn.o_proj)

    assert whole()
    assert not whole(lambda m: m.layers[1].mlp.up_proj.register_forward_hook(lambda *x: None))
    assert not whole(lambda m: m.layers[0].register_forward_pre_hook(lambda *x: None))
    assert not whole(lambda m: vars(m.layers[2].mlp).pop("forward"))
    assert not whole(other)
    assert not whole(lambda m: m.embed_tokens.bfloat16())  # a residual of another width
    assert not any(whole(name=name) for name in ("Qwen3", "SmolLM3"))
    plain, _ = twins("Llama")
    with plain.inference():
        assert lean.of(plain) == plain.hidden


def test_a_hook_on_a_norm_is_heard_with_its_residual(native):  # noqa: F811
    plain, fused = twins("Llama")
    seen: dict[str, list[torch.Tensor]] = {"plain": [], "fused": []}
    for name, policy in (("plain", plain), ("fused", fused)):
        norm = policy.model.model.layers[1].post_attention_layernorm
        norm.register_forward_hook(lambda m, x, y, name=name: seen[name].append(y.detach()))
    a, b = loss_of(fused), loss_of(plain)
    assert a.item() == pytest.approx(b.item(), rel=1e-6)
    (mine,), (theirs,) = seen["fused"], seen["plain"]
    torch.testing.assert_close(mine, theirs)


def test_a_copy_has_layers_of_its_own(native, tmp_path):  # noqa: F811
    _, fused = twins("Llama")
    before = loss_of(fused).item()
    ref = fused.frozen()
    assert replaced(ref.model) == replaced(fused.model)
    with torch.no_grad():
        for parameter in fused.model.parameters():
            parameter.mul_(1.5)
    assert loss_of(ref).item() == before and loss_of(fused).item() != before
    assert all(m.forward.__self__ is m for m in ref.model.modules() if "forward" in vars(m))
    again = pickle.loads(pickle.dumps(ref.model.model.layers[0].mlp))
    x = torch.randn(2, SIZES["hidden_size"])
    assert again.forward.__self__ is again
    torch.testing.assert_close(again(x), ref.model.model.layers[0].mlp(x))
    ref.save(tmp_path)
    loaded = models.load(str(tmp_path), dtype="fp32")
    assert not replaced(loaded.model) and loss_of(loaded).item() == pytest.approx(before, rel=1e-6)


def test_a_model_beside_another_has_its_layers(native):  # noqa: F811
    """As a reward model that comes back from a checkpoint must have those it was trained with."""
    for liger in ("auto", "off"):
        beside = models.load("tiny", layers=1, width=32, liger=liger)
        one = models.load("tiny", layers=1, width=32).follow(beside)
        assert cpu_layers.fused(one.model) == cpu_layers.fused(beside.model) == (liger == "auto")


def test_inference_leaves_the_layers_as_they_were(native, monkeypatch):  # noqa: F811
    monkeypatch.setattr(products, "PACKED", 1)
    _, fused = twins("tiny")
    before = replaced(fused.model)
    with fused.inference():
        assert len(replaced(fused.model)) > len(before)
    assert replaced(fused.model) == before


def test_what_does_not_fit_computes_as_it_did(native, monkeypatch):  # noqa: F811
    """A weight or an input that is no plain tensor, another device, float64, other dtypes."""

    class Other(torch.Tensor):
        pass

    _, fused = twins("tiny")
    layer = fused.model.model.layers[0]
    x = torch.randn(3, 64)
    want = [type(m).forward(m, x) for m in (layer.input_layernorm, layer.mlp)]
    monkeypatch.setattr(cpu_layers, "native", None)  # nothing of ours is reached
    for module, out in zip((layer.input_layernorm, layer.mlp), want, strict=True):
        assert torch.equal(module(x.as_subclass(Other)).as_subclass(torch.Tensor), out)
        assert module.to("meta")(x.to("meta")).device.type == "meta"
    empty = twins("tiny")[1].model.model.layers[0].input_layernorm
    empty.weight.data = torch.empty(0)  # as a shard's whole weight is during an update
    with pytest.raises(RuntimeError, match="must match"):
        empty(x)
    layer = twins("tiny")[1].model.double().model.layers[0]
    for module in (layer.input_layernorm, layer.mlp):
        assert module(x.double()).isfinite().all()


@pytest.mark.parametrize("name", ["Gemma2", "Olmo2"])
def test_other_architectures_keep_their_layers(native, name):  # noqa: F811
    policy = built(name)
    assert not layers.fuse(policy.model, "auto") and not replaced(policy.model)


def test_only_silu_is_silu(native):  # noqa: F811
    _, tokenizer = models.tiny.build(width=32, layers=1)
    config = transformers.LlamaConfig(vocab_size=50, hidden_act="gelu", **SIZES)
    model = transformers.AutoModelForCausalLM.from_config(config)
    assert layers.fuse(model, "auto") and "LlamaMLP" not in replaced(model)


def test_off_and_not_built(native, monkeypatch):  # noqa: F811
    policy = built("Llama")
    assert not layers.fuse(policy.model, "off") and not replaced(policy.model)
    monkeypatch.setattr(cpu_layers.importlib.util, "find_spec", lambda name: None)
    assert not layers.fuse(policy.model, "auto") and not replaced(policy.model)


def test_an_adapter_learns_the_same(native):  # noqa: F811
    pytest.importorskip("peft")
    from reasonrl import lora

    both = []
    for policy in twins("Llama"):
        policy = lora.trainable(policy, lora_rank=2, seed=1)
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        loss = loss_of(policy)
        policy.model.zero_grad()
        loss.backward()
        named = policy.model.named_parameters()
        both.append({n: p.grad for n, p in named if p.grad is not None})
    assert far(both[1], both[0]) <= 3e-6 and len(both[0]) == 2 * 7 * 3
