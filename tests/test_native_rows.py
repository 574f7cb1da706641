"""What linear_policy_loss leaves out: rows known to have no effect, half-precision products."""

from __future__ import annotations

import math

import pytest
import torch

from reasonrl import LossSpec, linear_logp, linear_policy_loss
from reasonrl.kernels import native_head
from reasonrl.loss import NAMED

N, D, V = 150, 24, 331
CU = torch.tensor([0, 5, 5, 70, 71, 140, N])


@pytest.fixture(autouse=True)
def linear(require, poison, monkeypatch):
    from reasonrl.kernels import native, native_linear

    require("native", native.available())
    monkeypatch.setattr(native_head, "CHUNK_ROWS", 75)
    return native_linear


def drawn(seed=0):
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(N, D, generator=g), torch.randn(V, D, generator=g) / 2
    target, advantage = torch.randint(0, V, (N,), generator=g), torch.randn(N, generator=g)
    advantage[::5] = 0
    advantage[70:140] = 0  # two completions without credit
    return hidden, weight, target, advantage, torch.rand(N, generator=g) > 0.3


def run(hidden, weight, target, advantage, mask, spec, impl, **known):
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    old = known.pop("old_logp", None)
    out = linear_policy_loss(
        *leaves, target, old, advantage, spec, mask=mask, cu_seqlens=CU, impl=impl, **known
    )
    out.loss.backward()
    return out, [x.grad for x in leaves]


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("masked", [False, True])
def test_on_policy_rows_without_advantage_skip_the_forward_exactly(
    linear, monkeypatch, name, masked
):
    hidden, weight, target, advantage, mask = drawn()
    mask = mask if masked else None
    spec = LossSpec.named(name, max_length=90)
    made, logits = [], native_head.Head.logits
    monkeypatch.setattr(
        native_head.Head, "logits", lambda self, x: (made.append(x.shape[0]), logits(self, x))[1]
    )
    got = run(hidden, weight, target, advantage, mask, spec, "native")
    true = run(
        hidden.double(), weight.double(), target, advantage.double(), mask, spec, "reference"
    )
    kept = torch.ones(N, dtype=torch.bool) if mask is None else mask
    dead = advantage == 0
    if spec.ratio != "token":  # one token's advantage moves its whole completion
        dead = torch.arange(N).ge(70) & torch.arange(N).lt(140)
    assert sum(made) == int((kept & ~dead).sum())
    assert abs(float(got[0].loss) - float(true[0].loss)) < 1e-6
    for key, value in true[0].metrics.items():
        assert abs(float(got[0].metrics[key]) - float(value)) < 1e-6, key
    for a, b in zip(got[1], true[1], strict=True):
        assert float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


@pytest.mark.parametrize(
    "known", [{"old_logp": torch.zeros(N)}, {"ref_logp": torch.zeros(N)}, {"entropy_coef": 0.1}]
)
def test_rows_that_a_metric_needs_are_computed(linear, monkeypatch, known):
    hidden, weight, target, advantage, _ = drawn()
    made, logits = [], native_head.Head.logits
    monkeypatch.setattr(
        native_head.Head, "logits", lambda self, x: (made.append(x.shape[0]), logits(self, x))[1]
    )
    known = dict(known)
    spec = LossSpec.named("dapo", entropy_coef=known.pop("entropy_coef", 0.0))
    run(hidden, weight, target, advantage, None, spec, "native", **known)
    assert sum(made) == N


@pytest.mark.parametrize("where", ["hidden", "weight"])
def test_rows_that_are_not_finite_are_still_found(where):
    hidden, weight, target, advantage, _ = drawn()
    (hidden if where == "hidden" else weight)[0, 0] = math.nan  # row 0 has no advantage
    spec = LossSpec.named("dapo")
    got, grads = run(hidden, weight, target, advantage, None, spec, "native")
    assert float(got.metrics["nonfinite"]) == (1 if where == "hidden" else N)
    assert all(torch.isfinite(g).all() for g in grads[:1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["dapo", "gspo"])
def test_widened_products_are_at_least_as_exact(linear, monkeypatch, dtype, name):
    """Half-precision inputs through fp32 products: nearer to the truth than rounded logits."""
    monkeypatch.setattr(native_head, "TILE", 100)
    hidden, weight, target, advantage, mask = drawn(3)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    spec = LossSpec.named(name, kl_coef=0.1)
    known = {"ref_logp": torch.full((N,), -5.0), "bias": torch.randn(V).to(dtype)}
    true = run(
        hidden.double(), weight.double(), target, advantage.double(), mask, spec, "reference",
        ref_logp=known["ref_logp"].double(), bias=known["bias"].double(),
    )  # fmt: skip
    errors = {}
    for widen in (True, False):
        monkeypatch.setattr(native_head, "WIDEN", widen)
        got = run(hidden, weight, target, advantage, mask, spec, "native", **known)
        assert [g.dtype for g in got[1]] == [dtype, dtype]
        pairs = zip(got[1], true[1], strict=True)
        errors[widen] = [float((a.double() - b).abs().max() / b.abs().max()) for a, b in pairs]
        taken = linear_logp(hidden, weight, target, impl="native")
        exact = linear_logp(hidden.double(), weight.double(), target)
        errors[widen].append(float((taken.double() - exact).abs().max()))
    assert all(a <= b * 1.05 for a, b in zip(errors[True], errors[False], strict=True)), errors
    assert errors[True][2] < errors[False][2] / 10


def test_slow_products_are_recognised(linear, monkeypatch):
    for fast in (True, False):
        native_head.slow.cache_clear()
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda fast=fast: fast)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cpu, "_is_amx_fp16_supported", lambda fast=fast: fast)
        assert native_head.slow(torch.bfloat16) is native_head.slow(torch.float16) is (not fast)
        assert not native_head.slow(torch.float32)
    native_head.slow.cache_clear()
