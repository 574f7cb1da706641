"""Native (from test_gpu.py: CUDA, Triton) against float64 truth over the whole grid of options, by
the stratified rule.

For each stratum: error <= k x the error of stock torch in the same dtype + 4 ulp of its largest
true value, k = 2 forward and 3 backward. The strata are the clipped, the other and the masked
tokens (exactly 0 there).
"""

from __future__ import annotations

import importlib
import itertools
import math
import os

import pytest
import torch

from reasonrl import LossSpec, linear_policy_loss, ops, policy_loss
from reasonrl.kernels import reference
from reasonrl.loss import NAMED

ULP = torch.finfo(torch.float32).eps
IMPL = os.environ.get("REASONRL_PARITY", "native")
DEVICE = "cpu" if IMPL == "native" else "cuda"


@pytest.fixture(autouse=True)
def device():
    with torch.device(DEVICE):
        yield


@pytest.fixture(autouse=True)
def native(require, poison):
    """The module under test; Triton has one an op."""
    if IMPL == "triton":
        return None
    try:
        module = importlib.import_module(f"reasonrl.kernels.{IMPL}")
    except ImportError as missing:
        require(IMPL, str(missing))
        return None
    require(IMPL, module.available())
    return module


def within(got, truth, yard, k, strata=None, scale=0.0, rounding=0.0):
    """The rule, for every stratum given as a mask; `scale` is the size of the terms of a sum,
    `rounding` what its terms lose by their type, where one number's error may be 0 by luck."""
    for stratum in strata or [torch.ones_like(truth, dtype=torch.bool)]:
        if not stratum.any():
            continue
        t, g, y = (x.detach().double()[stratum] for x in (truth, got, yard))
        size = max(float(t.abs().max()), float(torch.as_tensor(scale).detach()), 1e-30)
        floor = rounding + 4 * ULP * size
        if IMPL != "native" and got.dtype in (torch.bfloat16, torch.float16):  # its own rounding
            floor += torch.finfo(got.dtype).eps / 2 * float(t.abs().max())
        assert not g.isnan().any()
        worst, allowed = float((g - t).abs().max()), k * float((y - t).abs().max()) + floor
        assert worst <= allowed, f"error {worst:.3g} above {allowed:.3g}"


def tokens(seed: int, shape=(5, 37)):
    g = torch.Generator(DEVICE).manual_seed(seed)

    def draw(scale):
        return torch.randn(shape, generator=g) * scale

    x = {"logp": draw(0.5) - 2, "advantage": draw(1.0), "entropy": draw(1.0).abs()}
    x |= {"old": x["logp"] + draw(0.3), "ref": x["logp"] + draw(0.3), "weight": draw(0.3).exp()}
    mask = torch.rand(shape, generator=g) > 0.3
    mask[1], x["advantage"][2], x["old"][3] = False, 0.0, x["logp"][3]
    x["logp"][~mask] = math.nan
    x["old"][~mask] = math.inf
    return x, mask


GRID = [
    {"kl_coef": kl_coef, "kl": kl, "entropy_coef": ent, "reduce": reduce, "max_length": 40}
    for (kl_coef, kl), ent, reduce in itertools.product(
        ((0.0, "k3"), (0.2, "k1"), (0.2, "k2"), (0.2, "k3")),
        (0.0, 0.1),
        ("token_mean", "seq_mean", "fixed"),
    )
]
NARROW = [{"clip_low": 0.1, "clip_high": 0.2, "sapo_pos": 1.3}]
EXTRA = [{"delta": 1.5}, {"dual_clip": 1.2}, {"delta": 1.4, "dual_clip": 1.3}]
EXTRA += [{"entropy_coef": 0.1, "entropy_reduce": "token_mean", "reduce": "seq_mean"}]


