"""Several tokens a call: the text and the log-probabilities of the ways beside it, prompts that
wait, weights that move, and what keeps the other ways."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_cpu_layers import built, twins
from test_native import native  # noqa: F401, fixture
from torch import nn

from reasonrl import burst, decoding, layers, models, products
from reasonrl.logprobs import rollout_logp
from reasonrl.models import Policy
from reasonrl.records import Problem
from reasonrl.rollout import Sampling, sample

PROMPTS = [[5, 6, 7, 8], [20, 21], [9, 30, 31, 32, 33, 34]]
SPREAD = [[10 + i, 20, 30 + i][: 1 + i % 3] for i in range(9)]


def drawn(policy: Policy, prompts=PROMPTS, group=4, how=None, rows=256) -> Any:
    problems = [Problem(str(i), "") for i in range(len(prompts))]
    return sample(policy, problems, prompts, group, how or Sampling(40), seed=3, rows=rows)


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Which way tokens were made."""
    seen: list[str] = []
    for name in ("_step", "_choose"):
        inner = getattr(burst.Burst, name)
        monkeypatch.setattr(
            burst.Burst, name, lambda *a, inner=inner, name=name: seen.append(name) or inner(*a)
        )
    return seen


def far(a: Any, b: Any) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a.logp, b.logp, strict=True))


@pytest.mark.parametrize("name", ["tiny", "Llama", "Mistral", "Qwen2", "Qwen3"])
def test_the_text_is_that_of_the_modules(native, calls, name):  # noqa: F811
    plain, fused = twins(name)
    ours = drawn(fused)
    assert 3 <= len(calls) <= 4 and calls[0] == "_step"
    theirs = drawn(plain)
    assert len(calls) <= 4 and ours.completion_ids == theirs.completion_ids
    assert far(ours, theirs) <= 1e-5 and ours.sampling_logp is None


@pytest.mark.parametrize("name", ["tiny", "Qwen2", "Qwen3"])
def test_in_bf16_log_p_is_the_trainers_as_nearly_as_without_it(native, monkeypatch, name):  # noqa: F811
    _, fused = twins(name)
    fused.compute = torch.bfloat16
    apart = []
    for takes in (burst.takes, lambda policy: False):
        monkeypatch.setattr(burst, "takes", takes)
        rollout = drawn(fused, group=16)
        with torch.no_grad():
            again = rollout_logp(fused, rollout, 4096)
        apart.append((torch.cat(rollout.logp) - again).abs())
    ours, theirs = apart
    assert ours.mean() <= 1.25 * theirs.mean() and ours.max() <= 2 * theirs.max()


@pytest.mark.parametrize("how", [
    Sampling(30, temperature=0.0), Sampling(30, top_k=5), Sampling(30, temperature=0.7, top_p=0.8),
    Sampling(1), Sampling(17, temperature=1.6),
], ids=str)  # fmt: skip
def test_every_way_to_choose(native, calls, how):  # noqa: F811
    plain, fused = twins("Llama")
    ours, theirs = drawn(fused, how=how), drawn(plain, how=how)
    assert ours.completion_ids == theirs.completion_ids and far(ours, theirs) <= 1e-5
    assert ("_choose" in calls) == (how.temperature == 0 or how.truncates)
    if how.truncates:
        for a, b in zip(ours.sampling_logp, theirs.sampling_logp, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [Sampling(45), Sampling(45, top_p=0.9)], ids=str)
def test_prompts_wait_and_rows_end(native, monkeypatch, how):  # noqa: F811
    monkeypatch.setattr(models.Policy, "eos", frozenset(range(4)))
    plain, fused = twins("tiny")
    whole, theirs = drawn(fused, SPREAD, 3, how), drawn(plain, SPREAD, 3, how)
    assert not all(whole.finished) and any(whole.finished)
    assert whole.completion_ids == theirs.completion_ids
    entered, inner = [], burst.Burst._enter
    monkeypatch.setattr(
        burst.Burst, "_enter", lambda s, at: entered.append(len(at)) or inner(s, at)
    )
    for rows, fits in ((9, 9), (3, 3), (1, 3)):
        entered.clear()
        apart = drawn(fused, SPREAD, 3, how, rows)
        assert apart.completion_ids == whole.completion_ids
        assert sum(entered) == 27 and max(entered) == fits
        for a, b in zip(apart.logp, whole.logp, strict=True):
            assert torch.equal(a, b)


