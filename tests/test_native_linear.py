"""linear_logp and linear_policy_loss on the CPU: chunks, both routes, exact skipping, scratch."""

from __future__ import annotations

import math

import pytest
import torch

from reasonrl import LossSpec
from reasonrl.kernels import native_head, reference
from reasonrl.loss import NAMED

EPS = torch.finfo(torch.float32).eps
N, D, V = 150, 24, 330


@pytest.fixture(autouse=True, params=["many words", "a few"])
def linear(require, poison, monkeypatch, request):
    from reasonrl.kernels import native, native_linear

    require("native", native.available())
    if request.param == "many words":
        monkeypatch.setattr(native_head, "SMALL", 0)
    return native_linear


def drawn(seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    head = [normal(N, D).to(dtype), (normal(V, D) / 2).to(dtype), normal(V).to(dtype)]
    target = torch.randint(0, V, (N,), generator=g)
    double = [x.double() for x in head]
    logp = reference.linear_logp(*double[:2], target, double[2], 0.8, 6.0, False)[0].float()
    advantage = normal(N)
    advantage[::5] = 0
    tokens = [logp + 0.2 * normal(N), advantage, logp + 0.1 * normal(N), normal(N).exp()]
    return head, target, tokens, torch.tensor([0, 5, 5, 70, 71, 140, N])


def run(op, head, target, tokens, cu, spec, mask=None, dtype=None, scale=3.0):
    leaves = [x.to(dtype or x.dtype).detach().clone().requires_grad_() for x in head]
    old, advantage, ref, weight = (x.to(dtype or x.dtype) for x in tokens)
    loss, metrics = op(
        *leaves[:2], target, old, advantage, spec, cu, mask, ref, leaves[2], 0.8, 6.0, weight, None
    )
    (loss * scale).backward()
    return loss, metrics, [x.grad for x in leaves]


def close(got, truth, rtol):
    error = float((got.double() - truth.double()).abs().max())
    assert error <= rtol * float(truth.abs().max()), error


@pytest.mark.parametrize("rows", [1, 7, 64, 0])
@pytest.mark.parametrize("name", NAMED)
def test_any_chunk_gives_the_loss_and_gradients(linear, monkeypatch, rows, name):
    monkeypatch.setattr(native_head, "CHUNK_ROWS", rows)
    for extra in ({}, {"entropy_coef": 0.02, "kl_coef": 0.1}):
        head, target, tokens, cu = drawn(rows)
        spec = LossSpec.named(name, max_length=90, **extra)
        loss, metrics, grads = run(linear.linear_policy_loss, head, target, tokens, cu, spec)
        truth = run(
            reference.linear_policy_loss, head, target, tokens, cu, spec, dtype=torch.float64
        )
        assert abs(float(loss) - float(truth[0])) < 1e-5 * max(1, abs(float(truth[0])))
        for got, true in zip(grads, truth[2], strict=True):
            close(got, true, 64 * EPS)
        for key, value in truth[1].items():
            assert abs(float(metrics[key]) - float(value)) < 1e-5 * max(1, abs(float(value))), key


@pytest.mark.parametrize("name", ["dapo", "grpo", "gspo", "gmpo"])
def test_masked_and_broken_rows_leave_no_trace(linear, monkeypatch, name):
    monkeypatch.setattr(native_head, "CHUNK_ROWS", 16 if name != "gspo" else 80)
    head, target, tokens, cu = drawn()
    mask = torch.rand(N) > 0.4
    mask[6] = True
    head[0][~mask], head[0][6] = math.nan, math.inf
    for x in tokens:
        x[~mask] = math.inf
    spec = LossSpec.named(name, kl_coef=0.1)
    clean = torch.where(mask, target, 0)
    truth = run(reference.linear_policy_loss, head, clean, tokens, cu, spec, mask, torch.float64)
    target[~mask] = 10**12
    loss, metrics, grads = run(linear.linear_policy_loss, head, target, tokens, cu, spec, mask)
    assert abs(float(loss) - float(truth[0])) < 1e-5
    assert metrics["nonfinite"] == 1 and metrics["tokens"] == mask.sum()
    for got, true in zip(grads, truth[2], strict=True):
        close(got, true, 64 * EPS)
    assert (grads[0][~mask] == 0).all() and (grads[0][6] == 0).all()


def test_only_live_rows_reach_the_gradient_products(linear, monkeypatch):
    head, target, tokens, cu = drawn()
    tokens[1][:100] = 0
    seen, made = [], []
    back, logits = native_head.Head.back, native_head.Head.logits
    monkeypatch.setattr(native_head, "CHUNK_ROWS", 32)
    monkeypatch.setattr(
        native_head.Head, "back", lambda self, du: (seen.append(du.shape[0]), back(self, du))[1]
    )
    monkeypatch.setattr(
        native_head.Head, "logits", lambda self, x: (made.append(x.shape[0]), logits(self, x))[1]
    )
    _, metrics, grads = run(
        linear.linear_policy_loss, head, target, tokens, cu, LossSpec.named("reinforce")
    )
    live = int((tokens[1] != 0).sum())
    assert sum(seen) == live and sum(made) == N and max(made) == 32
    assert abs(float(metrics["rows/active"]) - live / N) < 1e-6
    assert (grads[0][tokens[1] == 0] == 0).all()
    mask = torch.arange(N) % 3 == 0
    made.clear()
    run(linear.linear_policy_loss, head, target, tokens, cu, LossSpec.named("reinforce"), mask)
    assert sum(made) == 50


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_linear_logp_against_stock_torch(linear, monkeypatch, dtype):
    """Error against float64 at most 2x (value) and 3x (gradient) that of torch in that dtype."""
    monkeypatch.setattr(native_head, "CHUNK_ROWS", 41)
    head, target, _, _ = drawn(dtype=dtype)
    c, eta = torch.randn(N), torch.randn(N)
    c[::3] = eta[::3] = 0

    def stock(hidden, weight, bias):
        u = torch.nn.functional.linear(hidden, weight, bias)
        log_p = torch.log_softmax(u if u.dtype == torch.float64 else u.float(), -1)
        return log_p.gather(-1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)

    def ours(hidden, weight, bias):
        return linear.linear_logp(hidden, weight, target, bias, 1.0, None, True)

    results = []
    for op, as_type in ((ours, dtype), (stock, dtype), (stock, torch.float64)):
        leaves = [x.to(as_type).detach().clone().requires_grad_() for x in head]
        logp, entropy = op(*leaves)
        (logp @ c.to(logp.dtype) + entropy @ eta.to(logp.dtype)).backward()
        results.append([logp.detach(), entropy.detach(), *(x.grad for x in leaves)])
    for i, (got, yard, truth) in enumerate(zip(*results, strict=True)):
        error = float((got.double() - truth).abs().max())
        allowed = (2 if i < 2 else 3) * float((yard.double() - truth).abs().max())
        assert error <= allowed + 4 * EPS * float(truth.abs().max()), i


def test_mixed_types_frozen_parts_and_second_use(linear):
    head, target, tokens, cu = drawn()
    spec = LossSpec.named("dapo")
    hidden = head[0].bfloat16().requires_grad_()
    args = (hidden, head[1], target, *tokens[:2], spec, cu, None, None, None, 1.0, None, None, 1.0)
    loss, _ = linear.linear_policy_loss(*args)
    loss.backward(retain_graph=True)
    first = hidden.grad.clone()
    loss.backward()
    assert hidden.grad.dtype == torch.bfloat16 and torch.equal(hidden.grad, 2 * first)
    assert first.abs().sum() > 0 and head[1].grad is None
    with torch.no_grad():
        plain, _ = linear.linear_policy_loss(*args)
    assert plain == loss and not plain.requires_grad


def test_hidden_states_and_weights_that_lie_across(linear):
    head, target, tokens, cu = drawn()
    tokens[1][tokens[1] == 0] = 0.5  # all rows learn, as they stand
    spec, op = LossSpec.named("reinforce"), linear.linear_policy_loss
    _, _, wanted = run(op, head, target, tokens, cu, spec)
    across = [head[0].t().contiguous().t(), head[1].t().contiguous().t(), head[2]]
    leaves = [x.detach().requires_grad_() for x in across]
    known = tokens[0], tokens[1], spec, cu, None, tokens[2], leaves[2], 0.8, 6.0, tokens[3], None
    (op(*leaves[:2], target, *known)[0] * 3.0).backward()
    for leaf, want in zip(leaves, wanted, strict=True):
        assert not leaf.is_contiguous() or leaf.dim() == 1
        torch.testing.assert_close(leaf.grad, want, rtol=1e-4, atol=1e-6)


def test_empty_batches(linear):
    head, target, tokens, _ = drawn()
    nothing = [head[0][:0], *head[1:]]
    for name in NAMED:
        spec = LossSpec.named(name, max_length=3)
        for cu in (torch.zeros(1, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)):
            empty = [x[:0] for x in tokens]
            loss, _, grads = run(linear.linear_policy_loss, nothing, target[:0], empty, cu, spec)
            assert loss == 0 and all((g == 0).all() for g in grads)
        mask, cu = torch.zeros(N, dtype=torch.bool), torch.tensor([0, N])
        loss, _, grads = run(linear.linear_policy_loss, head, target, tokens, cu, spec, mask)
        assert loss == 0 and all((g == 0).all() for g in grads)


@pytest.mark.parametrize("entropy", [False, True])
def test_a_gradient_of_nothing_but_zeros(linear, entropy):
    """A batch without any advantage: no row is live, and the gradients are exactly zero."""
    head, target, _, _ = drawn()
    leaves = [x.clone().requires_grad_() for x in head]
    logp, ent = linear.linear_logp(*leaves[:2], target, leaves[2], 0.8, None, entropy)
    total = (logp * 0).sum() if ent is None else (logp * 0).sum() + (ent * 0).sum()
    total.backward()
    for x in leaves:
        assert x.grad is not None and x.grad.shape == x.shape and not x.grad.any()
