"""The compiled CPU ops: every instruction set against float64, bits over threads, ties, poison.

test_parity.py drives the same ops through the public door over the whole grid of options; here are
the things only this implementation has: instruction sets, threads, chunks, work done in place.
"""

from __future__ import annotations

import math
import os

import pytest
import torch

from reasonrl import LossSpec
from reasonrl.kernels import reference
from reasonrl.loss import NAMED

ISAS = ("avx512", "avx2", "portable")
EPS = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def native(require, poison):
    from reasonrl.kernels import native as module

    require("native", module.available())
    best = module.core().isa()
    threads = torch.get_num_threads()
    yield module
    module.core().use_isa(best)
    torch.set_num_threads(threads)


@pytest.fixture(params=ISAS)
def isa(request, native):
    if not native.core().use_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    return request.param


def close(got, truth, rtol=8 * EPS, scale=None):
    """|got - truth| <= rtol x the largest true value, and not a NaN in sight."""
    truth = torch.as_tensor(truth, dtype=torch.float64)
    most = float(truth.abs().max()) if scale is None and truth.numel() else scale or 0.0
    error = (got.detach().double() - truth.detach()).abs()
    assert error.numel() == 0 or float(error.max()) <= rtol * max(most, 1e-30), float(error.max())


def softmax_truth(logits, target, temperature, softcap):
    u = logits.detach().double().requires_grad_()
    s = (softcap * torch.tanh(u / softcap) if softcap else u) / temperature
    log_p = torch.log_softmax(s, -1)
    p = log_p.exp()
    return u, log_p.gather(-1, target[:, None])[:, 0], -(p * log_p.clamp(min=-1e30)).sum(-1)


