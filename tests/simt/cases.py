"""Every CUDA op under the shim against the float64 reference: odd sizes, masks, poison, ties.

    python -m simt.cases LIBRARY [SCHEDULE ...]       prints one hash of all results per schedule
    ONLY=credit python -m simt.cases LIBRARY          of the cases whose name holds the word

Small on purpose: a block of 256 fibers costs a millisecond. Run in a process of its own where the
library is built with a sanitizer.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
from simt.core import Core, attach

from reasonrl import LossSpec, StepCredit, TokenCredit, checks
from reasonrl.kernels import reference
from reasonrl.loss import NAMED

EPS = torch.finfo(torch.float32).eps


def close(got: torch.Tensor, truth: torch.Tensor, rtol: float, scale: float = 0.0) -> None:
    most = max(float(truth.detach().abs().max()) if truth.numel() else 0.0, scale)
    error = (got.detach().double() - truth.detach().double()).abs()
    assert not error.numel() or float(error.max()) <= rtol * max(most, 1e-30), (error.max(), most)


def tokens(cu: torch.Tensor, g: torch.Generator):
    n = int(cu[-1])

    def normal():
        return torch.randn(n, generator=g)

    logp = -normal().abs() - 0.1
    x = {"old": logp + 0.3 * normal(), "advantage": normal(), "ref": logp + 0.3 * normal()}
    x |= {"entropy": normal().abs(), "weight": normal().exp()}
    x["old"][::37] = logp[::37] + 22
    x["old"][1::37] = logp[1::37] - 22
    x["advantage"][::7] = 0
    mask = torch.rand(n, generator=g) > 0.3
    if n > 4:
        mask[1:4] = True
        logp[2], x["advantage"][3] = math.nan, math.inf
    for value in (logp, *x.values()):
        value[~mask] = math.nan
    return logp, x, mask


def policy(op, spec, logp, x, cu, mask, dtype, full: bool, denominator=None):
    leaf = logp.to(dtype).clone().requires_grad_()
    given = {name: value.to(dtype).clone() for name, value in x.items()}
    entropy = given["entropy"].requires_grad_() if full else None
    loss, metrics = op(
        leaf,
        given["old"] if full else None,
        given["advantage"],
        spec,
        cu,
        mask if full else None,
        given["ref"] if full else None,
        entropy,
        given["weight"] if full else None,
        denominator,
    )
    loss.backward()
    grads = [leaf.grad] + ([entropy.grad] if full else [])
    return loss, grads, metrics


def policy_cases(cuda, g):
    """All named losses, KLs and reductions; ragged and empty completions; one of many chunks."""
    ragged = torch.tensor([0, 5, 5, 300, 301, 590])
    long = torch.tensor([0, 4096 + 257])
    for index, name in enumerate(NAMED):
        for kl, changes in (("k1", {}), ("k2", {"entropy_reduce": "token_mean"}), ("k3", {})):
            changes = {"kl": kl, "kl_coef": 0.1, "entropy_coef": 0.01, "max_length": 300} | changes
            if NAMED[name].get("surrogate", "clip") == "clip" and kl == "k3":
                changes |= {"dual_clip": 1.4, "delta": 1.6}
            spec = LossSpec.named(name, **changes)
            cu = long if (index, kl) == (1, "k1") or (name, kl) == ("gspo", "k1") else ragged
            yield from compare_policy(cuda, spec, cu, g, True, 3.0 if kl == "k2" else None)
        spec = LossSpec.named(name, max_length=300)
        yield from compare_policy(cuda, spec, ragged, g, False)
    for cu in (torch.zeros(1, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)):
        yield from compare_policy(cuda, LossSpec.named("grpo", entropy_coef=0.1), cu, g, True)


def compare_policy(cuda, spec, cu, g, full, denominator=None):
    logp, x, mask = tokens(cu, g)
    if not full:
        logp = logp.nan_to_num(-1.0)
        x["advantage"] = x["advantage"].nan_to_num(0.5, posinf=0.5)
    args = (spec, logp, x, cu, mask)
    loss, grads, metrics = policy(cuda.policy_loss, *args, torch.float32, full, denominator)
    truth = policy(reference.policy_loss, *args, torch.float64, full, denominator)
    size = float(truth[1][0].abs().sum()) * 3 + float(truth[0].detach().abs()) + 1
    close(loss, truth[0], 16 * EPS, size)
    for got, true in zip(grads, truth[1], strict=True):
        for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
            close(got[start:end], true[start:end], 32 * EPS)
        assert not full or (got[~mask] == 0).all()
    for name, value in truth[2].items():
        close(metrics[name], value, 1e-6, 1e-3)
    yield from (loss, *grads, *metrics.values())


def group_cases(cuda, g):
    reward = torch.randn(70, generator=g)
    group = torch.randint(-3, 9, (70,), generator=g)
    scored = torch.rand(70, generator=g) > 0.3
    reward[group == 2] = 0.1
    reward[~scored] = math.nan
    for kind in ("grpo", "dr_grpo", "rloo"):
        for ddof, given in ((0, scored), (1, None)):
            values = reward if given is not None else reward.nan_to_num(0.2)
            out = cuda.group_advantage(values, group, kind, given, ddof, 1e-6)
            true = reference.group_advantage(values.double(), group, kind, given, ddof, 1e-6)
            close(out, true, 8 * EPS)
            assert (out[true == 0] == 0).all()
            yield out
    assert cuda.group_advantage(reward[:0], group[:0], "grpo", None, 1, 0.0).numel() == 0


def credit_cases(cuda, g):
    """Rewards to advantages and to losses: steps and tokens, ragged, one group beside another."""
    cu, group = torch.tensor([0, 5, 5, 300, 301, 1501, 1511]), torch.tensor([4, -1, 4, 4, -1, 9])
    n, counts = 1511, torch.tensor([2, 0, 40, 1, 21, 0])
    step = torch.full((n,), -1)
    first = 0
    for start, end, count in zip(cu[:-1].tolist(), cu[1:].tolist(), counts.tolist(), strict=True):
        for k in range(count):
            width = max(1, (end - start) // count - 1)
            at = start + k * (end - start) // count
            step[at : min(at + width, end)] = first + k
        first += count
    mask = torch.rand(n, generator=g) > 0.3
    known = torch.rand(first, generator=g) > 0.2
    reward = torch.where(known, torch.rand(first, generator=g), math.nan)
    outcome = torch.tensor([1.0, 0.5, 0.0, math.nan, 0.5, 1.0])
    scored = torch.tensor([True, True, True, False, True, True])
    token = torch.where(mask, torch.randn(n, generator=g), math.nan)
    cu_steps = torch.tensor([0, *counts.cumsum(0).tolist()])
    steps = StepCredit(outcome, group, reward, step, cu_steps, scored, known)
    made = [
        replace(steps, kind=kind, pay=pay, baseline=base, gamma=gamma, divide=divide, ddof=ddof)
        for kind, pay, base, gamma, divide, ddof in (
            ("grpo", "return", "group", 1.0, False, 1),
            ("rloo", "return", "position", 0.9, True, 1),
            ("dr_grpo", "step", "group", 1.0, True, 1),
            ("grpo", "step", "position", 0.5, False, 0),
        )
    ]
    tokens = TokenCredit(token, outcome, group, scored)
    for form, gamma, base in (("rloo", 1.0, True), ("grpo", 0.9, False), ("reinforce", 1.0, False)):
        made.append(replace(tokens, form=form, gamma=gamma, verl_baseline=base))
    made.append(replace(tokens, outcome_weight=0.5, process_weight=2.0))
    known = outcome.nan_to_num(0.25)
    for form, white, given in (
        ("rloo", False, scored),
        ("grpo", True, scored),
        ("reinforce", True, None),
    ):
        args = (group, cu, mask, form, 0.9, 1, given, white, form == "rloo")
        out = cuda.prime_advantage(token, known, *args)
        true = reference.prime_advantage(token.double(), known.double(), *args)
        close(out, true, 32 * EPS)
        yield out
    logp, x, _ = compared(cu, g, mask)
    for k, credit in enumerate(made):
        lay = checks.Layout((n,), cu, mask)
        fast, true = credit.packed(lay, torch.float32), credit.packed(lay, torch.float64)
        dense = reference.credit_advantage(true, cu, mask)
        out = cuda.credit_advantage(fast, cu, mask)
        close(out, dense, 16 * EPS)
        yield out
        name = ("dapo", "gspo", "gmpo", "grpo")[k % 4]
        spec = LossSpec.named(name, kl_coef=0.1, clip_low=0.2, clip_high=0.3)
        results = []
        for op, kind, worth in (
            (cuda.policy_loss, torch.float32, fast),
            (reference.policy_loss, torch.float64, true),
        ):
            leaf = logp.to(kind).clone().requires_grad_()
            old, ref = x["old"].to(kind), x["ref"].to(kind)
            loss, metrics = op(leaf, old, worth, spec, cu, mask, ref, None, None, 77.0)
            loss.backward()
            results.append((loss, leaf.grad, metrics))
        (loss, grad, metrics), (true_loss, true_grad, true_metrics) = results
        close(loss, true_loss, 16 * EPS, float(true_grad.abs().sum()) * 3 + 1)
        close(grad, true_grad, 64 * EPS)
        for key, value in true_metrics.items():
            close(metrics[key], value, 1e-6, 1e-3)
        yield from (loss, grad, *metrics.values())
    nothing, none = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    no_rows = torch.zeros(1, dtype=torch.int64)
    lay = checks.Layout((0,), no_rows, None)
    empty = TokenCredit(nothing, nothing, none).packed(lay, torch.float32)
    loss, _ = cuda.policy_loss(
        nothing, None, empty, LossSpec.named("dapo"), no_rows, None, None, None, None, None
    )
    assert float(loss) == 0.0


def compared(cu, g, mask):
    logp, x, _ = tokens(cu, g)
    logp, x["old"], x["ref"] = (
        torch.where(mask, v.nan_to_num(-1.0), math.nan) for v in (logp, x["old"], x["ref"])
    )
    return logp, x, mask


def returns_cases(cuda, g):
    cu = torch.tensor([0, 1, 1, 300, 820])
    mask = torch.rand(820, generator=g) > 0.4
    for gamma, given in ((1.0, mask), (0.9, mask), (0.99, None), (0.0, mask)):
        value, grad = torch.randn(820, generator=g), torch.randn(820, generator=g)
        if given is not None:
            value[~given] = grad[~given] = math.nan
        x, y = value.clone().requires_grad_(), value.double().requires_grad_()
        out, true = cuda.returns(x, cu, given, gamma), reference.returns(y, cu, given, gamma)
        out.backward(grad)
        true.backward(grad.double())
        close(out, true, 8 * EPS)
        close(x.grad, y.grad, 8 * EPS)
        yield from (out, x.grad)


def step_cases(cuda, g):
    step = torch.randint(-1, 21, (300,), generator=g)
    step[step == 5] = -1
    step[100:180] = 3
    value = torch.randn(300, generator=g)
    value[step == 7] = value[step == 7].round()
    value[(step == 8).nonzero()[0]] = 0.0
    value[(step == 9).nonzero()[:2]] = 0.0
    value[step < 0] = math.nan
    upstream = torch.randn(22, generator=g)
    orders = (slice(None), step.argsort(stable=True))  # the second: no step before an earlier one
    for how, lie in product(("sum", "mean", "min", "max", "last", "prod"), orders):
        ids, x, y = step[lie], value[lie].clone().requires_grad_(), value[lie].double()
        y.requires_grad_()
        out, true = cuda.step_reduce(x, ids, 22, how), reference.step_reduce(y, ids, 22, how)
        out.backward(upstream)
        true.backward(upstream.double())
        close(out, true, 8 * EPS)
        close(x.grad, y.grad, 8 * EPS)
        yield from (out, x.grad)
    broken = torch.tensor([1.0, math.nan, 0.0, math.nan, 2.0, 3.0])
    ids = torch.tensor([0, 0, 0, 0, 1, 1])
    for how in ("min", "max"):
        x = broken.clone().requires_grad_()
        out = cuda.step_reduce(x, ids, 2, how)
        out.backward(torch.ones(2))
        chosen = 4 if how == "min" else 5
        assert out[0].isnan() and x.grad.tolist() == [float(i in (1, chosen)) for i in range(6)]
    for where, lie in product(("all", "last"), orders):
        grad = torch.randn(300, generator=g)
        x, y = upstream.clone().requires_grad_(), upstream.double().requires_grad_()
        out, true = (
            cuda.step_expand(x, step[lie], where),
            reference.step_expand(y, step[lie], where),
        )
        out.backward(grad)
        true.backward(grad.double())
        close(out, true, 0.0)
        close(x.grad, y.grad, 8 * EPS)
        yield from (out, x.grad)


def run(core: Core, only: str = "") -> str:
    """All cases on the core's schedule; the hash of every number that came out."""
    cuda, digest = attach(core), hashlib.sha256()
    for cases in (policy_cases, credit_cases, group_cases, returns_cases, step_cases):
        if only in cases.__name__:
            for out in cases(cuda, torch.Generator().manual_seed(1)):
                digest.update(out.detach().numpy().tobytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    shim = Core(Path(sys.argv[1]))
    for order in sys.argv[2:] or ["first"]:
        shim.schedule(order)
        print(order, run(shim, os.environ.get("ONLY", "")), flush=True)
