"""The policy loss against a loop in plain floats, hand-worked ties, and the errors of LossSpec."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch

from reasonrl import LossSpec, linear_policy_loss, policy_loss
from reasonrl.loss import NAMED

F64 = torch.float64


@dataclass
class Oracle:
    """Loss, dL/dlogp and metrics, token by token, from the formulae and their derivatives."""

    spec: LossSpec
    rows: list[list[dict[str, float]]]  # B x T_b unmasked tokens: l, old, a, ref, w, h
    grad: list[list[float]] = field(default_factory=list)
    seen: dict[str, list[float]] = field(default_factory=dict)

    def loss(self) -> float:
        spec, tokens = self.spec, sum(map(len, self.rows))
        names = ("low", "high", "dual", "kl", "rho")
        self.seen, self.grad, total = {name: [] for name in names}, [], 0.0
        for row in self.rows:
            grad = [0.0] * len(row)
            for i, t in enumerate(row):
                share = {
                    "token_mean": 1 / max(tokens, 1),
                    "seq_mean": 1 / (len(self.rows) * len(row)),
                    "fixed": 1 / (len(self.rows) * (spec.max_length or 1)),
                }[spec.reduce]
                value, slopes = self.token(row, i)
                r = t["ref"] - t["l"]
                k = {"k1": -r, "k2": r * r / 2, "k3": math.exp(r) - r - 1}[spec.kl]
                slope = {"k1": 1.0, "k2": -r, "k3": 1 - math.exp(r)}[spec.kl]
                self.seen["kl"].append(k if spec.kl_coef else math.exp(r) - r - 1)
                ent = share if spec.entropy_reduce == "loss" else 1 / tokens
                total += share * (value + spec.kl_coef * k) - ent * spec.entropy_coef * t["h"]
                for j, q in slopes.items():
                    grad[j] += share * q
                grad[i] += share * spec.kl_coef * slope
            self.grad.append(grad)
        return total

    def token(self, row: list[dict[str, float]], i: int) -> tuple[float, dict[int, float]]:
        """The per-token loss and its derivatives by the log-probabilities of its completion."""
        spec, t, n = self.spec, row[i], len(row)
        d = [x["l"] - x["old"] for x in row]
        a, w = t["a"], t["w"]
        mean = sum(d) / n
        rho = math.exp(d[i] if spec.ratio == "token" else mean)
        self.seen["rho"].append(rho)
        spread = {j: 1 / n for j in range(n)} if spec.ratio == "sequence" else {i: 1.0}
        lo, hi = 1 - spec.clip_low, 1 + spec.clip_high
        low, high = rho < lo and a < 0, rho > hi and a > 0
        if spec.surrogate == "gmpo":
            low, high = d[i] < -spec.clip_low and a < 0, d[i] > spec.clip_high and a > 0
        self.seen["low"].append(low if spec.surrogate in ("clip", "gmpo") else 0)
        self.seen["high"].append(high if spec.surrogate in ("clip", "gmpo", "cispo") else 0)
        caps = [c for c in (spec.delta, spec.dual_clip) if c is not None]
        self.seen["dual"].append(a < 0 and any(rho > c for c in caps))
        if spec.surrogate == "reinforce":
            return -w * a * t["l"], {i: -w * a}
        if spec.surrogate == "cispo":
            return -w * min(rho, hi) * a * t["l"], {i: -w * min(rho, hi) * a}
        if spec.surrogate == "sapo":
            tau = spec.sapo_pos if a > 0 else spec.sapo_neg
            s = 1 / (1 + math.exp(-tau * (rho - 1)))
            return -w * 4 / tau * s * a, {i: -w * 4 * s * (1 - s) * rho * a}
        if spec.surrogate == "gmpo":
            return self.gmpo(row, d)
        clipped = min(max(rho, lo), hi) * a
        value, slope = min(min(rho, spec.delta or math.inf) * a, clipped), 0.0
        if rho * a <= clipped and rho <= (spec.delta or math.inf):
            slope = rho * a
        if spec.dual_clip is not None and a < 0 and value < spec.dual_clip * a:
            value, slope = spec.dual_clip * a, 0.0
        return -w * value, {j: -w * slope * part for j, part in spread.items()}

    def gmpo(self, row, d) -> tuple[float, dict[int, float]]:
        lo, hi, n = -self.spec.clip_low, self.spec.clip_high, len(row)
        logs, free = [], []
        for t, x in zip(row, d, strict=True):
            sign = (t["a"] > 0) - (t["a"] < 0)
            logs.append(sign * min(sign * x, sign * min(max(x, lo), hi)))
            free.append(sign != 0 and sign * x <= sign * min(max(x, lo), hi))
        w, a = sum(t["w"] for t in row) / n, sum(t["a"] for t in row) / n
        v = -w * math.exp(sum(logs) / n) * a
        return v, {j: v / n for j in range(n) if free[j]}

    def metrics(self) -> dict[str, float]:
        n = max(sum(map(len, self.rows)), 1)
        region = [max(x) for x in zip(self.seen["low"], self.seen["high"], strict=True)]
        return {
            "clip_ratio/low_mean": sum(self.seen["low"]) / n,
            "clip_ratio/high_mean": sum(self.seen["high"]) / n,
            "clip_ratio/region_mean": sum(region) / n,
            "clip_ratio/dual_mean": sum(self.seen["dual"]) / n,
            "kl": sum(self.seen["kl"]) / n,
            "ratio/mean": sum(self.seen["rho"]) / n,
            "ratio/max": max(self.seen["rho"], default=0.0),
            "tokens": float(sum(map(len, self.rows))),
            "nonfinite": 0.0,
        }


def inputs(shape=(6, 14), seed=0, spread=0.6):
    g = torch.Generator().manual_seed(seed)

    def draw(scale=1.0, shift=0.0):
        return torch.randn(shape, generator=g, dtype=F64) * scale + shift

    mask = torch.rand(shape, generator=g) > 0.35
    mask[1] = False
    logp = draw(0.5, -2)
    given = {"l": logp, "old": logp + draw(spread), "a": draw(), "ref": logp + draw(0.4)}
    given |= {"w": draw().exp(), "h": draw().abs()}
    given["a"][0, 0] = 0.0
    rows = [
        [{k: float(v[b, t]) for k, v in given.items()} for t in range(shape[1]) if mask[b, t]]
        for b in range(shape[0])
    ]
    return given, mask, rows


CHANGES = [
    {},
    {"kl_coef": 0.3, "kl": "k1"},
    {"kl_coef": 0.3, "kl": "k2", "entropy_coef": 0.1},
    {"kl_coef": 0.3, "kl": "k3", "entropy_coef": 0.1, "entropy_reduce": "token_mean"},
    {"reduce": "fixed", "max_length": 9},
    {"reduce": "seq_mean"},
]
CASES = [(name, change) for name in NAMED for change in CHANGES]
CASES += [
    ("grpo", c) for c in ({"delta": 1.3}, {"dual_clip": 1.1}, {"delta": 1.4, "dual_clip": 1.3})
]
CASES += [("cispo", {"clip_high": 0.2}), ("gmpo", {"clip_low": 0.2, "clip_high": 0.5})]
CASES += [("sapo", {"sapo_pos": 1.3}), ("gspo", {"clip_low": 0.05, "clip_high": 0.1})]
CASES += [(n, {"delta": 1.01, "dual_clip": 1.02}) for n in ("gspo", "gspo_token")]


@pytest.mark.parametrize(("name", "change"), CASES, ids=str)
def test_policy_loss_is_the_loop(name, change):
    spec = LossSpec.named(name, **({"max_length": 9} | change))
    given, mask, rows = inputs()
    logp = given["l"].clone().requires_grad_()
    out = policy_loss(
        logp, given["old"], given["a"], spec, mask=mask, ref_logp=given["ref"],
        entropy=given["h"], is_weight=given["w"],
    )  # fmt: skip
    out.loss.backward()
    oracle = Oracle(spec, rows)
    assert float(out.loss.detach()) == pytest.approx(oracle.loss(), rel=1e-10)
    want = torch.zeros_like(logp)
    want[mask] = torch.tensor([x for row in oracle.grad for x in row], dtype=F64)
    torch.testing.assert_close(logp.grad, want, rtol=1e-9, atol=1e-13)
    for key, value in oracle.metrics().items():
        assert float(out.metrics[key]) == pytest.approx(value, rel=1e-9), key
    active = (want != 0) | (mask & (spec.entropy_coef != 0))
    assert float(out.metrics["rows/active"]) == pytest.approx(int(active.sum()) / int(mask.sum()))


@pytest.mark.parametrize("name", NAMED)
def test_linear_policy_loss_is_policy_loss_of_the_logits(name):
    spec = LossSpec.named(name, kl_coef=0.1, entropy_coef=0.05, max_length=9)
    given, mask, _ = inputs()
    hidden = torch.randn(6, 14, 5, dtype=F64, requires_grad=True)
    weight = torch.randn(11, 5, dtype=F64, requires_grad=True)
    bias = torch.randn(11, dtype=F64, requires_grad=True)
    target = torch.randint(0, 11, (6, 14))
    u = hidden @ weight.T + bias
    log_p = torch.log_softmax(3 * torch.tanh(u / 3) / 0.7, -1)
    logp = log_p.gather(-1, target[..., None])[..., 0]
    old = logp.detach() + given["old"] - given["l"]
    known = {"mask": mask, "ref_logp": old - 0.1, "is_weight": given["w"]}
    want = policy_loss(logp, old, given["a"], spec, entropy=-(log_p.exp() * log_p).sum(-1), **known)
    got = linear_policy_loss(
        hidden,
        weight,
        target,
        old,
        given["a"],
        spec,
        bias=bias,
        temperature=0.7,
        softcap=3.0,
        **known,
    )
    leaves = (hidden, weight, bias)
    torch.testing.assert_close(got.loss, want.loss, rtol=1e-10, atol=1e-12)
    for x, y in zip(
        torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want.loss, leaves), strict=True
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-12)
    for key in want.metrics:
        torch.testing.assert_close(got.metrics[key], want.metrics[key], rtol=1e-9, atol=1e-12)


def one(logp, old, a, spec, **known):
    """Loss and gradient of one completion of tokens given as numbers."""
    x = torch.tensor(logp, dtype=F64, requires_grad=True)
    out = policy_loss(x, torch.tensor(old, dtype=F64), torch.tensor(a, dtype=F64), spec, **known)
    (grad,) = torch.autograd.grad(out.loss, x)
    return float(out.loss.detach()), grad.tolist(), out.metrics


def test_ppo_clip_worked_numbers():
    for a, rho, want in ((1, 1.5, 1.2), (-1, 1.5, -1.5), (1, 0.5, 0.5), (-1, 0.5, -0.8)):
        loss, grad, _ = one([math.log(rho)], [0.0], [float(a)], LossSpec())
        assert loss == pytest.approx(-want, rel=1e-12)
        cut = (a > 0 and rho > 1.2) or (a < 0 and rho < 0.8)
        assert grad[0] == pytest.approx(0.0 if cut else -a * rho, abs=1e-15)
    for d, want in ((-0.5, 0.106531), (0.0, 0.0), (0.5, 0.148721)):
        spec = LossSpec(kl_coef=1.0)
        _, _, metrics = one([0.0], [0.0], [0.0], spec, ref_logp=torch.tensor([d], dtype=F64))
        assert float(metrics["kl"]) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("a", [1.0, -1.0])
def test_ties_keep_the_gradient(a):
    edge = LossSpec(clip_low=0.0, clip_high=0.0)  # ratio 1 lies on both bounds
    assert one([-3.0], [-3.0], [a], edge)[1] == [-a]
    assert one([-3.0], [-3.0], [a], LossSpec(ratio="sequence", clip_low=0.0, clip_high=0.0))[1] == [
        -a
    ]
    geometric = LossSpec.named("gmpo", clip_low=0.0, clip_high=0.0)
    assert one([-3.0], [-3.0], [a], geometric)[1] == [-a]
    bounded = LossSpec(clip_low=0.0, clip_high=0.0, delta=1.0)
    assert one([-3.0], [-3.0], [a], bounded)[1] == [-a]
    below = math.log(0.5)  # exp(log 0.5) is 0.5 exactly
    assert math.exp(below) == 0.5
    assert one([below], [0.0], [a], LossSpec(clip_low=0.5))[1] == [-0.5 * a]
    above = math.log(1.5)
    assert one([above], [0.0], [a], LossSpec(clip_high=math.exp(above) - 1))[1][0] == pytest.approx(
        -1.5 * a
    )
    capped = LossSpec(clip_high=0.25, delta=math.exp(above), dual_clip=math.exp(above))
    assert one([above], [0.0], [a], capped)[1][0] == (pytest.approx(1.5) if a < 0 else 0.0)


def test_zero_advantage_has_zero_gradient_and_is_not_active():
    for name in NAMED:
        _, grad, metrics = one(
            [-1.0, -2.0], [-9.0, -1.0], [0.0, 0.0], LossSpec.named(name, max_length=2)
        )
        assert grad == [0, 0] and float(metrics["rows/active"]) == 0


def test_sequence_cuts_per_token_and_shares_the_rest():
    spec = LossSpec.named("gspo", clip_low=0.1, clip_high=0.1)
    loss, grad, metrics = one([0.5, 0.1], [0.0, 0.0], [2.0, -1.0], spec)
    rho = math.exp(0.3)
    assert loss == pytest.approx((-1.1 * 2 + rho) / 2)  # the first token is cut at 1.1
    assert grad == pytest.approx([rho / 4, rho / 4])
    assert float(metrics["clip_ratio/high_mean"]) == 0.5
    _, grad, _ = one(
        [0.5, 0.1], [0.0, 0.0], [2.0, -1.0], LossSpec.named("gspo_token", clip_high=0.1)
    )
    assert grad == pytest.approx([0.0, rho / 2])


def test_on_policy_without_old_logp():
    x = torch.tensor([-1.0, -2.0], dtype=F64, requires_grad=True)
    for name in NAMED:
        spec = LossSpec.named(name, max_length=2)
        out = policy_loss(x, None, torch.tensor([3.0], dtype=F64), spec)
        (grad,) = torch.autograd.grad(out.loss, x)
        torch.testing.assert_close(grad, torch.full_like(grad, -1.5), rtol=1e-12, atol=0)
        assert float(out.metrics["ratio/mean"]) == 1


def test_exponents_are_clamped_with_gradient_zero():
    top = math.exp(20)
    loss, grad, _ = one([30.0], [0.0], [-1.0], LossSpec())
    assert loss == pytest.approx(top) and grad == [0.0]
    loss, grad, _ = one([0.0], [50.0], [1.0], LossSpec())
    assert loss == pytest.approx(-1 / top) and grad == [0.0]
    assert one([20.0], [0.0], [-1.0], LossSpec())[1][0] == pytest.approx(top)
    spec = LossSpec(kl_coef=1.0)
    loss, grad, _ = one([0.0], [0.0], [0.0], spec, ref_logp=torch.tensor([30.0], dtype=F64))
    assert loss == pytest.approx(top - 31) and grad == [1.0]  # the linear term is not clamped


@pytest.mark.parametrize("name", NAMED)
def test_nothing_to_learn_from_gives_zero(name):
    spec = LossSpec.named(name, max_length=3, kl_coef=0.1, entropy_coef=0.1)
    for shape in ((0, 3), (2, 0), (2, 3)):
        x = torch.full(shape, math.nan, requires_grad=True)
        known = {"mask": torch.zeros(shape, dtype=torch.int64), "ref_logp": x, "entropy": x}
        out = policy_loss(x, x, torch.zeros(shape[0]), spec, **known)
        out.loss.backward()
        assert float(out.loss.detach()) == 0 and x.grad is not None and x.grad.eq(0).all()
        assert all(float(value) == 0 for value in out.metrics.values())


@pytest.mark.parametrize("name", NAMED)
def test_a_nonfinite_token_is_counted_and_has_no_coefficient(name):
    spec = LossSpec.named(name, max_length=3, clip_low=0.5, clip_high=0.5)
    base = torch.tensor([[-1.0, -2.0, -1.5]], dtype=F64)
    for which, bad in itertools.product(range(4), (math.nan, math.inf, -math.inf)):
        given = [base.clone(), base - 0.1, torch.ones_like(base), torch.ones_like(base)]
        given[which][0, 1] = bad
        x = given[0].requires_grad_()
        out = policy_loss(x, given[1], given[2], spec, is_weight=given[3])
        (grad,) = torch.autograd.grad(out.loss, x)
        assert grad.isfinite().all() and grad[0, 1] == 0 and (grad[0, [0, 2]] != 0).all()
        assert float(out.metrics["nonfinite"]) == 1 and float(out.metrics["tokens"]) == 3
    clean = policy_loss(base, base - 0.1, torch.ones_like(base), spec).loss
    if spec.ratio == "token":  # it stays in the divisor: two thirds of the tokens are left
        x = torch.tensor([[-1.0, math.nan, -1.0]], dtype=F64)
        left = policy_loss(x, x - 0.1, torch.ones_like(x), spec).loss
        whole = torch.full_like(x, -1.0)
        full = policy_loss(whole, whole - 0.1, torch.ones_like(x), spec).loss
        torch.testing.assert_close(left, full * 2 / 3)
    assert clean.isfinite()


def test_linear_policy_loss_confines_bad_rows():
    for bad in (math.nan, math.inf, -math.inf, 1e38):
        hidden = torch.randn(1, 4, 3)
        hidden[0, 1] = bad
        hidden.requires_grad_()
        weight = torch.randn(5, 3, requires_grad=True)
        target = torch.tensor([[1, 2, 3, 99]])
        mask = torch.tensor([[1, 1, 1, 0]])
        out = linear_policy_loss(
            hidden, weight, target, None, torch.ones(1), LossSpec(entropy_coef=0.1), mask=mask
        )
        out.loss.backward()
        assert out.loss.isfinite() and weight.grad.isfinite().all() and weight.grad.abs().sum() > 0
        if float(out.metrics["nonfinite"]) == 1:
            assert hidden.grad[0, [1, 3]].eq(0).all()
        assert hidden.grad[0, [0, 2]].ne(0).any()
        assert math.isfinite(bad) or float(out.metrics["nonfinite"]) == 1


def test_denominator_replaces_the_divisor():
    given, mask, _ = inputs()
    count = {"seq_mean": 6, "token_mean": int(mask.sum()), "fixed": 6 * 9}
    for reduce, own in count.items():
        spec = LossSpec(reduce=reduce, max_length=9)
        free = LossSpec(reduce=reduce)
        base = policy_loss(given["l"], given["old"], given["a"], spec, mask=mask).loss
        for divisor in (2 * own, 2.0 * own, torch.tensor(2 * own), torch.tensor(2.0 * own)):
            got = policy_loss(
                given["l"], given["old"], given["a"], free, mask=mask, denominator=divisor
            )
            torch.testing.assert_close(got.loss, base / 2)
    for wrong in (0, -1, math.nan, math.inf, torch.tensor(0.0), torch.ones(1), True, "4"):
        with pytest.raises(ValueError, match="denominator must be"):
            policy_loss(given["l"], given["old"], given["a"], LossSpec(), denominator=wrong)