@pytest.mark.parametrize("vocab", [1, 2, 17, 1023, 1024, 1025, 5003])
@pytest.mark.parametrize("scale", [(1.0, None), (0.7, None), (1.3, 5.0)])
def test_logp_and_its_gradient(native, isa, vocab, scale):
    for dtype, store in (
        (torch.float32, 8 * EPS),
        (torch.bfloat16, 2**-8),
        (torch.float16, 2**-11),
    ):
        logits = (torch.randn(5, vocab) * 4).to(dtype).requires_grad_()
        target = torch.tensor([0, vocab - 1, vocab // 2, vocab // 3, 0])
        logp, entropy = native.logp(logits, target, *scale, True)
        u, true_logp, true_entropy = softmax_truth(logits, target, *scale)
        close(logp, true_logp, scale=20.0)
        close(entropy, true_entropy, scale=20.0)
        c, eta = torch.randn(5), torch.randn(5)
        (logp @ c + entropy @ eta).backward()
        (true_logp @ c.double() + true_entropy @ eta.double()).backward()
        target_only = torch.zeros_like(u, dtype=torch.bool).scatter_(1, target[:, None], True)
        for part in (target_only, ~target_only):
            close(logits.grad[part], u.grad[part], 3 * store + 16 * EPS)


def test_logp_far_from_zero_and_broken_rows(native, isa):
    logits = torch.randn(7, 3001)
    target = torch.arange(7)
    logits[0] += 1e4
    logits[1, 5:2500] = -math.inf
    logits[2, 2] = -math.inf
    logits[3, 7] = math.nan
    logits[4, 7] = math.inf
    logits[5] = -math.inf
    logits.requires_grad_()
    logp, entropy = native.logp(logits, target, 1.0, None, True)
    assert logp[3:6].isnan().all() and entropy[3:6].isnan().all()
    assert logp[2] == -math.inf and entropy[2].isfinite()
    good = [0, 1, 6]
    u, true_logp, true_entropy = softmax_truth(logits[good], target[good], 1.0, None)
    close(logp[good], true_logp, scale=40.0)
    close(entropy[good], true_entropy, scale=40.0)
    c = torch.tensor([1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0])
    (logp.where(c > 0, 0.0).sum() + entropy[good].sum()).backward()
    (true_logp.sum() + true_entropy.sum()).backward()
    close(logits.grad[good], u.grad, 16 * EPS)
    assert logits.grad[3].isnan().all()
    assert (logits.grad[[2, 4, 5]] == 0).all()


def test_gradient_in_place_folds_live_rows_to_the_front(native):
    from reasonrl.kernels.native_head import fold

    for live in ([1, 0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 1, 1, 1], [1] * 7):
        live = torch.tensor(live, dtype=torch.bool)
        logits, target = torch.randn(7, 2050), torch.arange(7)
        c = torch.randn(7) * live
        _, _, stats = native.row_stats(logits, target, (1.0, 0.0), True)
        whole = native.row_grad(logits, target, stats, (1.0, 0.0), c, None, torch.empty(7, 2050))
        count = int(live.sum())
        source = fold(live, count)
        assert sorted(source.tolist()) == live.nonzero()[:, 0].tolist()
        native.row_grad(logits, target, stats, (1.0, 0.0), c, None, logits[:count], source)
        assert torch.equal(logits[:count], whole[source])


def drawn(n=4099):
    """Tokens of six completions, one empty, one of a single token, with every kind of trouble."""
    cu = torch.tensor([0, 5, 5, 3100, 3101, 4000, n])
    logp = -3 * torch.rand(n)
    x = {"old": logp + 0.3 * torch.randn(n), "advantage": torch.randn(n)}
    x["old"][::97] += 25
    x["old"][1::97] -= 25
    x["advantage"][::11] = 0
    x |= {
        "ref": logp + 0.2 * torch.randn(n),
        "entropy": 3 * torch.rand(n),
        "weight": 2 * torch.rand(n),
    }
    mask = torch.rand(n) > 0.3
    mask[:3] = True
    logp[1], x["advantage"][100], mask[100] = math.nan, math.inf, True
    for value in (logp, *x.values()):
        value[~mask] = math.nan
    return logp, x, cu, mask


def run(op, logp, x, cu, mask, spec, dtype, denominator=None):
    cast = {name: value.to(dtype).clone() for name, value in x.items()}
    leaf = logp.to(dtype).clone().requires_grad_()
    entropy = cast["entropy"].requires_grad_()
    loss, metrics = op(
        leaf, cast["old"], cast["advantage"], spec, cu, mask, cast["ref"], entropy,
        cast["weight"], denominator,
    )  # fmt: skip
    loss.backward()
    return loss, metrics, leaf.grad, entropy.grad


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_policy_loss_on_every_instruction_set(native, isa, name, kl):
    logp, x, cu, mask = drawn()
    changes = {"kl": kl, "kl_coef": 0.1, "entropy_coef": 0.01, "max_length": 3200}
    if NAMED[name].get("surrogate", "clip") == "clip" and kl != "k1":
        changes |= {"dual_clip": 1.4, "delta": 1.6}
    spec = LossSpec.named(name, **changes)
    loss, metrics, c, eta = run(native.policy_loss, logp, x, cu, mask, spec, torch.float32, 7.0)
    truth = run(reference.policy_loss, logp, x, cu, mask, spec, torch.float64, 7.0)
    for b in range(6):
        row = slice(int(cu[b]), int(cu[b + 1]))
        close(c[row], truth[2][row], 16 * EPS)
        close(eta[row], truth[3][row], 4 * EPS)
    close(loss, truth[0], scale=float((truth[2].abs() * 3).sum() + truth[0].abs() + 1))
    for key, value in truth[1].items():
        close(metrics[key], value, 1e-6, scale=max(1e-3, abs(float(value))))
    assert (c[~mask] == 0).all() and (eta[~mask] == 0).all() and c[1] == 0 and c[100] == 0
    assert metrics["nonfinite"] == 2 and metrics["tokens"] == mask.sum()


def test_ties_take_the_branch_with_the_gradient(native, isa):
    half, double = math.log(0.5), math.log(2.0)
    logp = torch.tensor([0.0, half, double, half, double, half - 1, double + 1, 0.0])
    advantage = torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 0.0])
    spec = LossSpec(clip_low=0.5, clip_high=1.0)
    cu = torch.tensor([0, 8])
    leaf = logp.clone().requires_grad_()
    zero = torch.zeros(8)
    loss, metrics = native.policy_loss(
        leaf, zero, advantage, spec, cu, None, None, None, None, None
    )
    loss.backward()
    expected = torch.tensor([-1.0, 0.5, -2.0, -0.5, 2.0, 0.0, 0.0, 0.0]) / 8
    close(leaf.grad, expected, 4 * EPS)
    assert metrics["clip_ratio/low_mean"] == 1 / 8 and metrics["clip_ratio/high_mean"] == 1 / 8
    assert metrics["rows/active"] == 5 / 8
    spec = LossSpec(clip_low=0.5, clip_high=0.25, delta=2.0, dual_clip=2.0)
    leaf = logp.clone().requires_grad_()
    native.policy_loss(leaf, zero, advantage, spec, cu, None, None, None, None, None)[0].backward()
    close(leaf.grad[4], 2.0 / 8, 4 * EPS)


@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo", "gmpo"])
def test_same_bits_for_one_and_two_threads(native, name):
    logp, x, cu, mask = drawn(40_961)
    spec = LossSpec.named(name, kl_coef=0.1, entropy_coef=0.01)
    logits, target = torch.randn(9, 5003), torch.arange(9)
    seen = []
    for threads in (1, 2, 2, 1, 2):
        torch.set_num_threads(threads)
        loss, metrics, c, eta = run(native.policy_loss, logp, x, cu, mask, spec, torch.float32)
        back = native.returns(x["advantage"], cu, mask, 0.97)
        taken, ent, _ = native.row_stats(logits, target, (1.0, 0.0), True)
        seen.append([loss.detach(), *metrics.values(), c, eta, back, taken, ent])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