def test_slots_that_grow_hold_what_they_held(native, monkeypatch):  # noqa: F811
    _, fused = twins("Llama")
    want, widths, inner = drawn(fused, how=Sampling(90)), [], burst.Burst._widen

    def widen(self, longest):
        inner(self, longest)
        widths.append(self.width)

    monkeypatch.setattr(burst, "AT_ONCE", 0)
    monkeypatch.setattr(burst.Burst, "_widen", widen)
    got = drawn(fused, how=Sampling(90))
    assert len(set(widths)) >= 3 and max(widths) <= 96
    assert got.completion_ids == want.completion_ids
    assert all(torch.equal(a, b) for a, b in zip(got.logp, want.logp, strict=True))


def test_weights_are_those_of_now_and_nothing_stays(native):  # noqa: F811
    plain, fused = twins("tiny")
    before = [vars(module).keys() for module in fused.model.modules()]
    first = drawn(fused)
    with torch.no_grad():
        for policy in (plain, fused):
            for parameter in policy.model.parameters():
                parameter.mul_(1.5)
    assert drawn(fused).completion_ids == drawn(plain).completion_ids != first.completion_ids
    assert [vars(module).keys() for module in fused.model.modules()] == before


def turned_back(rotary: Any) -> None:
    inner = rotary.forward
    rotary.forward = lambda x, position_ids: inner(x, -position_ids)


@pytest.mark.parametrize("change", [
    lambda rotary: rotary.inv_freq.data.mul_(0.1),  # which no version counts
    lambda rotary: setattr(rotary, "attention_scaling", 2.0),
    turned_back,
], ids=["frequencies", "scaling", "forward"])  # fmt: skip
def test_angles_are_those_of_now(native, change):  # noqa: F811
    plain, fused = twins("tiny")
    drawn(fused, how=Sampling(20))
    first = drawn(fused)  # longer
    assert first.completion_ids == drawn(plain).completion_ids
    for policy in (plain, fused):
        change(policy.model.model.rotary_emb)
    assert drawn(fused).completion_ids == drawn(plain).completion_ids != first.completion_ids


def test_a_watchdog_hears_of_it(native, monkeypatch):  # noqa: F811
    beats: list[int] = []
    monkeypatch.setattr(decoding, "beat", lambda: beats.append(1))
    drawn(twins("tiny")[1], how=Sampling(49))
    assert len(beats) == 3  # 16 tokens a call, after the first token


def test_what_it_does_not_take(native, monkeypatch):  # noqa: F811
    def taken(change: Any = None, name: str = "Llama", **options: Any) -> bool:
        if options:
            policy = built(name, **options)
            assert layers.fuse(policy.model, "auto")
        else:
            _, policy = twins(name)
        if change:
            change(policy)
        return burst.takes(policy)

    def other(policy: Policy) -> None:
        attn = policy.model.model.layers[1].self_attn
        attn.o_proj = nn.Sequential(attn.o_proj)

    def compute(dtype: torch.dtype) -> Any:
        return lambda policy: setattr(policy, "compute", dtype)

    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    yarn = dynamic | {"rope_type": "yarn"}
    assert all(taken(name=name) for name in ("tiny", "Llama", "Mistral", "Qwen2", "Qwen3"))
    assert taken(compute(torch.bfloat16)) and taken(rope_parameters=yarn)
    assert not taken(rope_parameters=dynamic)  # angles that depend on how long a text is
    assert not taken(compute(torch.float16))
    assert not taken(name="SmolLM3")
    assert not taken(
        lambda p: vars(p.model.model.layers[1].self_attn.k_norm).pop("forward"), "Qwen3"
    )
    assert not taken(other)
    hooked = [
        lambda p: p.model.model.layers[1].mlp.up_proj, lambda p: p.model.model.norm,
        lambda p: p.head, lambda p: p.model.model.embed_tokens,
    ]  # fmt: skip
    for module in hooked:
        assert not taken(lambda p, m=module: m(p).register_forward_hook(lambda *x: None))
    assert not taken(lambda p: p.model.model.embed_tokens.half())
    assert not taken(lambda p: p.model.model.norm.bfloat16())  # norms of two kinds
    assert not taken(lambda p: setattr(p.model.config, "logit_scale", 0.5))
    assert not taken(lambda p: setattr(p.model.config, "final_logit_softcapping", 30.0))
    assert not taken(lambda p: p.model.to("meta"))
    assert not burst.takes(twins("Llama")[0])  # transformers' own layers
    monkeypatch.setattr(burst, "MOST", 1000)
    assert not taken()


def test_a_model_that_it_does_not_take_is_prepared_as_ever(native, monkeypatch):  # noqa: F811
    _, fused = twins("Llama")
    seen, inner = [], products.prepared
    monkeypatch.setattr(products, "prepared", lambda *a: seen.append(1) or inner(*a))
    want = drawn(fused)
    assert not seen
    monkeypatch.setattr(burst, "MOST", 0)
    assert drawn(fused).completion_ids == want.completion_ids and seen
