"""Ops on rewards: returns, step rewards, PRIME's advantages."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from bench.race import Case, Goal, Side, against, impl_of, over_floor
from reasonrl import ops
from reasonrl.credit import Packed
from reasonrl.kernels import native, native_credit

GIVEN = ("reward", "outcome", "group")
GROUP = 4  # completions of a prompt, as PRIME samples them


def cases(small: bool) -> list[Case]:
    batch, length = (4, 128) if small else (64, 16_384)
    many = 1 << (14 if small else 25)
    return [
        returns_case(batch, length),
        returns_kernel(many),
        steps_case(batch, length),
        steps_kernel(many),
        prime_case(batch, length),
        prime_kernel(many),
        trust_case(64 if small else 4096),
    ]


def goals() -> list[Goal]:
    return [
        Goal("times as fast as the Python loop", against("python loop"), ">=", 150.0),
        Goal("times as fast as torch", against("torch vectorised"), ">=", 3.0),
    ]


def returns_case(batch: int, length: int) -> Case:
    def make() -> dict[str, Any]:
        reward = torch.randn(batch, length, generator=gen(6))
        return {"reward": reward, "mask": torch.rand(batch, length, generator=gen(7)) > 0.1}

    def ours(x: dict[str, Any]) -> list[Tensor]:
        return [ops.returns(x["reward"], mask=x["mask"], gamma=0.99, impl=impl_of(x["reward"]))]

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
        goals=goals(),
    )


def returns_kernel(n: int) -> Case:
    rows = 1 << 10

    def make() -> dict[str, Any]:
        reward, out = torch.randn(n, generator=gen(8)), torch.empty(n)
        cu = torch.arange(rows + 1) * (n // rows)
        return {"reward": reward, "c": out, "cu": cu} | block(n, 2)

    def ours(x: dict[str, Any]) -> list[Tensor]:
        if x["reward"].device.type != "cpu":
            return [ops.returns(x["reward"], cu_seqlens=x["cu"])]
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
        found = ops.step_reduce(
            x["value"], x["step"], x["count"], how="mean", impl=impl_of(x["value"])
        )
        return [ops.step_expand(found, x["step"], where="last", impl=impl_of(found))]

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
        goals=goals(),
    )


def steps_kernel(n: int) -> Case:
    width = 16

    def make() -> dict[str, Any]:
        value, step = torch.rand(n, generator=gen(10)), torch.arange(n) // width
        out, index = torch.empty(n // width), torch.empty(n // width, dtype=torch.long)
        return {"value": value, "step": step, "c": out, "index": index} | block(n, 3)

    def ours(x: dict[str, Any]) -> list[Tensor]:
        if x["value"].device.type != "cpu":
            return [ops.step_reduce(x["value"], x["step"], n // width)]
        native.core().step_reduce(
            native.pointer(x["value"]), native.pointer(x["step"]), n, n // width,
            native.HOWS["sum"], native.pointer(x["c"]), native.pointer(x["index"]),
            native.threads(),
        )  # fmt: skip
        return [x["c"]]

    def stock(x: dict[str, Any]) -> list[Tensor]:
        return [torch.zeros(n // width).index_add_(0, x["step"], x["value"])]

    return kernel_case("step_reduce", n, make, ours, stock, 0, "torch index_add")


def trust_case(batch: int) -> Case:
    """SophiaVL-R1's reward and its advantage (arXiv 2505.17018, eq. 1-5) in groups of 8."""

    def make() -> dict[str, Any]:
        return {
            "outcome": torch.randint(0, 2, (batch,), generator=gen(16)).float(),
            "thinking": torch.rand(batch, generator=gen(17)),
            "group": torch.arange(batch) // 8,
        }

    def ours(x: dict[str, Any], impl: str = "", kind: torch.dtype = torch.float32) -> list[Tensor]:
        outcome, thinking = x["outcome"].to(kind), x["thinking"].to(kind)
        out = ops.trust_advantage(
            outcome, thinking, x["group"], 10, 100, impl=impl or impl_of(outcome)
        )
        return [out.reward, out.advantage]

    def loop(x: dict[str, Any]) -> list[Tensor]:
        """The trainers' way: group by group, a few tensor ops each."""
        reward, advantage = torch.empty(batch), torch.empty(batch)
        weight = 0.3 * math.exp(-0.1)
        for g in range(int(x["group"].max()) + 1):
            rows = (x["group"] == g).nonzero()[:, 0]
            outcome, thinking = x["outcome"][rows], x["thinking"][rows]
            right = outcome >= 0.5
            if bool(right.all()) or not bool(right.any()):
                reward[rows] = outcome
            else:
                gap = thinking[right].mean() - thinking[~right].mean()
                reward[rows] = outcome + gap.clamp(max=0).exp() * weight * thinking
            spread = reward[rows].std()
            centred = reward[rows] - reward[rows].mean()
            advantage[rows] = centred / (spread + 1e-6) if spread > 0 else 0.0
        return [reward, advantage]

    return Case(
        "trust_advantage",
        f"trust_advantage, {batch:,} completions in groups of 8",
        make,
        {"ours": ours, "torch": lambda x: ours(x, "reference"), "python loop": loop},
        truth=lambda x: ours(x, "reference", torch.float64),
    )


