"""Ops on tokens: the policy loss, returns, steps, PRIME's advantages, the fused core."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.race import Case, Goal, Side, against, over_floor
from reasonrl import LossSpec, StepCredit, ops, policy_loss
from reasonrl.kernels import native

SPEC = LossSpec.named("dapo", kl_coef=0.04)


def cases(small: bool) -> list[Case]:
    batch, long, longest = (4, 64, 128) if small else (64, 4096, 16_384)
    many = 1 << (14 if small else 25)
    return [
        loss_case(batch, long),
        loss_kernel(many),
        returns_case(batch, longest),
        returns_kernel(many),
        steps_case(batch, longest),
        steps_kernel(many),
        core_case(batch, long),
    ]


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
        impl = "native" if kind == torch.float32 else "reference"
        mask = x["mask"].bool()
        out = policy_loss(
            leaf, v["old"], v["advantage"], SPEC, mask=mask, ref_logp=v["ref"], impl=impl
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
        x["sums"].zero_()
        out = (native.pointer(x["c"]), 0, native.pointer(x["sums"]), native.threads())
        native.core().policy_loss(x["numbers"], x["task"], *out)
        return [x["sums"][:1].float(), x["c"]]

    def stock(x: dict[str, Any]) -> list[Tensor]:
        leaf = x["logp"].detach().requires_grad_()
        loss = eager_loss(leaf, x["old"], x["ref"], x["advantage"], torch.ones(()).expand(n))
        return [loss[None], *torch.autograd.grad(loss, leaf)]

    return kernel_case("policy_loss", n, make, ours, stock, 1, "TRL's arithmetic")


def returns_case(batch: int, length: int) -> Case:
    def make() -> dict[str, Any]:
        reward = torch.randn(batch, length, generator=gen(6))
        return {"reward": reward, "mask": torch.rand(batch, length, generator=gen(7)) > 0.1}

    def ours(x: dict[str, Any]) -> list[Tensor]:
        return [ops.returns(x["reward"], mask=x["mask"], gamma=0.99, impl="native")]

    def loop(x: dict[str, Any]) -> list[Tensor]:
        """The trainers' way: a Python loop over time, a few tensor ops each."""
        running, out, mask = torch.zeros(batch), [], x["mask"].float()
        for t in reversed(range(length)):
            fresh = x["reward"][:, t] + 0.99 * running
            running = torch.where(mask[:, t] > 0, fresh, running)
            out.append(running * mask[:, t])
        return [torch.stack(out[::-1], 1)]

    def vectorised(x: dict[str, Any]) -> list[Tensor]:
        """Doubling: log2(T) whole-tensor passes; masked tokens are moved to the end first."""
        order = torch.argsort(~x["mask"], dim=1, stable=True)
        total = torch.where(x["mask"], x["reward"], 0.0).gather(1, order)
        shift = 1
        while shift < length:
            total[:, :-shift] = total[:, :-shift] + 0.99**shift * total[:, shift:]
            shift *= 2
        back = torch.empty_like(total).scatter_(1, order, total)
        return [torch.where(x["mask"], back, 0.0)]

    return Case(
        key="returns",
        title=f"returns, gamma 0.99, masked, {batch} x {length}",
        make=make,
        sides={"ours": ours, "python loop": loop, "torch vectorised": vectorised},
        truth=lambda x: [ops.returns(x["reward"].double(), mask=x["mask"], gamma=0.99)],
        stock="torch vectorised",
        goals=[
            Goal("times as fast as the Python loop", against("python loop"), ">=", 150.0),
            Goal("times as fast as torch", against("torch vectorised"), ">=", 3.0),
        ],
    )