def test_group_advantage(native):
    reward = torch.tensor([1.0, 5.0, 0.1, 3.0, 0.1, 0.1, 7.0, math.nan, 2.0])
    group = torch.tensor([9, -4, 2, 9, 2, 2, 100, 9, 9])
    scored = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0, 1], dtype=torch.bool)
    for kind, of_nine in (("grpo", [-1.0, 1.0, 0.0]), ("dr_grpo", [-1.0, 1.0, 0.0])):
        out = native.group_advantage(reward, group, kind, scored, 1, 0.0)
        close(out[[0, 3, 8]], torch.tensor(of_nine))
        assert (out[[1, 2, 4, 5, 6, 7]] == 0).all()
    out = native.group_advantage(reward, group, "rloo", scored, 1, 0.0)
    close(out[[0, 3, 8]], torch.tensor([-1.5, 1.5, 0.0]))
    order = torch.randperm(200)
    reward, group = torch.randn(200), torch.randint(0, 23, (200,))
    for kind in ("grpo", "dr_grpo", "rloo"):
        for ddof in (0, 1):
            args = (kind, None, ddof, 1e-6)
            out = native.group_advantage(reward, group, *args)
            close(out, reference.group_advantage(reward.double(), group, *args))
            shuffled = native.group_advantage(reward[order], group[order], *args)
            close(shuffled, out[order])


def test_returns_by_hand_and_by_reference(native):
    reward = torch.tensor([1.0, math.nan, 2.0, 4.0, 8.0], requires_grad=True)
    mask = torch.tensor([1, 0, 1, 1, 1], dtype=torch.bool)
    cu = torch.tensor([0, 0, 3, 5])
    out = native.returns(reward, cu, mask, 0.5)
    close(out, torch.tensor([2.0, 0.0, 2.0, 8.0, 8.0]))
    out.backward(torch.tensor([1.0, math.nan, 10.0, 100.0, 1000.0]))
    close(reward.grad, torch.tensor([1.0, 0.0, 10.5, 100.0, 1050.0]))
    for gamma in (0.0, 0.9, 1.0):
        x, cu, mask = torch.randn(300), torch.tensor([0, 1, 150, 150, 300]), torch.rand(300) > 0.5
        x.requires_grad_()
        y = x.detach().double().requires_grad_()
        g = torch.randn(300)
        native.returns(x, cu, mask, gamma).backward(g)
        reference.returns(y, cu, mask, gamma).backward(g.double())
        close(native.returns(x, cu, mask, gamma), reference.returns(y, cu, mask, gamma))
        close(x.grad, y.grad)


@pytest.mark.parametrize("how", ["sum", "mean", "min", "max", "last", "prod"])
def test_step_reduce_and_its_gradient(native, how):
    value, step = torch.randn(211), torch.randint(-1, 17, (211,))
    step[step == 5] = -1
    value[step == 3] = value[step == 3].round()
    value[(step == 7).nonzero()[0]] = 0.0
    value[step < 0] = math.nan
    x, y = value.clone().requires_grad_(), value.double().requires_grad_()
    got, truth = native.step_reduce(x, step, 18, how), reference.step_reduce(y, step, 18, how)
    close(got, truth)
    assert got[5] == got[17] == (1.0 if how == "prod" else 0.0)
    g = torch.randn(18)
    got.backward(g)
    truth.backward(g.double())
    close(x.grad, y.grad)
    assert (x.grad[step < 0] == 0).all()


@pytest.mark.parametrize("order", ["ascending", "with gaps", "twice"])
def test_long_steps_cross_the_chunks(native, isa, order):
    """150,000 tokens in steps of 1 to 9,000: the kernel's chunks end inside of steps."""
    g = torch.Generator().manual_seed(4)
    lengths = (9000 * torch.rand(64, generator=g) ** 3).long() + 1
    step = torch.arange(64).repeat_interleave(lengths)
    if order == "with gaps":
        step[torch.rand(step.shape, generator=g) < 0.01] = -1
    elif order == "twice":
        step = torch.cat([step, step])
    value = torch.rand(step.shape, generator=g) - 0.5
    assert len(step) > 4 * 32_768
    for how in ("sum", "mean", "prod"):
        x = value * 2e-4 + 1 if how == "prod" else value
        got = native.step_reduce(x, step, 65, how)
        close(got, reference.step_reduce(x.double(), step, 65, how))
    marks = torch.arange(65.0) + 1
    for where in ("all", "last"):
        got = native.step_expand(marks, step, where)
        assert torch.equal(got, reference.step_expand(marks.double(), step, where).float())


