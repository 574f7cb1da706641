"""Ops on tokens: the policy loss and the fused core."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases_reward import block, gen, kernel_case
from bench.race import Case, Goal, against, impl_of
from reasonrl import LossSpec, StepCredit, ops, policy_loss
from reasonrl.kernels import native

SPEC = LossSpec.named("dapo", kl_coef=0.04)


def cases(small: bool) -> list[Case]:
    batch, long = (4, 64) if small else (64, 4096)
    return [loss_case(batch, long), loss_kernel(1 << (14 if small else 25)), core_case(batch, long)]


def tokens(n: int, seed: int = 4) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logp = torch.randn(n, generator=g) * 0.5 - 2
    return {
        "logp": logp,
        "old": logp + 0.2 * torch.randn(n, generator=g),
        "ref": logp + 0.2 * torch.randn(n, generator=g),
        "advantage": torch.randn(n, generator=g),
    }


def eager_loss(logp, old, ref, advantage, mask) -> Tensor:
    """What TRL's _compute_loss does for dapo with a KL term, one torch op after another."""
    ratio = torch.exp(logp - old)
    gap = ref - logp
    kl = torch.exp(gap) - gap - 1
    cut = torch.clamp(ratio, 1 - SPEC.clip_low, 1 + SPEC.clip_high)
    per_token = -torch.min(ratio * advantage, cut * advantage) + SPEC.kl_coef * kl
    loss = (per_token * mask).sum() / mask.sum().clamp(min=1.0)
    count = mask.sum().clamp(min=1.0)  # its metrics: KL, clip fractions, ratio
    low = (ratio < 1 - SPEC.clip_low) & (advantage < 0)
    high = (ratio > 1 + SPEC.clip_high) & (advantage > 0)
    for shown in (kl, low, high, low | high, ratio):
        (shown * mask).sum() / count
    return loss


