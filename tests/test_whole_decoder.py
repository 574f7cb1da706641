"""A decoder on a CPU without the calls of its modules: the same bits, and the modules wherever one
of them is another or somebody listens."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from test_cpu_layers import NAMES, loss_of, twins
from test_native import native  # noqa: F401, fixture
from test_packing import gradients, made_up
from torch import nn

from bench.step_ours import Ours, Settings
from reasonrl import attention, implementations, whole_decoder
from reasonrl.kernels import native_chain, native_products
from reasonrl.kernels.native import core


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


ROWS = {
    "some": [4, 5, 9],
    "one several times, in any order": [9, 4, 9, 0, 4, 4],
    "all": range(11),
    "none": [],
}


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("way", ["by modules", "by a graph", "straight"])
def test_hidden_states_of_some_tokens(chains, way, rows, monkeypatch):
    if way == "by modules":
        monkeypatch.setattr(whole_decoder, "computed", lambda *given: None)
    _, fused = twins("Llama")
    layout = [(0, 5, [3, 3])]
    given = torch.arange(11), torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7])
    rows, taken = torch.tensor(ROWS[rows], dtype=torch.long), []
    for some in (rows, None):
        with whole_decoder.direct() if way == "straight" else nullcontext():
            hidden = fused.hidden(*given, attention.Packed(layout, "cpu"), rows=some)
            hidden = hidden if some is not None else hidden[rows]
            fused.model.zero_grad()
            hidden.square().sum().backward()
        taken.append((hidden, grads_of(fused)))
    (got, found), (want, wanted) = taken
    assert torch.equal(got, want) and bool(chains) == (way == "straight")
    for name, grad in wanted.items():
        if grad is None:
            assert found[name] is None
        else:
            torch.testing.assert_close(found[name], grad, rtol=1e-5, atol=1e-6)


def straight(policy, losses) -> dict[str, torch.Tensor | None]:
    """Gradients of several losses, one after the other, each gone straight into the weights."""
    policy.model.zero_grad()
    with whole_decoder.direct():
        for _ in range(losses):
            loss_of(policy).backward()
    return grads_of(policy)


def grads_of(policy) -> dict[str, torch.Tensor | None]:
    return {name: p.grad for name, p in policy.model.named_parameters()}


@pytest.fixture
def chains(native, monkeypatch) -> list[Any]:  # noqa: F811
    """All that are made, of tokens that one of them takes."""
    kind, made = native_chain.Chain, []

    class Seen(kind):
        def takes(self) -> bool:
            made.append(self)
            return super().takes()

    monkeypatch.setattr(whole_decoder, "native", lambda op: {"Chain": Seen}.get(op) or inner(op))
    inner = implementations.native
    return made


@pytest.mark.parametrize("frozen", ["nothing", "embed", "norm", "layers.1", "v_proj", "all but up"])
@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["tiny", "Qwen2", "Qwen3"])
def test_gradients_that_go_straight_are_those_of_a_graph(chains, name, compute, frozen):
    """Tied words and words apart, biases and norms of heads; all of it twice, so that they add."""
    _, fused = twins(name)
    fused.compute = compute
    for place, parameter in fused.model.named_parameters():
        off = "up_proj" not in place if frozen == "all but up" else frozen in place
        parameter.requires_grad_(not off)
    loss_of(fused).backward()
    loss_of(fused).backward()
    wanted, made = grads_of(fused), len(chains)
    found = straight(fused, 2)
    takes = native_products.fast(core().isa(), compute)
    assert made == 0 and len(chains) == 2 and all(not chain.held for chain in chains) == takes
    for place, want in wanted.items():
        got = found[place]
        if got is None or want is None:
            assert got is want, place
        elif "embed" in place:  # onto what is there: its sums in another order
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-7)
        else:
            assert torch.equal(got, want), place


def test_a_padding_word_learns_nothing(chains):
    _, fused = twins("Qwen2")  # words of a head apart
    table, place = fused.model.model.embed_tokens, "model.embed_tokens.weight"
    word = made_up([[7, 1, 12], [3, 0, 8, 8]]).prompt_ids[0][0]  # of loss_of's
    assert straight(fused, 1)[place][word].any()
    table.padding_idx = word
    fused.model.zero_grad()
    loss_of(fused).backward()
    want = grads_of(fused)[place]
    found = straight(fused, 1)[place]
    assert torch.equal(found, want) and not found[word].any()
    twice = straight(fused, 2)[place]
    torch.testing.assert_close(twice, 2 * want)
    assert not twice[word].any() and len(chains) == 4


LISTENERS: dict[str, Any] = {
    "to a gradient": lambda m: m.layers[1].mlp.up_proj.weight.register_hook(lambda g: None),
    "to a weight that has learnt": lambda m: m.norm.weight.register_post_accumulate_grad_hook(
        lambda p: None
    ),
    "words of a bounded norm": lambda m: setattr(m.embed_tokens, "max_norm", 1e9),
    "words by their number": lambda m: setattr(m.embed_tokens, "scale_grad_by_freq", True),
    "nothing learns": lambda m: m.requires_grad_(False),
}


@pytest.mark.parametrize("change", LISTENERS)
def test_where_a_graph_is_needed(chains, change):
    _, fused = twins("Qwen2")
    LISTENERS[change](fused.model.model)
    loss_of(fused).backward()
    wanted = grads_of(fused)
    found = straight(fused, 1)
    assert not chains and set(found) == set(wanted)
    for place, got in found.items():
        want = wanted[place]
        assert got is want or (want is not None and torch.equal(got, want)), place


def test_a_direct_loss_has_one_backward_and_other_threads_their_own_way(chains):
    if not native_products.fast(core().isa(), torch.float32):
        pytest.skip("layers are no single calls on this CPU")
    _, fused = twins("Llama")
    with whole_decoder.direct():
        loss = loss_of(fused)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(lambda: loss_of(fused)).result()
        with torch.no_grad():
            loss_of(fused)
    assert len(chains) == 1
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a loss has one backward"):
        loss.backward()
    other.backward(retain_graph=True)
    other.backward()
    loss_of(fused).backward()
    assert len(chains) == 1


def test_an_update_goes_straight(chains, native):  # noqa: F811
    side = Ours(Settings("tiny", prompts=1, group=2, tokens=4, prompt_tokens=8, repeats=1), "fp32")
    side.step(0)
    assert len(chains) == 1
