"""Packed, prefix-shared batches: the numbers of separate sequences, and nothing lost or doubled."""

import os

import pytest
import torch

from reasonrl import attention, models
from reasonrl.attention import Packed
from reasonrl.batch import cu_seqlens, pack
from reasonrl.loss import LossSpec, linear_policy_loss
from reasonrl.records import Problem, Rollout


@pytest.fixture(scope="module")
def policy():
    return models.load("tiny", dtype="fp32", seed=3, width=64, layers=2)


def made_up(sizes, prompts=(5, 9), seed=0):
    """A rollout with given completion lengths: sizes[g] lists the lengths of group g."""
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(4, 90, (n,), generator=generator).tolist()  # noqa: E731
    completions = [ids(n) for row in sizes for n in row]
    return Rollout(
        problems=[Problem(str(g), "") for g in range(len(sizes))],
        prompt_ids=[ids(n) for n in prompts[: len(sizes)]],
        group=torch.tensor([g for g, row in enumerate(sizes) for _ in row]),
        completion_ids=completions,
        text=[""] * len(completions),
        finished=[True] * len(completions),
        logp=[torch.zeros(len(c)) for c in completions],
        pieces=[[0] * (len(c) + 1) for c in completions],
    )


def packed_loss(policy, rollout, advantage, tokens, spec):
    loss = 0.0
    for batch in pack(rollout, advantage, tokens):
        plan = Packed(batch.layout, "cpu")
        hidden = policy.hidden(batch.input_ids, batch.position_ids, plan)
        out = linear_policy_loss(
            hidden[batch.predict],
            policy.head.weight,
            batch.target,
            None,
            batch.advantage,
            spec,
            cu_seqlens=batch.cu_seqlens,
            denominator=len(rollout.text),
        )
        loss = loss + out.loss
    return loss


def separate_loss(policy, rollout, advantage, spec):
    """Each completion in a sequence of its own through transformers' SDPA, logits and all."""
    starts = cu_seqlens(rollout).tolist()
    policy.model.set_attn_implementation("sdpa")
    try:
        total = 0.0
        for b, completion in enumerate(rollout.completion_ids):
            if not completion:
                continue
            prompt = list(rollout.prompt_ids[int(rollout.group[b])])
            logits = policy.model(torch.tensor([prompt + completion])).logits[0]
            logp = logits[len(prompt) - 1 : -1].log_softmax(-1)
            taken = logp.gather(1, torch.tensor(completion)[:, None])[:, 0]
            weight = advantage[starts[b] : starts[b + 1]]
            total = total - (weight * taken).mean()
        return total / len(rollout.text)
    finally:
        policy.model.set_attn_implementation("reasonrl")


def gradients(policy, loss):
    policy.model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in policy.model.named_parameters()}


@pytest.mark.parametrize("tokens", [10_000, 40, 1])
def test_prefix_sharing_equals_separate_sequences(policy, tokens):
    rollout = made_up([[7, 1, 12], [3, 0, 8, 8]])
    advantage = torch.randn(
        int(cu_seqlens(rollout)[-1]), generator=torch.Generator().manual_seed(1)
    )
    spec = LossSpec.named("reinforce", reduce="seq_mean")
    ours = packed_loss(policy, rollout, advantage, tokens, spec)
    theirs = separate_loss(policy, rollout, advantage, spec)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
    a, b = gradients(policy, ours), gradients(policy, theirs)
    for name in a:
        assert (a[name] - b[name]).norm() <= 1e-5 * b[name].norm(), name


def test_packing_keeps_every_token_once():
    rollout = made_up([[7, 1, 12], [3, 0, 8, 8]])
    n = int(cu_seqlens(rollout)[-1])
    seen = torch.cat([b.advantage for b in pack(rollout, torch.arange(n).float(), 30)])
    assert sorted(seen.tolist()) == list(range(n))


def test_packing_respects_the_budget_and_repeats_a_split_prompt():
    rollout = made_up([[7, 7, 7, 7]], prompts=(5,))
    for tokens, ends in ((17, False), (19, True)):  # as many as two completions need
        batches = list(pack(rollout, torch.zeros(28), tokens, ends=ends))
        assert [len(b.input_ids) for b in batches] == [tokens, tokens]
        assert all(b.input_ids[:5].tolist() == list(rollout.prompt_ids[0]) for b in batches)


def test_first_token_of_every_completion_is_predicted_by_the_last_prompt_token():
    rollout = made_up([[2, 3]], prompts=(5,))
    (batch,) = pack(rollout, torch.zeros(5), 100)
    assert batch.predict.tolist() == [4, 5, 4, 6, 7]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 5, 6]


def test_the_last_tokens_stand_in_a_batch_where_they_are_asked_for():
    rollout = made_up([[2, 3, 1]], prompts=(5,))
    few, every = (next(pack(rollout, None, 100, ends=ends)) for ends in (False, True))
    assert every.layout == [(0, 5, [2, 3, 1])] and few.layout == [(0, 5, [1, 2, 0])]
    assert every.predict.tolist() == [4, 5, 4, 7, 8, 4]
    assert every.position_ids.tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 5]
    ids = [list(rollout.prompt_ids[0]), *map(list, rollout.completion_ids)]
    assert every.input_ids.tolist() == [i for row in ids for i in row]
    for batch in (few, every):
        assert batch.target.tolist() == [i for row in ids[1:] for i in row]


def test_long_rows_take_sdpa_and_agree(policy, monkeypatch):
    rollout = made_up([[7, 1, 12], [3, 8]])
    advantage = torch.ones(31)
    spec = LossSpec.named("reinforce")
    small = gradients(policy, packed_loss(policy, rollout, advantage, 999, spec))
    monkeypatch.setattr("reasonrl.attention.SMALL", 0)
    large = gradients(policy, packed_loss(policy, rollout, advantage, 999, spec))
    for name in small:
        assert (small[name] - large[name]).norm() <= 1e-5 * large[name].norm(), name


def test_unsupported_attention_options_are_refused(policy):
    layer = policy.model.model.layers[0].self_attn
    from reasonrl.attention import attention

    q = torch.zeros(1, 4, 3, 16)
    with pytest.raises(ValueError, match="needs plan="):
        attention(layer, q, q, q, None, scaling=1.0)
    with pytest.raises(ValueError, match="sliding_window"):
        attention(layer, q, q, q, None, scaling=1.0, plan=object(), sliding_window=4)


def test_compiled_products_of_many_lengths_are_bounded(monkeypatch):
    """Every packed batch has a new length; oneDNN's own limit of 1024 grew by gigabytes a run."""
    monkeypatch.delenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", raising=False)
    models.load("tiny", dtype="fp32", width=32, layers=1)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "64"
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")  # the user's own word
    models.load("tiny", dtype="fp32", width=32, layers=1)
    assert os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] == "7"


@pytest.mark.parametrize("rows", [1, 5])
def test_grouped_heads_by_any_path(rows, monkeypatch):
    """Four query heads on two key heads: products, and SDPA with and without heads as rows."""
    g = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(3, h, n, 8, generator=g) for h, n in ((4, rows), (2, 6), (2, 6)))
    sees = torch.arange(6) <= torch.tensor([5, 2, 3])[:, None, None, None]
    plain = attention.attend(q, k, v, sees, 0.3)
    monkeypatch.setattr(attention, "SMALL", -1)
    torch.testing.assert_close(attention.attend(q, k, v, sees, 0.3), plain)