def loss_case(batch: int, length: int) -> Case:
    def make() -> dict[str, Any]:
        x = {k: v.view(batch, length) for k, v in tokens(batch * length).items()}
        size = torch.randint(length // 2, length + 1, (batch, 1), generator=gen(5))
        return x | {"mask": (torch.arange(length) < size).float()}

    def ours(x: dict[str, Any], kind: torch.dtype = torch.float32) -> list[Tensor]:
        v = {k: x[k].to(kind) for k in ("logp", "old", "ref", "advantage")}
        leaf = v["logp"].detach().requires_grad_()
        mask = x["mask"].bool()
        out = policy_loss(
            leaf, v["old"], v["advantage"], SPEC, mask=mask, ref_logp=v["ref"], impl=impl_of(leaf)
        )
        return [out.loss, *torch.autograd.grad(out.loss, leaf)]

    def eager(function):
        def call(x: dict[str, Any]) -> list[Tensor]:
            leaf = x["logp"].detach().requires_grad_()
            loss = function(leaf, x["old"], x["ref"], x["advantage"], x["mask"])
            return [loss, *torch.autograd.grad(loss, leaf)]

        return call

    return Case(
        key="policy_loss/dense",
        title=f"policy_loss, dense advantages, KL, {batch} x {length}, forward + backward",
        make=make,
        sides={
            "ours": ours,
            "trl arithmetic": eager(eager_loss),
            "torch.compile": eager(torch.compile(eager_loss)),
        },
        truth=lambda x: ours(x, torch.float64),
        stock="trl arithmetic",
        gradients=1,
        goals=[Goal("times as fast as TRL's arithmetic", against("trl arithmetic"), ">=", 10.0)],
        memory=("ours", "trl arithmetic"),
    )


def loss_kernel(n: int) -> Case:
    """The kernel itself, outputs given: reads log p, old, ref, advantage and writes a gradient."""

    def make() -> dict[str, Any]:
        x = tokens(n)
        core = native.core()
        cu, counts, c = torch.tensor([0, n]), torch.tensor([n]), torch.empty(n)
        task = core.PolicyInput(
            n, 1, *(native.pointer(x[k]) for k in ("logp", "old", "advantage", "ref")), 0, 0, 0,
            native.pointer(cu), native.pointer(counts), False, float(n), 0.0,
        )  # fmt: skip
        numbers = core.Loss(*native.loss_numbers(SPEC))
        sums = torch.zeros(core.SUM_COUNT, dtype=torch.float64)
        held = {"cu": cu, "counts": counts, "c": c, "task": task, "numbers": numbers, "sums": sums}
        return x | held | block(n, 5)

    def ours(x: dict[str, Any]) -> list[Tensor]:
        if x["logp"].device.type != "cpu":
            leaf = x["logp"].detach().requires_grad_()
            out = policy_loss(leaf, x["old"], x["advantage"], SPEC, ref_logp=x["ref"])
            return [out.loss[None], *torch.autograd.grad(out.loss, leaf)]
        x["sums"].zero_()
        out = (native.pointer(x["c"]), 0, native.pointer(x["sums"]), native.threads())
        native.core().policy_loss(x["numbers"], x["task"], *out)
        return [x["sums"][:1].float(), x["c"]]

    def stock(x: dict[str, Any]) -> list[Tensor]:
        leaf = x["logp"].detach().requires_grad_()
        loss = eager_loss(leaf, x["old"], x["ref"], x["advantage"], torch.ones(()).expand(n))
        return [loss[None], *torch.autograd.grad(loss, leaf)]

    return kernel_case("policy_loss", n, make, ours, stock, 1, "TRL's arithmetic")


def core_case(batch: int, length: int) -> Case:
    """Step rewards and outcomes to loss and gradient: the core, our ops one by one, plain torch."""
    width, group = 16, min(8, batch)

    def make() -> dict[str, Any]:
        n = batch * length
        x: dict[str, Any] = dict(tokens(n))
        steps = n // width
        x["cu"] = torch.arange(batch + 1) * length
        x["credit"] = StepCredit(
            torch.randint(0, 2, (batch,), generator=gen(11)).float(),
            torch.arange(batch) // group,
            torch.rand(steps, generator=gen(12)),
            torch.arange(n) // width,
            torch.arange(batch + 1) * (length // width),
        )
        return x

    def ours(x: dict[str, Any]) -> list[Tensor]:
        return finish(x, x["credit"])

    def apart(x: dict[str, Any]) -> list[Tensor]:
        c = x["credit"]
        whole = ops.group_advantage(c.outcome, c.group)
        worth = ops.group_advantage(c.step_reward, c.group.repeat_interleave(c.step_cu.diff()))
        paid = ops.returns(ops.step_expand(worth, c.step, where="last"), cu_seqlens=x["cu"])
        return finish(x, whole.repeat_interleave(length) + paid)

    def finish(x: dict[str, Any], advantage: Any) -> list[Tensor]:
        leaf = x["logp"].detach().requires_grad_()
        out = policy_loss(
            leaf,
            x["old"],
            advantage,
            SPEC,
            cu_seqlens=x["cu"],
            ref_logp=x["ref"],
            impl=impl_of(leaf),
        )
        return [out.loss, *torch.autograd.grad(out.loss, leaf)]

    def plain(x: dict[str, Any]) -> list[Tensor]:
        c = x["credit"]
        parts = []
        for value in (c.outcome.view(-1, group), c.step_reward.view(batch // group, -1)):
            centred = value - value.mean(1, keepdim=True)
            parts.append((centred / (value.std(1, keepdim=True) + 1e-6)).reshape(-1))
        ends = torch.zeros(batch * length).index_copy_(
            0, torch.arange(width - 1, batch * length, width), parts[1]
        )
        back = ends.view(batch, length).flip(1).cumsum(1).flip(1).reshape(-1)
        advantage = parts[0].repeat_interleave(length) + back
        leaf = x["logp"].detach().requires_grad_()
        mask = torch.ones_like(advantage)
        loss = eager_loss(leaf, x["old"], x["ref"], advantage, mask)
        return [loss, *torch.autograd.grad(loss, leaf)]

    return Case(
        key="core",
        title=f"fused core: step and outcome rewards to loss and gradient, {batch} x {length}",
        make=make,
        sides={"ours": ours, "our ops one by one": apart, "torch": plain},
        stock="our ops one by one",
        gradients=1,
        memory=("ours", "our ops one by one", "torch"),
    )
