"""The door: both layouts, masked poison, errors and their texts, which implementation runs."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reasonrl import LossSpec, implementations, ops, policy_loss
from reasonrl import systems as sy
from reasonrl.loss import NAMED
from reasonrl.records import KernelUnavailable

POISON = (math.nan, math.inf, -math.inf, 1e30)


@st.composite
def ragged(draw):
    """Lengths, width, a mask within the lengths, and the packed offsets."""
    lengths = draw(st.lists(st.integers(0, 7), min_size=0, max_size=5))
    width = max([*lengths, draw(st.integers(0, 7))], default=0)
    seed = draw(st.integers(0, 2**20))
    g = torch.Generator().manual_seed(seed)
    inside = torch.arange(width) < torch.tensor(lengths, dtype=torch.int64)[:, None]
    keep = inside & (torch.rand(inside.shape, generator=g) > draw(st.sampled_from([0.0, 0.3, 1.0])))
    cu = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
    return inside, keep, cu, g


def poisoned(x: torch.Tensor, keep: torch.Tensor, g: torch.Generator) -> torch.Tensor:
    bad = torch.tensor(POISON)[torch.randint(0, len(POISON), x.shape, generator=g)]
    return torch.where(keep, x, bad.to(x.dtype))


@given(ragged(), st.sampled_from(sorted(NAMED)), st.booleans())
def test_policy_loss_is_the_same_padded_packed_and_poisoned(case, name, per_token):
    inside, keep, cu, g = case
    spec = LossSpec.named(name, kl_coef=0.1, entropy_coef=0.1, max_length=9)
    wide = {k: torch.randn(inside.shape, generator=g) * 0.3 for k in "l old ref ent w a".split()}
    if not per_token:
        wide["a"] = torch.randn(inside.shape[0], generator=g)
    results = []
    for layout in ("padded", "poisoned", "packed"):
        v = dict(wide)
        if layout != "padded":
            v = {k: poisoned(x, keep, g) if x.dim() == 2 else x for k, x in wide.items()}
        known = {"mask": keep}
        if layout == "packed":
            v = {k: x[inside] if x.dim() == 2 else x for k, x in v.items()}
            known = {"mask": keep[inside].int(), "cu_seqlens": cu.int()}
        leaf = v["l"].clone().requires_grad_()
        ent = v["ent"].clone().requires_grad_()
        out = policy_loss(
            leaf, v["old"], v["a"], spec, ref_logp=v["ref"], entropy=ent, is_weight=v["w"], **known
        )
        grads = torch.autograd.grad(out.loss, (leaf, ent))
        if layout != "packed":
            assert all(x[~keep].eq(0).all() for x in grads)
            grads = [x[inside] for x in grads]
        results.append((out.loss, *grads, *out.metrics.values()))
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            torch.testing.assert_close(x, y, rtol=2e-6, atol=1e-7)


@given(ragged(), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["rloo", "grpo", "reinforce"]))
def test_token_ops_are_the_same_padded_packed_and_poisoned(case, gamma, form):
    inside, keep, cu, g = case
    x, ref = torch.randn(inside.shape, generator=g), torch.randn(inside.shape, generator=g)
    outcome = torch.rand(inside.shape[0], generator=g)
    group = torch.randint(0, 2, (inside.shape[0],), generator=g)
    bad, bad_ref = poisoned(x, keep, g), poisoned(ref, keep, g)
    packed = {"mask": keep[inside], "cu_seqlens": cu}

    def both(call, *tokens):
        wide, flat = call(*tokens, mask=keep), call(*(t[inside] for t in tokens), **packed)
        return (wide[inside], flat) if wide.dim() == 2 else (wide, flat)

    calls = [
        (lambda r, **k: ops.returns(r, gamma=gamma, **k), (x,), (bad,)),
        (
            lambda r, **k: ops.prime_advantage(r, outcome, group, form=form, gamma=gamma, **k),
            (x,),
            (bad,),
        ),
        (sy.implicit_reward, (x, ref), (bad, bad_ref)),
        (lambda a, b, **k: sy.implicit_prm_loss(a, b, outcome, **k), (x, ref), (bad, bad_ref)),
    ]
    for call, plain, dirty in calls:
        want, flat = both(call, *plain)
        for got in (flat, *both(call, *dirty)):
            torch.testing.assert_close(want, got, rtol=1e-5, atol=1e-5)
    wide = ops.whiten(bad, mask=keep)
    assert wide[~keep].eq(0).all()
    torch.testing.assert_close(wide[inside], ops.whiten(bad[inside], mask=keep[inside]))


def test_per_token_wins_where_n_equals_b():
    logp = torch.zeros(2)
    cu = torch.tensor([0, 2, 2])
    a = torch.tensor([1.0, 3.0])
    spec = LossSpec()
    assert float(policy_loss(logp, logp, a, spec, cu_seqlens=cu).loss) == -2
    wide = policy_loss(torch.zeros(2, 2), torch.zeros(2, 2), a, spec)
    assert float(wide.loss) == -2  # padded: (B,) is per completion
    assert float(policy_loss(logp, logp, a[:1], spec).loss) == -1  # one completion


def test_strides_and_integer_kinds_do_not_matter():
    x = torch.randn(6, 4).t()
    old, a = torch.randn(4, 12)[:, ::2], torch.randn(1, 6).expand(4, 6)
    want = policy_loss(x.contiguous(), old.contiguous(), a.contiguous(), LossSpec()).loss
    torch.testing.assert_close(policy_loss(x, old, a, LossSpec()).loss, want)
    group = torch.tensor([0, 1, 0, 1])
    want = ops.group_advantage(torch.arange(4.0), group)
    for kind in (torch.int32, torch.int16, torch.uint8):
        torch.testing.assert_close(ops.group_advantage(torch.arange(4.0), group.to(kind)), want)


def bad_calls():
    x, m, g = torch.zeros(4, 512), torch.ones(4, 511), torch.zeros(4, dtype=torch.int64)
    hidden, weight = torch.zeros(2, 3, 5), torch.zeros(7, 5)
    ids, spec = torch.zeros(2, 3, dtype=torch.int64), LossSpec()
    flat, cu = torch.zeros(5), torch.tensor([0, 2, 5])
    yield (
        "mask must be (B, T) = (4, 512), got (4, 511)",
        lambda: policy_loss(x, x, x, spec, mask=m.int()),
    )
    yield "mask must be bool or integer, got float32", lambda: policy_loss(x, x, x, spec, mask=x)
    yield "old_logp must be (B, T) = (4, 512), got (4, 511)", lambda: policy_loss(x, m, x, spec)
    yield (
        "advantage must be (B, T) = (4, 512) or (B,) = (4,), got (5,)",
        lambda: policy_loss(x, x, flat, spec),
    )
    yield (
        "logp must be float32 or float64, got bfloat16",
        lambda: policy_loss(x.bfloat16(), x, x, spec),
    )
    yield (
        "logp must be padded (B, T) or packed (N,), got (1, 4, 512)",
        lambda: policy_loss(x[None], x, x, spec),
    )
    yield "old_logp must be a tensor, got list", lambda: policy_loss(flat, [0.0] * 5, flat, spec)
    yield (
        "impl must be one of auto, native, triton, cuda, reference, got 'fast'",
        lambda: policy_loss(x, x, x, spec, impl="fast"),
    )
    for wrong, text in (
        ([0, 2, 4], "cu_seqlens must run from 0 to N = 5, got 0 to 4"),
        ([1, 2, 5], "cu_seqlens must run from 0 to N = 5, got 1 to 5"),
        ([0, 3, 2, 5], "cu_seqlens must not fall, got 3 then 2 at 1"),
        ([0.0, 5.0], "cu_seqlens must be int32 or int64, got float32"),
        ([[0, 5]], "cu_seqlens must be (B+1,), got (1, 2)"),
        ([], "cu_seqlens must be int32 or int64, got float32"),
    ):
        yield text, lambda w=wrong: ops.returns(flat, cu_seqlens=torch.tensor(w))
    yield (
        "cu_seqlens goes with packed (N,) tensors, got logp of (4, 512)",
        lambda: policy_loss(x, x, x, spec, cu_seqlens=cu),
    )
    yield "target must lie in [0, 7), got 7", lambda: ops.linear_logp(hidden, weight, ids + 7)
    yield "target must lie in [0, 7), got -100", lambda: ops.linear_logp(hidden, weight, ids - 100)
    yield "target must lie in [0, 5), got 5", lambda: ops.logp(hidden, ids + 5)
    yield "target must be integer, got float32", lambda: ops.logp(hidden, ids.float())
    yield (
        "target must be (...) = (2, 3), got (2, 4)",
        lambda: ops.logp(hidden, torch.ones(2, 4).long()),
    )
    yield (
        "weight must be (V, D) = (V, 5), got (7, 6)",
        lambda: ops.linear_logp(hidden, torch.zeros(7, 6), ids),
    )
    yield (
        "bias must be (V,) = (7,), got (5,)",
        lambda: ops.linear_logp(hidden, weight, ids, bias=torch.zeros(5)),
    )
    yield (
        "temperature must be a finite number > 0, got 0",
        lambda: ops.logp(hidden, ids, temperature=0),
    )
    yield (
        "softcap must be a finite number > 0, got nan",
        lambda: ops.logp(hidden, ids, softcap=math.nan),
    )
    yield "hidden must be floating point, got int64", lambda: ops.linear_logp(ids, weight, ids)
    yield (
        "target must be (B, T) = (2, 3), got (2, 4)",
        lambda: ops.linear_policy_loss(
            hidden, weight, torch.ones(2, 4).long(), None, torch.zeros(2), spec
        ),
    )
    yield (
        "group must be (B,) = (4,), got (5,)",
        lambda: ops.group_advantage(x[:, 0], torch.zeros(5).long()),
    )
    yield "group must be integer, got float32", lambda: ops.group_advantage(x[:, 0], x[:, 0])
    yield "scored must be bool, got int64", lambda: ops.group_advantage(x[:, 0], g, scored=g)
    yield "reward must be float32 or float64, got int64", lambda: ops.group_advantage(g, g)
    yield (
        "kind must be one of grpo, dr_grpo, rloo, got 'ppo'",
        lambda: ops.group_advantage(x[:, 0], g, kind="ppo"),
    )
    yield "ddof must be one of 0, 1, got 2", lambda: ops.group_advantage(x[:, 0], g, ddof=2)
    yield "gamma must lie in [0, 1], got 1.5", lambda: ops.returns(flat, gamma=1.5)
    yield (
        "step must lie in [-1, 2), got -2",
        lambda: ops.step_reduce(flat, torch.arange(5) - 2, 2),
    )
    yield (
        "how must be one of sum, mean, min, max, last, prod, got 'median'",
        lambda: ops.step_reduce(flat, torch.zeros(5).long(), 2, how="median"),
    )
    yield (
        "n_steps must be an int >= 0, got -1",
        lambda: ops.step_reduce(flat, torch.zeros(5).long(), -1),
    )
    yield (
        "where must be one of all, last, got 'first'",
        lambda: ops.step_expand(flat, torch.zeros(5).long(), where="first"),
    )
    yield "step_value must be (S,), got (4, 512)", lambda: ops.step_expand(x, torch.zeros(5).long())
    yield (
        "outcome must be (B,) = (2,), got (3,)",
        lambda: ops.prime_advantage(flat, torch.zeros(3), torch.zeros(3).long(), cu_seqlens=cu),
    )
    yield (
        "mask must be on cpu, got meta",
        lambda: ops.returns(flat, mask=torch.ones(5, device="meta").int()),
    )


@pytest.mark.parametrize(
    ("text", "call"), list(bad_calls()), ids=lambda x: x if isinstance(x, str) else ""
)
def test_errors_name_the_argument_and_both_numbers(text, call):
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == text


def test_masked_targets_may_hold_anything():
    hidden, weight = torch.randn(1, 3, 5), torch.randn(7, 5)
    target, mask = torch.tensor([[1, -100, 10**9]]), torch.tensor([[1, 0, 0]])
    got = ops.linear_policy_loss(hidden, weight, target, None, torch.ones(1), LossSpec(), mask=mask)
    assert got[0].isfinite()
    with pytest.raises(ValueError, match=r"target must lie in \[0, 7\), got -100"):
        ops.linear_policy_loss(hidden, weight, target, None, torch.ones(1), LossSpec())


def test_an_implementation_that_cannot_run_says_so():
    x, group = torch.zeros(4), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(KernelUnavailable, match="impl='cuda' cannot run returns on cpu tensors"):
        ops.returns(x, impl="cuda")
    with pytest.raises(KernelUnavailable, match="impl='triton' has no returns; it has logp"):
        ops.returns(x, impl="triton")
    for kind in (ValueError, KernelUnavailable, RuntimeError):
        with pytest.raises(kind, match="float64 runs on impl='reference'"):
            ops.group_advantage(x.double(), group, impl="native")


def test_auto_falls_back_and_says_so_once(monkeypatch, caplog):
    def missing(op, impl, *given, real=implementations._function):
        if impl == "native":
            raise KernelUnavailable("native is not built here")
        return real(op, impl, *given)

    monkeypatch.setattr(implementations, "_function", missing)
    implementations._say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="reasonrl"):
        for _ in range(3):
            assert ops.returns(torch.ones(3)).tolist() == [3, 2, 1]
    (record,) = [r for r in caplog.records if "returns" in r.message]
    assert "takes reference instead of native: native is not built here" in record.message
    with pytest.raises(KernelUnavailable, match="native is not built here"):
        ops.returns(torch.ones(3), impl="native")


def test_float64_takes_the_reference_without_a_word(caplog):
    implementations._say_once.cache_clear()
    assert ops.returns(torch.ones(3, dtype=torch.float64)).dtype == torch.float64
    assert not caplog.records
