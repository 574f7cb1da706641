"""Sampling: transformers' greedy tokens, the right distribution, independent rows."""

import gc
import math
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

from reasonrl import decoding, models, products
from reasonrl.attention import Packed
from reasonrl.records import InputError, Problem
from reasonrl.rollout import sample
from reasonrl.sampling import Sampling, choose
from reasonrl.slots import Slots


@pytest.fixture(scope="module")
def policy():
    policy = models.load("tiny", dtype="fp32", seed=5, width=64, layers=2)
    with torch.no_grad():  # wider logits, so that greedy paths differ between prompts
        for p in policy.model.parameters():
            if p.dim() > 1:
                p.mul_(6)
    return policy


PROMPTS = [[10, 20, 30], [11, 7, 9, 40, 41, 42], [50], [33, 34]]


def problems(n=4):
    return [Problem(str(i), "") for i in range(n)]


@pytest.mark.parametrize("packed", [1, 1 << 30])
def test_greedy_equals_transformers_generate(policy, packed, monkeypatch):
    monkeypatch.setattr(products, "PACKED", packed)
    rollout = sample(policy, problems(), PROMPTS, 1, Sampling(40, temperature=0), seed=0)
    policy.model.set_attn_implementation("sdpa")
    try:
        for ids, completion in zip(PROMPTS, rollout.completion_ids, strict=True):
            out = policy.model.generate(
                torch.tensor([ids]), max_new_tokens=40, do_sample=False, pad_token_id=0
            )
            assert out[0, len(ids) :].tolist() == completion
    finally:
        policy.model.set_attn_implementation("reasonrl")


def test_logp_is_the_trainers_at_the_sampling_temperature(policy):
    rollout = sample(policy, problems(), PROMPTS, 3, Sampling(20, temperature=0.7), seed=4)
    for b, completion in enumerate(rollout.completion_ids):
        prompt = PROMPTS[int(rollout.group[b])]
        ids = torch.tensor(prompt + completion)
        plan = Packed([(0, len(ids), ())], "cpu")
        with torch.no_grad():
            hidden = policy.hidden(ids, torch.arange(len(ids)), plan)
            logp = (policy.logits(hidden[len(prompt) - 1 : -1]) / 0.7).log_softmax(-1)
        expected = logp.gather(1, torch.tensor(completion)[:, None])[:, 0]
        assert torch.allclose(rollout.logp[b], expected, atol=2e-4)


def test_a_row_does_not_depend_on_its_neighbours(policy):
    whole = sample(policy, problems(), PROMPTS, 4, Sampling(24), seed=9)
    apart = sample(policy, problems(), PROMPTS, 4, Sampling(24), seed=9, rows=4)
    assert whole.completion_ids == apart.completion_ids
    other = sample(policy, problems(), PROMPTS, 4, Sampling(24), seed=10)
    assert other.completion_ids != whole.completion_ids
    assert len({tuple(c) for c in whole.completion_ids[:4]}) > 1


def test_rows_end_at_eos_and_say_so(policy):
    rollout = sample(policy, problems(), PROMPTS, 16, Sampling(64), seed=2)
    eos = policy.tokenizer.eos_token_id
    ended = [c[-1] == eos for c in rollout.completion_ids]
    assert ended == list(rollout.finished) and any(ended)
    assert all(eos not in c[:-1] for c in rollout.completion_ids)
    assert all(len(c) == 64 for c, f in zip(rollout.completion_ids, ended, strict=True) if not f)


def test_choose_draws_from_the_softmax():
    logits = torch.randn(1, 700, generator=torch.Generator().manual_seed(0)) * 2
    n = 40_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # every quantile once
    token, logp, chosen = choose(logits.expand(n, -1), uniform, Sampling(1, temperature=1.3))
    p = (logits[0] / 1.3).softmax(-1)
    share = torch.bincount(token, minlength=700) / n
    assert (share - p).abs().max() <= 2 / n
    assert torch.allclose(logp, p[token].log(), atol=1e-5)
    assert torch.allclose(logp, chosen, atol=1e-6)  # nothing is truncated


def test_top_k_and_top_p_truncate_and_record_both():
    p = torch.tensor([0.4, 0.3, 0.2, 0.06, 0.04])
    uniform = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    logits = p.log().expand(1000, -1)
    token, logp, chosen = choose(logits, uniform, Sampling(1, top_k=2))
    assert set(token.tolist()) == {0, 1}
    assert torch.allclose(chosen, (p[token] / 0.7).log(), atol=1e-6)
    assert torch.allclose(logp, p[token].log(), atol=1e-6)
    token, _, chosen = choose(logits, uniform, Sampling(1, top_p=0.75))
    assert set(token.tolist()) == {0, 1, 2}  # the smallest set whose mass reaches 0.75
    assert torch.allclose(chosen, (p[token] / 0.9).log(), atol=1e-6)


def test_extreme_uniforms_stay_inside_the_vocabulary():
    logits = torch.full((3, 257), -math.inf)
    logits[:, 256] = 0.0
    uniform = torch.tensor([0.0, 0.5, 1 - 2**-53], dtype=torch.float64)
    token, logp, _ = choose(logits, uniform, Sampling(1))
    assert token.tolist() == [256] * 3 and torch.equal(logp, torch.zeros(3))


def test_zero_budget_gives_empty_completions(policy):
    rollout = sample(policy, problems(), PROMPTS, 2, Sampling(0), seed=0)
    assert list(rollout.completion_ids) == [[]] * 8 and not any(rollout.finished)