@pytest.mark.parametrize("name", NAMED)
def test_policy_loss(name):
    capped = EXTRA if LossSpec.named(name).surrogate == "clip" else EXTRA[3:] + NARROW
    for case, (change, weighted, old, divisor) in enumerate(
        itertools.product([*GRID, *capped], (True, False), (True, False), (None, 77.0))
    ):
        if "delta" in change and name == "gspo":
            change = {"delta": 1.01}
        spec = LossSpec.named(name, **({"max_length": 40} | change))
        x, mask = tokens(case)
        results = []
        for dtype, impl in (
            (torch.float64, "reference"),
            (torch.float32, "reference"),
            (torch.float32, IMPL),
        ):
            v = {key: value.to(dtype) for key, value in x.items()}
            leaf, ent = v["logp"].requires_grad_(), v["entropy"].requires_grad_()
            out = policy_loss(
                leaf, v["old"] if old else None, v["advantage"], spec, mask=mask,
                ref_logp=v["ref"], entropy=ent, is_weight=v["weight"] if weighted else None,
                denominator=divisor, impl=impl,
            )  # fmt: skip
            grads = torch.autograd.grad(out.loss, (leaf, ent), allow_unused=True)
            results.append((out, *(torch.zeros_like(leaf) if g is None else g for g in grads)))
        (truth, *true), (yard, *stock), (got, *ours) = results
        terms = (true[0] * torch.where(mask, x["logp"], 0.0)).abs().sum() + truth.loss.abs()
        within(got.loss, truth.loss, yard.loss, 2, scale=terms)
        cut = (true[0] == 0) & mask
        for a, b, c in zip(ours, true, stock, strict=True):
            within(a, b, c, 3, [cut, ~cut & mask])
            assert a[~mask].eq(0).all()
        for key in truth.metrics:
            within(got.metrics[key], truth.metrics[key], yard.metrics[key], 2)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("which", ["logp", "old", "advantage", "ref", "entropy", "weight"])
