"""Ops on tokens: the policy loss, the fused core, and on a CPU attention over slots."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases_reward import block, gen, kernel_case
from bench.race import Case, Goal, against, impl_of
from reasonrl import LossSpec, StepCredit, ops, policy_loss
from reasonrl.attention import attend
from reasonrl.kernels import native
from reasonrl.slots import slot_attention

SPEC = LossSpec.named("dapo", kl_coef=0.04)


def cases(small: bool, device: str = "cpu") -> list[Case]:
    batch, long = (4, 64) if small else (64, 4096)
    both = [loss_case(batch, long), loss_kernel(1 << (14 if small else 25))]
    slots = [slots_case(batch, long // 4, kind) for kind in (torch.float32, torch.bfloat16)]
    return [*both, core_case(batch, long), *(slots if device == "cpu" else [])]


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


def slots_case(rows: int, width: int, kind: torch.dtype) -> Case:
    """One new token for every row, slots half full on average, SmolLM2's heads."""

    def make() -> dict[str, Any]:
        q, k, v = (torch.randn(rows, h, 64, generator=gen(h)) for h in (9, 3, 3))
        keys, values = torch.randn(2, rows, 3, width, 64, generator=gen(6)).to(kind).unbind()
        length = torch.randint(0, width, (rows,), generator=gen(7))
        held = {"keys": keys.clone(), "values": values.clone(), "length": length}
        held["seen"] = torch.zeros(int(length.sum() + rows) * 2 * 3 * 64 * kind.itemsize // 4)
        return {"q": q, "k": k, "v": v.to(kind)} | held

    def ours(x: dict[str, Any]) -> list[Tensor]:
        args = [x[name] for name in "q k v keys values length".split()]
        return [slot_attention(*args, 0.125, impl=impl_of(x["q"]))]

    def truth(x: dict[str, Any]) -> list[Tensor]:
        rounded = x | {"k": x["k"].to(kind)}  # as it stands in the slot
        wide = {n: y.double() if y.is_floating_point() else y for n, y in rounded.items()}
        return ours(wide)

    def stock(x: dict[str, Any]) -> list[Tensor]:
        at = torch.arange(rows)
        for cache, new in ((x["keys"], x["k"]), (x["values"], x["v"])):
            cache[at, :, x["length"]] = new.to(kind)
        sees = (torch.arange(width) <= x["length"][:, None])[:, None, None]
        return [attend(x["q"].to(kind)[:, :, None], x["keys"], x["values"], sees, 0.125)[:, :, 0]]

    name = str(kind).removeprefix("torch.")
    return Case(
        key=f"slots/{name}",
        title=f"attention of one new token over {rows} slots of {width}, half full, {name}",
        make=make,
        sides={"ours": ours, "torch": stock},
        truth=truth,
        tolerance=2e-2,
        floors={"reading as many bytes": lambda x: [x["seen"].sum()]},
        rounds=7,
    )