def returns_kernel(n: int) -> Case:
    rows = 1 << 10

    def make() -> dict[str, Any]:
        reward, out = torch.randn(n, generator=gen(8)), torch.empty(n)
        cu = torch.arange(rows + 1) * (n // rows)
        return {"reward": reward, "c": out, "cu": cu} | block(n, 2)

    def ours(x: dict[str, Any]) -> list[Tensor]:
        native.core().returns(
            native.pointer(x["reward"]), native.pointer(x["cu"]), 0, rows, 1.0, False,
            native.pointer(x["c"]), native.threads(),
        )  # fmt: skip
        return [x["c"]]

    def stock(x: dict[str, Any]) -> list[Tensor]:
        return [x["reward"].view(rows, -1).flip(1).cumsum(1).flip(1).reshape(-1)]

    return kernel_case("returns", n, make, ours, stock, 0, "torch flip, cumsum, flip")


def steps_case(batch: int, length: int) -> Case:
    """Step rewards from token values and back: the mean of each step, given to its last token."""
    width = 16

    def make() -> dict[str, Any]:
        n = batch * length
        value = torch.rand(n, generator=gen(9))
        return {"value": value, "step": torch.arange(n) // width, "count": n // width}

    def ours(x: dict[str, Any]) -> list[Tensor]:
        found = ops.step_reduce(x["value"], x["step"], x["count"], how="mean", impl="native")
        return [ops.step_expand(found, x["step"], where="last", impl="native")]

    def loop(x: dict[str, Any]) -> list[Tensor]:
        """Per step, as reward managers do it: slice, mean, assign."""
        out = torch.zeros_like(x["value"])
        for start in range(0, len(out), width):
            out[start + width - 1] = x["value"][start : start + width].mean()
        return [out]

    def vectorised(x: dict[str, Any]) -> list[Tensor]:
        total = torch.zeros(x["count"]).index_add_(0, x["step"], x["value"])
        size = torch.bincount(x["step"], minlength=x["count"])
        last = torch.zeros(x["count"], dtype=torch.long).scatter_reduce_(
            0, x["step"], torch.arange(len(x["step"])), "amax"
        )
        return [torch.zeros_like(x["value"]).index_copy_(0, last, total / size)]

    return Case(
        key="step_reduce",
        title=f"step_reduce (mean) and step_expand (last), {batch} x {length}, steps of {width}",
        make=make,
        sides={"ours": ours, "python loop": loop, "torch vectorised": vectorised},
        stock="torch vectorised",
        goals=[
            Goal("times as fast as the Python loop", against("python loop"), ">=", 150.0),
            Goal("times as fast as torch", against("torch vectorised"), ">=", 3.0),
        ],
    )


def steps_kernel(n: int) -> Case:
    width = 16

    def make() -> dict[str, Any]:
        value, step = torch.rand(n, generator=gen(10)), torch.arange(n) // width
        out, index = torch.empty(n // width), torch.empty(n // width, dtype=torch.long)
        return {"value": value, "step": step, "c": out, "index": index} | block(n, 3)

    def ours(x: dict[str, Any]) -> list[Tensor]:
        native.core().step_reduce(
            native.pointer(x["value"]), native.pointer(x["step"]), n, n // width,
            native.HOWS["sum"], native.pointer(x["c"]), native.pointer(x["index"]),
            native.threads(),
        )  # fmt: skip
        return [x["c"]]

    def stock(x: dict[str, Any]) -> list[Tensor]:
        return [torch.zeros(n // width).index_add_(0, x["step"], x["value"])]

    return kernel_case("step_reduce", n, make, ours, stock, 0, "torch index_add")


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
            leaf, x["old"], advantage, SPEC, cu_seqlens=x["cu"], ref_logp=x["ref"], impl="native"
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


def kernel_case(
    op: str, n: int, make: Any, ours: Side, stock: Side, gradients: int, rival: str
) -> Case:
    def copy(x: dict[str, Any]) -> list[Tensor]:
        return [x["to"].copy_(x["from"])]

    return Case(
        key=f"{op}/kernel",
        title=f"{op}, the kernel itself at {n} tokens, against a copy of the same bytes",
        make=make,
        sides={"ours": ours, rival: stock},
        stock=rival,
        gradients=gradients,
        tolerance=1e-2,
        floors={"copy": copy},
        goals=[Goal("times a copy of the same bytes", over_floor("copy"), "<=", 1.5)],
        rounds=5,
    )


def block(n: int, words: int) -> dict[str, Tensor]:
    """Two buffers whose copy moves as many bytes as `words` fp32 numbers a token."""
    size = n * words // 2
    return {"from": torch.ones(size), "to": torch.zeros(size)}


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
