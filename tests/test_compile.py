"""torch.compile(fullgraph=True) through every op: the same numbers and gradients as eager mode."""

from __future__ import annotations

import pytest
import torch

from reasonrl import LossSpec, compiled, linear_policy_loss, ops, policy_loss
from reasonrl.loss import NAMED

CU = torch.tensor([0, 2, 2, 6])
MASK = torch.tensor([1, 1, 0, 1, 1, 1])


def same(call, *leaves):
    leaves = [x.requires_grad_() for x in leaves]
    torch.compiler.reset()
    results = []
    for f in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = f(*leaves)
        out = out if isinstance(out, tuple) else (out,)
        total = sum((x * torch.linspace(0.5, 2, x.numel()).view(x.shape)).sum() for x in out)
        grads = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else ()
        results.append((*out, *grads))
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_logp(impl):
    target = torch.tensor([0, 3, 2, 1, 4, 4])
    known = {"temperature": 0.7, "softcap": 4.0, "entropy": True, "impl": impl}
    same(lambda u: ops.logp(u, target, **known), torch.randn(6, 5))
    same(lambda u: ops.logp(u, target, impl=impl), torch.randn(6, 5))
    call = lambda x, w, b: ops.linear_logp(x, w, target, bias=b, **known)  # noqa: E731
    same(call, torch.randn(6, 3), torch.randn(5, 3), torch.randn(5))
    same(lambda x, w: ops.linear_logp(x, w, target), torch.randn(6, 3), torch.randn(5, 3))


@pytest.mark.parametrize("name", ["grpo", "gspo", "gmpo", "cispo"])
def test_losses(name):
    spec = LossSpec.named(name, kl_coef=0.1, entropy_coef=0.05, max_length=6)
    old, a, target = torch.randn(6) - 2, torch.randn(3), torch.tensor([0, 3, -100, 1, 4, 4])
    known = {"mask": MASK, "cu_seqlens": CU, "ref_logp": old + 0.1}

    def given(logp, ent):
        out = policy_loss(logp, old, a, spec, entropy=ent, **known)
        return out.loss, out.metrics["kl"], out.metrics["tokens"]

    same(given, old + 0.2, torch.rand(6))

    def linear(x, w):
        return linear_policy_loss(x, w, target, old, a, spec, temperature=0.9, **known).loss

    same(linear, torch.randn(6, 3), torch.randn(5, 3))


def test_segments():
    known = {"mask": MASK, "cu_seqlens": CU}
    step = torch.tensor([0, 0, 1, -1, 2, 2])
    same(lambda x: ops.returns(x, gamma=0.9, **known), torch.randn(6))
    same(lambda x: ops.whiten(x, mask=MASK), torch.randn(6))
    for how in ops.HOW:
        same(lambda x, how=how: ops.step_reduce(x, step, 4, how=how), torch.randn(6))
    same(lambda x: ops.step_expand(x, step, where="last"), torch.randn(3))
    group = torch.tensor([0, 0, 1])
    same(lambda r: ops.group_advantage(r, group), torch.randn(3))
    same(
        lambda r: ops.prime_advantage(r, torch.ones(3), group, form="grpo", **known), torch.randn(6)
    )


def test_the_form_holds_every_argument():
    for name in NAMED:
        spec = LossSpec.named(name, max_length=5)
        args = (torch.zeros(2), None, 0.5, 3, True, False, "min", spec, torch.ones(1))
        back = compiled.read(*compiled.write(args))
        assert back[1:7] == args[1:7] and torch.equal(back[8], args[8])
        assert {k: getattr(spec, k) for k in compiled.SPEC} == vars(back[7])
    assert compiled.SPEC == list(LossSpec.__dataclass_fields__)
