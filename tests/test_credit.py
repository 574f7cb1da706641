"""Rewards in place of advantages: the same numbers as the ops one by one, in every loss."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from reasonrl import (
    LossSpec,
    StepCredit,
    TokenCredit,
    credit_advantage,
    linear_policy_loss,
    ops,
    policy_loss,
)
from reasonrl.loss import NAMED
from reasonrl.records import KernelUnavailable

ULP = torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def native(require, poison):
    from reasonrl.kernels import native as module

    require("native", module.available())
    return module


def made(seed: int, lengths=(7, 0, 1, 1500, 33, 12), groups=3):
    """Ragged completions cut into runs of tokens, some in no step; masks that hide poison."""
    g = torch.Generator().manual_seed(seed)
    b, n = len(lengths), sum(lengths)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    step, counts, first = [], [], 0
    for length in lengths:
        ids, own = [], 0
        while len(ids) < length:
            run = int(torch.randint(1, 9, (1,), generator=g))
            inside = bool(torch.rand(1, generator=g) > 0.3)
            ids += [first + own if inside else -1] * min(run, length - len(ids))
            own += inside
        step += ids
        counts.append(own)
        first += own
    s = first
    mask = torch.rand(n, generator=g) > 0.2
    token = torch.where(mask, torch.randn(n, generator=g), math.nan)
    known = torch.rand(s, generator=g) > 0.2
    scored = torch.rand(b, generator=g) > 0.15
    scored[:2] = True
    x = {
        "outcome": torch.where(scored, torch.randint(0, 3, (b,), generator=g) / 2, math.nan),
        "group": torch.randint(0, groups, (b,), generator=g) * 7 - 3,
        "scored": scored,
        "step_reward": torch.where(known, torch.rand(s, generator=g), math.nan),
        "step_scored": known,
        "step": torch.tensor(step, dtype=torch.long),
        "step_cu": torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()]),
        "token_reward": token,
    }
    logp = torch.randn(n, generator=g) * 0.5 - 2
    rest = {"old": logp + 0.3 * torch.randn(n, generator=g), "ref": logp + 0.2}
    logp[~mask] = math.nan
    return x, cu, mask, logp, rest


STEPS = [
    {"kind": kind, "pay": pay, "baseline": base, "gamma": gamma, "divide": divide}
    for kind, pay, base, gamma, divide in itertools.product(
        ("grpo", "dr_grpo", "rloo"),
        ("return", "step"),
        ("group", "position"),
        (1.0, 0.9),
        (False, True),
    )
]
TOKENS = [
    {"form": form, "gamma": gamma, "verl_baseline": base}
    for form, gamma, base in itertools.product(
        ("rloo", "grpo", "reinforce"), (1.0, 0.9), (False, True)
    )
    if form == "rloo" or not base
]


def step_credit(x, dtype=torch.float32, **options):
    return StepCredit(
        x["outcome"].to(dtype), x["group"], x["step_reward"].to(dtype), x["step"], x["step_cu"],
        scored=x["scored"], step_scored=x["step_scored"], **options,
    )  # fmt: skip


def token_credit(x, dtype=torch.float32, **options):
    return TokenCredit(
        x["token_reward"].to(dtype), x["outcome"].to(dtype), x["group"], x["scored"], **options
    )


def one_by_one(x, cu, mask, options):
    """What algos/process.py did with five ops, in float64."""
    kind, counts = options["kind"], x["step_cu"].diff()
    whole = ops.group_advantage(x["outcome"].double(), x["group"], kind=kind, scored=x["scored"])
    owner = x["group"].repeat_interleave(counts)
    if options["baseline"] == "position":
        place = torch.cat([torch.arange(c) for c in counts.tolist()])
        owner = owner * 10_000 + place
    worth = ops.group_advantage(
        x["step_reward"].double(), owner, kind=kind, scored=x["step_scored"]
    )
    worth = worth / counts.repeat_interleave(counts) if options["divide"] else worth
    if options["pay"] == "step":
        paid = ops.step_expand(worth, x["step"])
    else:
        ends = ops.step_expand(worth, x["step"], where="last")
        paid = ops.returns(ends, cu_seqlens=cu, mask=mask, gamma=options["gamma"])
    return torch.where(mask, whole.repeat_interleave(cu.diff()) * 0.5 + 2.0 * paid, 0.0)


@pytest.mark.parametrize("seed", range(3))
def test_steps_equal_the_ops_one_by_one(seed):
    x, cu, mask, *_ = made(seed)
    for options in STEPS:
        weights = {"outcome_weight": 0.5, "process_weight": 2.0}
        truth = one_by_one(x, cu, mask, options)
        for dtype, impl, tolerance in (
            (torch.float64, "reference", 1e-12),
            (torch.float32, "native", 32 * ULP),
        ):
            credit = step_credit(x, dtype, **options, **weights)
            got = credit_advantage(credit, cu_seqlens=cu, mask=mask, impl=impl)
            gap = (got.double() - truth).abs().max() / truth.abs().max().clamp(min=1)
            assert float(gap) < tolerance, (options, impl)
            assert got[~mask].eq(0).all()


@pytest.mark.parametrize("seed", range(3))
def test_tokens_equal_prime(seed):
    x, cu, mask, *_ = made(seed)
    for options in TOKENS:
        truth = ops.prime_advantage(
            x["token_reward"].double(), x["outcome"].double(), x["group"], scored=x["scored"],
            cu_seqlens=cu, mask=mask, **options,
        )  # fmt: skip
        for dtype, impl, tolerance in (
            (torch.float64, "reference", 1e-12),
            (torch.float32, "native", 32 * ULP),
        ):
            credit = token_credit(x, dtype, **options)
            got = credit_advantage(credit, cu_seqlens=cu, mask=mask, impl=impl)
            gap = (got.double() - truth).abs().max() / truth.abs().max().clamp(min=1)
            assert float(gap) < tolerance, (options, impl)


def test_worked_prime_example_through_the_loss():
    """SYSTEMS 9.2 (PRIME eq. 5) as the gradient of REINFORCE: dL/dlogp = -A / N."""
    q = [[2.0, -1, 3, 0], [-2, -2, 0, 0], [1, 0, -1, -4], [0, 4, 0, 0]]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    want = [[0.916667, 0.8, 0.833333, 0], [-0.944444, -0.805556, 0, 0]]
    want += [[-0.955556, -0.983333, -0.961111, -0.888889], [0.922222, 0.894444, 0, 0]]
    credit = TokenCredit(
        0.05 * torch.tensor(q), torch.tensor([1.0, 0, 0, 1]), torch.zeros(4, dtype=torch.long)
    )
    logp = torch.full((4, 4), -1.0, requires_grad=True)
    for impl in ("native", "reference"):
        out = policy_loss(logp, None, credit, LossSpec.named("reinforce"), mask=mask, impl=impl)
        (grad,) = torch.autograd.grad(out.loss, logp)
        torch.testing.assert_close(-grad * 11, torch.tensor(want), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMED)
def test_the_fused_core_equals_advantages_and_loss(name):
    """Rewards in, the loss of dense advantages out: value, gradients, metrics; both layouts."""
    for case, (options, full) in enumerate(
        itertools.product([*STEPS[::5], *TOKENS[::2]], (False, True))
    ):
        x, cu, mask, logp, rest = made(case)
        change = {"kl_coef": 0.1, "kl": ("k1", "k2", "k3")[case % 3], "entropy_coef": 0.01}
        change = {"max_length": 40} | (change if full else {})
        spec = LossSpec.named(name, **change)
        build = step_credit if "kind" in options else token_credit
        entropy = torch.rand(len(logp))
        outs = []
        for advantage in (
            credit_advantage(build(x, **options), cu_seqlens=cu, mask=mask),
            build(x, **options),
        ):
            leaf = logp.clone().requires_grad_()
            out = policy_loss(
                leaf, rest["old"] if full else None, advantage, spec, mask=mask, cu_seqlens=cu,
                ref_logp=rest["ref"] if full else None, entropy=entropy if full else None,
                impl="native",
            )  # fmt: skip
            outs.append([out.loss, *torch.autograd.grad(out.loss, leaf), *out.metrics.values()])
        for dense, fused in zip(*outs, strict=True):
            scale = float(dense.abs().max()) if dense.numel() else 1.0
            torch.testing.assert_close(fused, dense, rtol=1e-5, atol=8 * ULP * max(scale, 1e-3))


def test_the_core_is_one_call(native, monkeypatch):
    """From rewards to loss and gradient nothing else of _C is called."""
    x, cu, mask, logp, rest = made(0)
    called = []

    class Watch:
        def __getattr__(self, name):
            found = getattr(real, name)
            if callable(found) and not isinstance(found, type):
                called.append(name)
            return found

    real = native.core()
    watch = Watch()
    monkeypatch.setattr(native, "core", lambda: watch)
    from reasonrl.kernels import native_credit

    monkeypatch.setattr(native_credit, "core", lambda: watch)
    leaf = logp.clone().requires_grad_()
    policy_loss(
        leaf, rest["old"], step_credit(x), LossSpec.named("dapo"), mask=mask, cu_seqlens=cu
    ).loss.backward()
    assert [name for name in called if name != "count_tokens"] == ["credit_loss"]


def test_linear_policy_loss_takes_a_credit():
    x, cu, mask, _, rest = made(5, lengths=(5, 9, 3, 4))
    hidden, weight = torch.randn(21, 8), torch.randn(50, 8)
    target = torch.randint(0, 50, (21,))
    spec = LossSpec.named("dapo")
    known = {"mask": mask, "cu_seqlens": cu}
    credit = step_credit(x)
    dense = credit_advantage(credit, **known)
    for impl in ("native", "reference"):
        a, b = (
            linear_policy_loss(hidden, weight, target, None, v, spec, impl=impl, **known).loss
            for v in (credit, dense)
        )
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_compiled_whole():
    x, cu, mask, logp, rest = made(1, lengths=(7, 0, 5, 12))
    spec = LossSpec.named("dapo")

    def loss(leaf):
        out = policy_loss(leaf, rest["old"], step_credit(x), spec, mask=mask, cu_seqlens=cu)
        return out.loss

    leaves = [logp.clone().requires_grad_() for _ in range(2)]
    torch.compile(loss, fullgraph=True, backend="aot_eager")(leaves[0]).backward()
    loss(leaves[1]).backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_same_bits_for_any_number_of_threads():
    x, cu, mask, logp, rest = made(2, lengths=(4000, 7, 0, 2500, 1300))
    found = set()
    before = torch.get_num_threads()
    try:
        for threads in (1, 2) * 10:
            torch.set_num_threads(threads)
            leaf = logp.clone().requires_grad_()
            out = policy_loss(
                leaf, rest["old"], token_credit(x), LossSpec.named("gspo"), mask=mask, cu_seqlens=cu
            )
            out.loss.backward()
            found.add((float(out.loss), leaf.grad.numpy().tobytes()))
    finally:
        torch.set_num_threads(before)
    assert len(found) == 1


@pytest.mark.parametrize("form", ["rloo", "grpo", "reinforce"])
def test_a_group_among_many_has_the_bits_it_has_alone(form):
    """Many groups are gone through side by side, few completion by completion."""
    groups, size = 12, 3
    gen = torch.Generator().manual_seed(5)
    lengths = torch.randint(0, 700, (groups * size,), generator=gen)
    cu = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    token, n = torch.randn(int(cu[-1]), generator=gen), groups * size
    outcome = torch.randint(0, 2, (n,), generator=gen).float()
    group = torch.arange(n) % groups  # its completions lie far apart
    scored = torch.rand(n, generator=gen) < 0.8
    pieces = list(token.split(lengths.tolist()))
    whole = ops.prime_advantage(
        token, outcome, group, cu_seqlens=cu, form=form, scored=scored, impl="native"
    ).split(lengths.tolist())
    for g in range(groups):
        rows = [b for b in range(n) if b % groups == g]
        own = torch.cat([torch.zeros(1, dtype=torch.long), lengths[rows].cumsum(0)])
        alone = ops.prime_advantage(
            torch.cat([pieces[b] for b in rows]), outcome[rows], group[rows], cu_seqlens=own,
            form=form, scored=scored[rows], impl="native",
        )  # fmt: skip
        assert torch.equal(alone, torch.cat([whole[b] for b in rows]))


def test_groups_of_one_and_equal_rewards_are_worth_nothing():
    step = torch.tensor([0, 0, 1, -1, 2, 2])
    cu, step_cu = torch.tensor([0, 4, 6]), torch.tensor([0, 2, 3])
    one, equal = torch.tensor([0, 1]), torch.full((3,), 0.7)
    for group, reward in ((one, torch.tensor([0.1, 0.1, 0.9])), (one * 0, equal)):
        credit = StepCredit(torch.tensor([0.3, 0.3]), group, reward, step, step_cu)
        got = credit_advantage(credit, cu_seqlens=cu)
        assert got[reward.eq(0.7).all() | torch.zeros(6, dtype=torch.bool)].eq(0).all()
    alone = StepCredit(torch.ones(1), torch.zeros(1, dtype=torch.long), torch.ones(0),
                       torch.full((3,), -1), torch.tensor([0, 0]))  # fmt: skip
    assert credit_advantage(alone).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    "change, text",
    [
        (
            {"step": torch.tensor([0, 1, 0, 2])},
            "one run of neighbouring tokens each, got 0 again at 2",
        ),
        ({"step": torch.tensor([0, 2, 2, 1])}, r"\[0, 2\), the steps of completion 0, got 2 at 1"),
        ({"step": torch.tensor([0, 3, 1, 2])}, r"\[0, 2\), the steps of completion 0, got 3 at 1"),
        ({"step": torch.tensor([0, -7, 1, 2])}, r"completion 0, got -7 at 1"),
        ({"step": torch.tensor([0, 1, 2])}, r"step must be \(N,\) = \(4,\), got \(3,\)"),
        ({"step_cu": torch.tensor([0, 3, 2])}, r"step_cu must run from 0 to S = 3, got 0 to 2"),
        ({"step_cu": torch.tensor([0, 4, 3])}, "step_cu must not fall, got 4 then 3 at 1"),
        ({"step_cu": torch.tensor([0, 3])}, r"step_cu must be \(B\+1,\) = \(3,\), got \(2,\)"),
        ({"step_reward": torch.tensor([0.1, math.nan, 1])}, "step_reward must be finite"),
        ({"outcome": torch.tensor([math.inf, 0.0])}, "outcome must be finite"),
        ({"kind": "ppo"}, "kind must be one of grpo, dr_grpo, rloo, got 'ppo'"),
        ({"pay": "both"}, "pay must be one of return, step"),
        ({"baseline": "all"}, "baseline must be one of group, position"),
        ({"gamma": 1.5}, r"gamma must lie in \[0, 1\], got 1.5"),
        ({"process_weight": math.nan}, "process_weight must be a finite number, got nan"),
    ],
)
def test_bad_input_is_named_on_every_implementation(change, text):
    good = {
        "outcome": torch.tensor([1.0, 0.0]), "group": torch.zeros(2, dtype=torch.long),
        "step_reward": torch.tensor([0.5, 0.1, 1.0]), "step": torch.tensor([0, 1, -1, 2]),
        "step_cu": torch.tensor([0, 2, 3]),
    }  # fmt: skip
    logp, cu = torch.zeros(4), torch.tensor([0, 3, 4])
    for impl in ("native", "reference", "auto"):
        with pytest.raises(ValueError, match=text):
            policy_loss(
                logp, None, StepCredit(**good | change), LossSpec.named("dapo"), cu_seqlens=cu,
                impl=impl,
            )  # fmt: skip


def test_triton_says_what_to_do():
    credit = TokenCredit(torch.zeros(3), torch.ones(1), torch.zeros(1, dtype=torch.long))
    with pytest.raises(KernelUnavailable, match=r"credit_advantage\(credit\) makes a tensor of it"):
        policy_loss(torch.zeros(3), None, credit, LossSpec.named("dapo"), impl="triton")