def prime_case(batch: int, length: int) -> Case:
    """RLOO of the outcomes and of the returns of token rewards (arXiv 2502.01456, eq. 5)."""

    def make() -> dict[str, Any]:
        size = torch.randint(length // 2, length + 1, (batch, 1), generator=gen(13))
        return {
            "reward": torch.randn(batch, length, generator=gen(14)),
            "mask": torch.arange(length) < size,
            "outcome": torch.randint(0, 2, (batch,), generator=gen(15)).float(),
            "group": torch.arange(batch) // GROUP,
        }

    def ours(x: dict[str, Any], kind: torch.dtype = torch.float32) -> list[Tensor]:
        reward, outcome = x["reward"].to(kind), x["outcome"].to(kind)
        known = {"mask": x["mask"], "impl": impl_of(reward)}
        return [ops.prime_advantage(reward, outcome, x["group"], **known)]

    def loop(x: dict[str, Any]) -> list[Tensor]:
        """The trainers' way: baselines row by row, returns by a Python loop over time."""
        reward = torch.where(x["mask"], x["reward"], 0.0)
        counts = x["mask"].sum(1)
        means, outcome = reward.sum(1) / counts, x["outcome"]
        whole = torch.zeros(batch)
        for i in range(batch):
            others = [j for j in range(batch) if x["group"][j] == x["group"][i] and j != i]
            if others:
                reward[i] -= torch.stack([means[j] for j in others]).mean()
                whole[i] = outcome[i] - torch.stack([outcome[j] for j in others]).mean()
            else:
                reward[i] = 0.0
        reward = torch.where(x["mask"], reward, 0.0)
        running, out = torch.zeros(batch), []
        for t in reversed(range(length)):
            running = reward[:, t] + running
            out.append(running)
        return [torch.where(x["mask"], torch.stack(out[::-1], 1) + whole[:, None], 0.0)]

    def vectorised(x: dict[str, Any]) -> list[Tensor]:
        reward, mask = torch.where(x["mask"], x["reward"], 0.0), x["mask"]
        means = (reward.sum(1) / mask.sum(1)).view(-1, GROUP)
        outcome = x["outcome"].view(-1, GROUP)
        base, whole = (
            ((v.sum(1, keepdim=True) - v) / (GROUP - 1)).view(-1, 1) for v in (means, outcome)
        )
        centred = torch.where(mask, reward - base, 0.0)
        back = centred.flip(1).cumsum(1).flip(1)
        return [torch.where(mask, back + x["outcome"][:, None] - whole, 0.0)]

    return Case(
        key="prime_advantage",
        title=f"prime_advantage, rloo, masked, {batch} x {length}",
        make=make,
        sides={"ours": ours, "python loop": loop, "torch vectorised": vectorised},
        truth=lambda x: ours(x, torch.float64),
        stock="torch vectorised",
        goals=goals(),
    )


def prime_kernel(n: int) -> Case:
    rows = 1 << 10

    def make() -> dict[str, Any]:
        x = {
            "reward": torch.randn(n, generator=gen(16)),
            "outcome": torch.randint(0, 2, (rows,), generator=gen(17)).float(),
            "group": torch.arange(rows) // GROUP,
            "cu": torch.arange(rows + 1) * (n // rows),
            "c": torch.empty(n),
        }
        given = Packed(
            x["outcome"], x["group"], None, 1.0, 1, 1.0, 1.0, "rloo", token_reward=x["reward"]
        )
        return x | {"task": native_credit.given(given, x["cu"], None)} | block(n, 2)

    def ours(x: dict[str, Any]) -> list[Tensor]:
        if x["reward"].device.type != "cpu":
            return [ops.prime_advantage(*(x[k] for k in GIVEN), cu_seqlens=x["cu"])]
        native.core().credit_advantage(x["task"], native.pointer(x["c"]), native.threads())
        return [x["c"]]

    def stock(x: dict[str, Any]) -> list[Tensor]:
        reward, outcome = x["reward"].view(rows, -1), x["outcome"].view(-1, GROUP)
        means = reward.mean(1).view(-1, GROUP)
        base, whole = (
            ((v.sum(1, keepdim=True) - v) / (GROUP - 1)).view(-1, 1) for v in (means, outcome)
        )
        back = (reward - base).flip(1).cumsum(1).flip(1)
        return [(back + x["outcome"][:, None] - whole).reshape(-1)]

    return kernel_case("prime_advantage", n, make, ours, stock, 0, "torch vectorised")


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
