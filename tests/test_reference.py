"""The specification itself: gradcheck in float64 for every differentiable op, edges, and memory."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck

from reasonrl import LossSpec, implicit_prm_loss, implicit_reward, linear_policy_loss, ops, systems
from reasonrl.kernels import reference
from reasonrl.loss import NAMED

F64 = torch.float64


def leaf(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=F64, requires_grad=True)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logp_and_entropy_from_the_formula(softcap, temperature):
    u, target = leaf(5, 7) * 4, torch.randint(0, 7, (5,))
    s = [[softcap * math.tanh(x / softcap) if softcap else x for x in row] for row in u.tolist()]
    s = [[x / temperature for x in row] for row in s]
    got, ent = ops.logp(u, target, softcap=softcap, temperature=temperature, entropy=True)
    for i, row in enumerate(s):
        z = math.log(sum(map(math.exp, row)))
        assert got[i].item() == pytest.approx(row[int(target[i])] - z, rel=1e-12)
        want = -sum(math.exp(x - z) * (x - z) for x in row)
        assert ent[i].item() == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_gradcheck_logp(softcap):
    target, known = (
        torch.randint(0, 7, (5,)),
        {"softcap": softcap, "temperature": 0.7, "entropy": True},
    )
    assert gradcheck(lambda u: ops.logp(u, target, **known), leaf(5, 7))

    def linear(x, w, b):
        return ops.linear_logp(x, w, target, bias=b, **known)

    assert gradcheck(linear, (leaf(5, 3), leaf(7, 3), leaf(7)))


def test_linear_logp_does_not_depend_on_its_tiles(monkeypatch):
    x, w, target = leaf(7, 3), leaf(11, 3), torch.randint(0, 11, (7,))
    whole = torch.autograd.grad(ops.linear_logp(x, w, target).square().sum(), (x, w))
    monkeypatch.setattr(reference, "TILE", 22)
    tiled = torch.autograd.grad(ops.linear_logp(x, w, target).square().sum(), (x, w))
    for a, b in zip(whole, tiled, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", [n for n in NAMED if n not in ("cispo", "gspo_token")])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_gradcheck_losses(name, kl):  # cispo and gspo_token hold a stop-gradient on purpose
    spec = LossSpec.named(name, kl_coef=0.2, kl=kl, entropy_coef=0.1, max_length=5)
    old = torch.randn(7, dtype=F64) * 0.3 - 1.5
    known = {"cu_seqlens": torch.tensor([0, 4, 4, 7]), "mask": torch.tensor([1, 1, 0, 1, 1, 1, 1])}
    known |= {"ref_logp": old + 0.2, "is_weight": torch.rand(7, dtype=F64)}
    a, target = torch.randn(7, dtype=F64), torch.randint(0, 6, (7,))

    def given(logp, ent):
        return ops.policy_loss(logp, old, a, spec, entropy=ent, **known)[0]

    def linear(x, w, b):
        return linear_policy_loss(x, w, target, old, a, spec, bias=b, **known).loss

    assert gradcheck(given, (leaf(7) * 0.3 - 1.5, leaf(7)))
    assert gradcheck(linear, (leaf(7, 3), leaf(6, 3), leaf(6)))


def test_gradcheck_segments():
    cu, mask = torch.tensor([0, 3, 3, 8]), torch.tensor([1, 0, 1, 1, 1, 0, 1, 1])
    x, other = leaf(8), torch.randn(8, dtype=F64)
    assert gradcheck(lambda x: ops.returns(x, cu_seqlens=cu, mask=mask, gamma=0.9), x)
    assert gradcheck(lambda x: ops.whiten(x, mask=mask), x)
    assert gradcheck(lambda x: implicit_reward(x, other, mask=mask, cu_seqlens=cu), x)
    outcome = torch.rand(3, dtype=F64)
    assert gradcheck(
        lambda x: implicit_prm_loss(x, other, outcome, mask=mask, cu_seqlens=cu, beta=2.0), x
    )
    step = torch.tensor([0, 3, 0, -1, 1, 1, 3, 0])
    for how in ops.HOW:
        assert gradcheck(lambda x, how=how: ops.step_reduce(x, step, 4, how=how), x), how
    for where in ("all", "last"):
        assert gradcheck(lambda x, where=where: ops.step_expand(x, step, where=where), leaf(4))


@pytest.mark.parametrize("zeros", [1, 2])
def test_product_with_zeros_has_the_right_gradient(zeros):
    x = torch.tensor([0.0, 2, 3, 0 if zeros == 2 else 4], dtype=F64, requires_grad=True)
    ops.step_reduce(x, torch.zeros(4, dtype=torch.int64), 1, how="prod").backward()
    assert x.grad is not None and x.grad.tolist() == ([24, 0, 0, 0] if zeros == 1 else [0, 0, 0, 0])


def test_gradcheck_systems():
    assert gradcheck(systems.reasonflux_step_target, (leaf(4), leaf(4), leaf(4)))
    assert gradcheck(systems.dpo_loss, (leaf(4), leaf(4), leaf(4), leaf(4)))


def test_infinite_and_nan_logits_stay_in_their_row():
    u = torch.zeros(5, 3)
    u[1, 2] = -math.inf
    u[2, 0] = math.nan
    u[3, 1] = 1e4
    u[4, 0] = -math.inf  # the target's own
    u.requires_grad_()
    logp, ent = ops.logp(u, torch.tensor([0, 0, 0, 1, 0]), entropy=True, impl="reference")
    assert logp.tolist()[:2] == pytest.approx([-math.log(3), -math.log(2)])
    assert ent.tolist()[:2] == pytest.approx([math.log(3), math.log(2)])
    assert logp[2].isnan() and ent[2].isnan()
    assert logp[3] == 0 and ent[3] == 0 and logp[4] == -math.inf
    (grad,) = torch.autograd.grad((logp + ent)[[0, 1, 3, 4]].sum(), u)
    assert grad[[0, 1, 3, 4]].isfinite().all() and grad[1, 2] == 0


def test_long_returns_match_the_recursion():
    r, gamma = torch.randn(1000, dtype=F64), 0.97
    cu = torch.tensor([0, 1, 1, 640, 1000])
    want, run = torch.zeros(1000, dtype=F64), 0.0
    for t in reversed(range(1000)):
        run = r[t] + (0.0 if t + 1 in cu.tolist() else gamma * run)
        want[t] = run
    torch.testing.assert_close(
        ops.returns(r, cu_seqlens=cu, gamma=gamma), want, rtol=1e-12, atol=1e-12
    )


PEAK = """
import resource, torch
from reasonrl import ops
torch.set_num_threads(1)
x = torch.randn(2048, 16, requires_grad=True)
w = torch.randn(32768, 16, requires_grad=True)
t = torch.randint(0, 32768, (2048,))
ops.linear_logp(x[:64], w, t[:64], impl="reference").sum().backward()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ops.linear_logp(x, w, t, impl="reference").sum().backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


def test_linear_logp_never_holds_all_logits():
    run = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 200  # MiB; all logits take 256, plain torch keeps three such