def test_policy_loss_with_nonfinite_tokens(name, which):
    spec = LossSpec.named(name, kl_coef=0.1, entropy_coef=0.1, max_length=40)
    for bad in (math.nan, math.inf, -math.inf):
        x, mask = tokens(3)
        x[which][0, ::3] = bad
        x[which][4, :] = bad
        results = []
        for dtype, impl in (
            (torch.float64, "reference"),
            (torch.float32, "reference"),
            (torch.float32, IMPL),
        ):
            v = {key: value.to(dtype) for key, value in x.items()}
            leaf, ent = v["logp"].requires_grad_(), v["entropy"].requires_grad_()
            out = policy_loss(
                leaf, v["old"], v["advantage"], spec, mask=mask, ref_logp=v["ref"], entropy=ent,
                is_weight=v["weight"], impl=impl,
            )  # fmt: skip
            results.append([out.loss, *torch.autograd.grad(out.loss, (leaf, ent))])
            results[-1] += out.metrics.values()
        for truth, yard, got in zip(*results, strict=True):
            within(got, truth, yard, 3, scale=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("width", [1, 15, 64, 1000, 4099])
def test_logp(dtype, softcap, width):
    for rows, scale, temperature in ((0, 1, 1.0), (1, 3, 0.7), (13, 50, 1.0)):
        u = (torch.randn(rows, width) * scale).to(dtype)
        if rows and width > 2 and softcap is None:
            u[-1, width // 2] = -math.inf
        target = torch.randint(0, width, (rows,))
        target[-1:] = 0
        up = torch.randn(2, rows, dtype=torch.float64)
        results = []
        for kind, impl in (
            (torch.float64, "reference"),
            (dtype, "reference"),
            (dtype, IMPL),
        ):
            leaf = u.to(kind).requires_grad_()
            known = {"temperature": temperature, "softcap": softcap, "entropy": True, "impl": impl}
            out = ops.logp(leaf, target, **known)
            total = sum((w.to(o.dtype) * o).sum() for w, o in zip(up, out, strict=True))
            results.append((*out, *torch.autograd.grad(total, leaf)))
        taken = torch.nn.functional.one_hot(target, width).bool()
        strata = [taken, ~taken]
        scores = u.double().masked_fill(u.isinf(), 0) / temperature
        size = scores.abs().max() if rows else 0.0  # log p and H are differences of scores
        for i, (truth, yard, got) in enumerate(zip(*results, strict=True)):
            if i == 2:
                within(got, truth, yard, 3, strata)
            else:
                within(got, truth, yard, 2, scale=size)


@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "rloo"])
@pytest.mark.parametrize("ddof", [0, 1])
def test_group_advantage(kind, ddof):
    for rows, groups in ((0, 1), (1, 1), (7, 3), (64, 8), (257, 20)):
        reward = torch.randint(0, 4, (rows,)).float() / 3
        group = torch.randint(-groups, groups, (rows,)) * 1000
        scored = torch.rand(rows) > 0.2
        reward[~scored] = math.nan
        known = {"kind": kind, "ddof": ddof, "scored": scored}
        truth = ops.group_advantage(reward.double(), group, **known)
        yard = ops.group_advantage(reward, group, impl="reference", **known)
        got = ops.group_advantage(reward, group, impl=IMPL, **known)
        within(got, truth, yard, 2, [scored & (truth != 0), scored & (truth == 0)])
        assert got[~scored].eq(0).all() and got[truth == 0].eq(0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_and_prime(gamma, native):
    for lengths in ((), (0,), (1, 0, 3), (4096, 1, 2, 7), (17,) * 11):
        n, rows = sum(lengths), len(lengths)
        cu = torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()])
        mask = torch.rand(n) > 0.25
        x = torch.where(mask, torch.randn(n), torch.nan)
        known = {"cu_seqlens": cu, "mask": mask, "gamma": gamma}
        leaves, results = [], []
        for dtype, impl in (
            (torch.float64, "reference"),
            (torch.float32, "reference"),
            (torch.float32, IMPL),
        ):
            leaves.append(x.to(dtype).requires_grad_())
            results.append(ops.returns(leaves[-1], impl=impl, **known))
        within(results[2], results[0], results[1], 2)
        up = torch.randn(n, dtype=torch.float64)
        grads = [
            torch.autograd.grad((up.to(r.dtype) * r).sum(), leaf)[0]
            for r, leaf in zip(results, leaves, strict=True)
        ]
        within(grads[2], grads[0], grads[1], 3)
        assert grads[2][~mask].eq(0).all() and results[2][~mask].eq(0).all()
        if not hasattr(native, "prime_advantage"):
            continue
        outcome, group = torch.rand(rows), torch.randint(0, 2, (rows,))
        for form, white, base in itertools.product(("rloo", "grpo", "reinforce"), (0, 1), (0, 1)):
            if base and form != "rloo":
                continue
            more = known | {"form": form, "whiten": bool(white), "verl_baseline": bool(base)}
            truth = ops.prime_advantage(x.double(), outcome.double(), group, **more)
            yard = ops.prime_advantage(x, outcome, group, impl="reference", **more)
            got = ops.prime_advantage(x, outcome, group, impl=IMPL, **more)
            within(got, truth, yard, 2)
            assert got[~mask].eq(0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_returns_without_a_mask(gamma):
    """Where every token discounts alike: sixteen at a time, and what is left over."""
    lengths = (1, 0, 3, 16, 17, 31, 1000, 5)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    x, up = torch.randn(sum(lengths)), torch.randn(sum(lengths))
    results = []
    for dtype, impl in (
        (torch.float64, "reference"),
        (torch.float32, "reference"),
        (torch.float32, IMPL),
    ):
        leaf = x.to(dtype).requires_grad_()
        out = ops.returns(leaf, cu_seqlens=cu, gamma=gamma, impl=impl)
        results.append((out, *torch.autograd.grad((up.to(dtype) * out).sum(), leaf)))
    for i, (truth, yard, got) in enumerate(zip(*results, strict=True)):
        within(got, truth, yard, 2 + i)


@pytest.mark.parametrize("how", ops.HOW)
def test_steps(how, native):
    for n, steps in ((0, 0), (0, 3), (1, 1), (100, 9), (3000, 70)):
        x, step = torch.rand(n) + 0.5, torch.randint(-1, max(steps - 1, 0), (n,))
        x = torch.where(step >= 0, x, torch.nan)
        leaves, results = [], []
        for dtype, impl in (
            (torch.float64, "reference"),
            (torch.float32, "reference"),
            (torch.float32, IMPL),
        ):
            leaves.append(x.to(dtype).requires_grad_())
            results.append(ops.step_reduce(leaves[-1], step, steps, how=how, impl=impl))
        within(results[2], results[0], results[1], 2)
        grads = [
            torch.autograd.grad(r.sum(), leaf)[0] for r, leaf in zip(results, leaves, strict=True)
        ]
        within(grads[2], grads[0], grads[1], 3)
        for where in ("all", "last"):
            value = torch.randn(steps, requires_grad=True)
            a = ops.step_expand(value, step, where=where, impl="reference")
            b = ops.step_expand(value, step, where=where, impl=IMPL)
            assert torch.equal(a, b)
            up = torch.randn(n)
            (a,), (b,) = (torch.autograd.grad((up * y).sum(), value) for y in (a, b))
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_linear_policy_loss(name, dtype, native):
    if native and not has(native, "linear_policy_loss"):
        pytest.skip("SKIPPED: native has no linear_policy_loss yet")
    for case, change in enumerate(({}, {"kl_coef": 0.2, "entropy_coef": 0.1})):
        spec = LossSpec.named(name, **({"max_length": 40} | change))
        x, mask = tokens(case, (4, 9))
        hidden, weight, bias = torch.randn(4, 9, 8), torch.randn(53, 8), torch.randn(53)
        target = torch.where(mask, torch.randint(0, 53, mask.shape), -100)
        hidden[~mask] = math.nan
        results = []
        for kind, call in (
            (torch.float64, linear_policy_loss),
            (dtype, stock_linear_policy_loss),
            (dtype, linear_policy_loss),
        ):
            leaves = [v.to(dtype).to(kind).requires_grad_() for v in (hidden, weight, bias)]
            wide = torch.float64 if kind == torch.float64 else torch.float32
            v = {key: value.to(wide) for key, value in x.items()}
            out = call(
                *leaves[:2], target, v["old"] - 2, v["advantage"], spec, mask=mask, bias=leaves[2],
                ref_logp=v["ref"] - 2, temperature=0.9, softcap=8.0, is_weight=v["weight"],
                impl="reference" if wide == torch.float64 else IMPL,
            )  # fmt: skip
            results.append((out.loss, *torch.autograd.grad(out.loss, leaves)))
        loss, inner = results[0][0].abs(), results[0][1] * hidden.double()
        terms = float(torch.where(mask[..., None], inner, 0.0).abs().sum() + loss)  # they cancel
        half = IMPL == "triton" and dtype == torch.bfloat16  # its logits are rounded to the type
        lost = terms / math.sqrt(int(mask.sum())) * torch.finfo(dtype).eps / 2 if half else 0.0
        within(results[2][0], results[0][0], results[1][0], 2, scale=terms, rounding=lost)
        # one row's ratio carries these gradients: a rounding of its log p, which is about the
        # softcap, moves them all, and stock's may be none by luck
        one = 8.0 * ULP / 2 if IMPL == "triton" else 0.0
        for truth, yard, got in list(zip(*results, strict=True))[1:]:
            within(got, truth, yard, 3, rounding=one * float(truth.detach().abs().max()))
        assert results[2][1][~mask].eq(0).all()


def stock_linear_policy_loss(
    hidden, weight, target, *args, mask, bias, temperature, softcap, impl, **known
):
    """What a trainer does in plain torch: all logits in the input's dtype, the loss in fp32."""
    rows, ids = torch.where(mask[..., None], hidden, 0), torch.where(mask, target, 0)
    u = torch.nn.functional.linear(rows, weight, bias)
    s = softcap * torch.tanh(u / softcap) / temperature
    log_p = torch.log_softmax(s.float(), -1)
    taken, ent = log_p.gather(-1, ids[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
    return policy_loss(taken, *args, mask=mask, entropy=ent, impl="reference", **known)


def has(module, name: str) -> bool:
    try:
        return hasattr(module, name)
    except ModuleNotFoundError:
        return False


def test_the_rule_catches_wrong_kernels():
    truth, yard = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, 2.0])
    for wrong in ([1.0, 2.1], [math.nan, 2.0], [-1.0, 2.0]):
        with pytest.raises(AssertionError):
            within(torch.tensor(wrong), truth, yard, 3)
    assert reference.available() is None


@pytest.mark.parametrize("n, high", [(4096, -2.0), (40, -3.7)])
def test_policy_loss_of_a_small_divergence_keeps_its_digits(n, high, native):
    """k3 of a log-ratio of 1e-4 is 5e-9: e^r - r - 1 in fp32 would leave nothing of it."""
    logp = -3 * torch.rand(n, generator=torch.Generator(DEVICE).manual_seed(5))
    ref = logp + torch.logspace(-4, high, n) * torch.tensor([1.0, -1.0]).repeat(n // 2)
    spec, found = LossSpec(kl_coef=1.0), []
    for kind, impl in ((torch.float64, "reference"), (torch.float32, IMPL)):
        leaf, nought = logp.to(kind).requires_grad_(), torch.zeros(n, dtype=kind)
        out = policy_loss(leaf, logp.to(kind), nought, spec, ref_logp=ref.to(kind), impl=impl)
        out.loss.backward()
        found.append((float(out.loss), float(out.metrics["kl"]), leaf.grad.double()))
    (loss, kl, grad), (own, metric, slope) = found
    assert abs(own / loss - 1) < 1e-5 and abs(metric / kl - 1) < 1e-5
    assert float((slope / grad - 1).abs().max()) < 1e-5