def test_prompts_that_do_not_fit_are_named(policy):
    with pytest.raises(InputError, match=r"problem 0: prompt of 1020 tokens \+ .* 1024"):
        sample(policy, problems(1), [[5] * 1020], 2, Sampling(10), seed=0)
    with pytest.raises(InputError, match="problem 0: the prompt has no tokens"):
        sample(policy, problems(1), [[]], 2, Sampling(10), seed=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_packed_weights_follow_the_model_and_leave_no_trace(policy, dtype, monkeypatch):
    monkeypatch.setattr(products, "PACKED", 1)  # of fp32: also small ones
    own = models.Policy(policy.model, policy.tokenizer, dtype)
    first = sample(own, problems(), PROMPTS, 1, Sampling(8, temperature=0), seed=0)
    weight = policy.head.weight.detach().clone()
    with torch.no_grad():
        policy.head.weight[first.completion_ids[0][0]] = 0  # the first choice is out now
    second = sample(own, problems(), PROMPTS, 1, Sampling(8, temperature=0), seed=0)
    with torch.no_grad():
        policy.head.weight.copy_(weight)
    assert second.completion_ids != first.completion_ids
    assert all("forward" not in m.__dict__ for m in policy.model.modules())
    assert own.head.weight.dtype == torch.float32


def test_layers_of_one_input_cast_it_once_and_see_it_change():
    cast = products.Cast(torch.bfloat16)
    x = torch.ones(3)
    first = cast(x)
    assert cast(x) is first and first.dtype == torch.bfloat16
    x += 1
    assert cast(x).tolist() == [2, 2, 2]
    assert cast(torch.zeros(3)).tolist() == [0, 0, 0] and cast(x).tolist() == [2, 2, 2]


def test_waiting_prompts_enter_while_others_still_run(policy, monkeypatch):
    monkeypatch.setattr(models.Policy, "eos", frozenset(range(20)))  # rows of all lengths
    prompts = [[10 + i, 20, 30 + i] for i in range(12)]
    whole = sample(policy, problems(12), prompts, 2, Sampling(48), seed=3)
    entered, going = [], []

    def enter(self, at):
        entered.append(len(at) // 2)
        going.append(int((~self.done).sum()))
        inner(self, at)

    inner = decoding.Decoding._enter
    monkeypatch.setattr(decoding.Decoding, "_enter", enter)
    apart = sample(policy, problems(12), prompts, 2, Sampling(48), seed=3, rows=8)
    assert apart.completion_ids == whole.completion_ids
    assert sum(entered) == 12 and max(entered[1:]) < 4 and max(going) > 0


def test_a_row_that_ended_writes_nothing_more(policy, monkeypatch):
    """As on a GPU: eight steps between two looks, slots of one width for good."""
    monkeypatch.setattr(models.Policy, "eos", frozenset(range(4)))
    prompts = [[10 + i, 20, 30 + i][: 1 + i % 3] for i in range(9)]
    plain = sample(policy, problems(9), prompts, 3, Sampling(45), seed=5)
    assert not all(plain.finished) and any(plain.finished)
    init = Slots.__init__

    def fixed(self, *args):
        init(self, *args)
        self.fixed, self.width = True, self.most

    monkeypatch.setattr(Slots, "__init__", fixed)
    monkeypatch.setattr(decoding, "LOOK", {"cpu": 8})
    monkeypatch.setattr(decoding, "SHRINK", {"cpu": 0.5})
    for rows in (256, 9):
        again = sample(policy, problems(9), prompts, 3, Sampling(45), seed=5, rows=rows)
        assert again.completion_ids == plain.completion_ids
        for a, b in zip(again.logp, plain.logp, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_finished_batch_is_freed_at_once(policy, monkeypatch):
    """Not by a collection that comes at some time: it holds keys and values, and a recording."""
    made = []
    init = decoding.Decoding.__init__

    def spy(self, *args):
        init(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(decoding.Decoding, "__init__", spy)
    gc.disable()
    try:
        sample(policy, problems(), PROMPTS, 2, Sampling(20), seed=0)
        assert made[0]() is None
    finally:
        gc.enable()


def test_a_recorded_step_is_replayed_until_the_shapes_change(monkeypatch):
    seen = []
    step = decoding.Replayed(lambda: seen.append("step"))
    graph = SimpleNamespace(replay=lambda: seen.append("replay"))
    monkeypatch.setattr(decoding, "_record", lambda what: seen.append("record") or graph)
    for _ in range(3):
        step()
    step.forget()
    step()
    step()
    assert seen == ["step", "record", "replay", "replay", "step", "record", "replay"]


def test_a_step_that_cannot_be_recorded_is_said_once_and_run(monkeypatch, caplog):
    seen = []
    step = decoding.Replayed(lambda: seen.append("step"))

    def refuse(_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(decoding, "_record", refuse)
    monkeypatch.setattr(decoding, "_kept", threading.local())
    for _ in range(4):
        step()
    step.forget()
    step()
    other = decoding.Replayed(lambda: seen.append("other"))
    other()
    other()
    assert seen == ["step"] * 5 + ["other"] * 2
    assert [r.getMessage() for r in caplog.records] == [
        "rollout: no CUDA graph (operation not permitted when stream is capturing); slower, a"
        " step at a time"
    ]


def test_graphs_is_auto_or_off():
    with pytest.raises(InputError, match="graphs: expected auto or off, got 'on'"):
        models.load("tiny", width=32, layers=1, graphs="on")