@pytest.mark.parametrize("where", ["all", "last"])
def test_step_expand_and_its_gradient(native, where):
    step = torch.tensor([-1, 2, 2, 0, -1, 0, 4])
    x = torch.arange(1.0, 6.0).requires_grad_()
    out = native.step_expand(x, step, where)
    every = torch.tensor([0.0, 3, 3, 1, 0, 1, 5])
    only_last = torch.tensor([0.0, 0, 3, 0, 0, 1, 5])
    assert torch.equal(out, every if where == "all" else only_last)
    out.backward(torch.tensor([math.nan, 1, 2, 4, math.nan, 8, 16]))
    expected = [12.0, 0, 3, 0, 16] if where == "all" else [8.0, 0, 2, 0, 16]
    assert x.grad.tolist() == expected


@pytest.mark.parametrize("form", ["rloo", "grpo", "reinforce"])
def test_prime_advantage_in_one_call(native, form):
    for seed in range(12):
        g = torch.Generator().manual_seed(seed)
        lengths = torch.randint(0, 40, (seed,), generator=g)
        cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        reward = torch.randn(int(cu[-1]), generator=g)
        reward = reward.round() if seed % 3 == 0 else reward
        outcome = torch.randint(0, 2, (seed,), generator=g).float()
        group = torch.randint(-1, 3, (seed,), generator=g)
        mask = torch.rand(reward.shape, generator=g) > 0.3 if seed % 2 else None
        scored = torch.rand(seed, generator=g) > 0.3 if seed % 4 else None
        if mask is not None:
            reward[~mask] = math.nan
        for white in (False, True):
            args = (group, cu, mask, form, 0.9, seed % 2, scored, white, form == "rloo")
            out = native.prime_advantage(reward, outcome, *args)
            truth = reference.prime_advantage(reward.double(), outcome.double(), *args)
            close(out, truth, 16 * EPS)


def test_prime_advantage_by_hand(native):
    """Two completions of one group, rewards 1 1 and 0, outcomes 1 and 0: eq. 5."""
    reward, outcome = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1.0, 0.0])
    args = (torch.tensor([5, 5]), torch.tensor([0, 2, 3]), None, "rloo", 0.5, 1, None, False, False)
    out = native.prime_advantage(reward, outcome, *args)
    close(out, torch.tensor([1.5 + 1.0, 1.0 + 1.0, -1.0 - 1.0]))


def test_whiten_and_its_gradient(native):
    for n in (0, 1, 2, 9001):
        value, grad, mask = 3 + torch.randn(n), torch.randn(n), torch.rand(n) > 0.3
        value[~mask] = math.nan
        for given in (mask, None):
            clean = value if given is not None else value.nan_to_num(1.0)
            x, y = clean.clone().requires_grad_(), clean.double().requires_grad_()
            out, truth = native.whiten(x, given, 1e-8), reference.whiten(y, given, 1e-8)
            out.backward(grad)
            truth.backward(grad.double())
            close(out, truth)
            close(x.grad, y.grad, 16 * EPS, scale=1.0)


def test_nothing_to_do(native):
    none, cu = torch.empty(0), torch.zeros(1, dtype=torch.int64)
    ids = torch.empty(0, dtype=torch.int64)
    for name in NAMED:
        spec = LossSpec.named(name, max_length=4)
        for offsets in (cu, torch.zeros(3, dtype=torch.int64)):
            leaf = none.clone().requires_grad_()
            loss, metrics = native.policy_loss(
                leaf, none, none, spec, offsets, None, none, none, none, None
            )
            loss.backward()
            assert loss == 0 and all(value == 0 for value in metrics.values())
    assert native.group_advantage(none, ids, "grpo", None, 1, 1e-6).numel() == 0
    assert native.returns(none, cu, None, 1.0).numel() == 0
    assert native.step_reduce(none, ids, 2, "prod").tolist() == [1.0, 1.0]
    assert native.logp(torch.empty(0, 5), ids, 1.0, None, True)[0].numel() == 0


def test_all_masked_is_zero_whatever_stands_there(native):
    cu, mask = torch.tensor([0, 3, 4]), torch.zeros(4, dtype=torch.bool)
    for name in NAMED:
        bad = torch.full((4,), math.nan)
        leaf = bad.clone().requires_grad_()
        spec = LossSpec.named(name, max_length=4, kl_coef=1.0, entropy_coef=1.0)
        loss, metrics = native.policy_loss(leaf, bad, bad, spec, cu, mask, bad, bad, bad, None)
        loss.backward()
        assert loss == 0 and (leaf.grad == 0).all() and metrics["nonfinite"] == 0


def test_the_environment_narrows_the_instruction_set():
    import subprocess
    import sys

    code = "import reasonrl._C as c; print(c.isa())"
    env = os.environ | {"REASONRL_ISA": "portable"}
    out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert out.stdout.strip() == "portable", out.stderr
