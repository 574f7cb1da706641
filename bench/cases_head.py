"""Ops with a vocabulary: log p and entropy of logits, the loss straight from hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench import rivals
from bench.race import Case, Goal, against, best_rival, impl_of, over_floor
from reasonrl import LossSpec, linear_logp, linear_policy_loss, logp, policy_loss

SPEC = LossSpec.named("dapo", clip_high=0.28)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ROWS = 16  # completions of a linear case


def cases(small: bool, dtypes: Sequence[str], device: str = "cpu") -> list[Case]:
    """Sizes that last: on a GPU more rows, or launches would be what is measured."""
    vocabulary, rows = (5003, 16) if small else (151_936, 128 if device == "cpu" else 2048)
    made = []
    for dtype in dtypes:
        for gradient in (False, True):
            made.append(logits_case(dtype, rows, vocabulary, gradient))
    sizes = [(2048, 576, 49_152), (1024, 896, 151_936)]
    if small or device != "cpu":
        sizes = [(64, 32, 2003)] if small else [(4096, 2048, 151_936)]
    for dtype in dtypes:
        for size in sizes:
            made.append(linear_case(dtype, *size))
    made.append(skipping_case(*sizes[0]))
    return made


def logits_case(dtype: str, rows: int, vocabulary: int, gradient: bool) -> Case:
    kind = DTYPES[dtype]

    def make() -> dict[str, Any]:
        g = torch.Generator().manual_seed(1)
        logits = (torch.randn(rows, vocabulary, generator=g) * 3).to(kind)
        target = torch.randint(0, vocabulary, (rows,), generator=g)
        up = torch.randn(2, rows, generator=g)
        return {"logits": logits, "target": target, "up": up, "out": torch.empty_like(logits)}

    def side(values):
        def call(x: dict[str, Any], logits: Tensor | None = None) -> list[Tensor]:
            leaf = (x["logits"] if logits is None else logits).detach().requires_grad_(gradient)
            taken, entropy = values(leaf, x["target"])
            if not gradient:
                return [taken, entropy]
            up = x["up"].to(taken.dtype)
            total = (up[0] * taken + up[1] * entropy).sum()
            return [taken, entropy, *torch.autograd.grad(total, leaf)]

        return call

    def stock(logits: Tensor, target: Tensor):
        log_p = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
        taken = log_p.gather(-1, target[:, None])[:, 0]
        return taken, -(log_p.exp() * log_p).sum(-1)

    sides = {
        "ours": side(lambda u, t: logp(u, t, entropy=True, impl=impl_of(u))),
        "torch": side(stock),
        "torch.compile": side(torch.compile(stock)),
    }
    if found := rivals.trl():
        sides["trl"] = side(
            lambda u, t: (found.selective_log_softmax(u, t), found.entropy_from_logits(u))
        )
    eager = (10.0 if dtype == "bf16" else 6.0) if gradient else (8.0 if dtype == "bf16" else 6.0)
    what = "forward + gradient" if gradient else "forward"
    return Case(
        key=f"logp/{dtype}/{'both' if gradient else 'forward'}",
        title=f"logp + entropy, {dtype}, {rows} x {vocabulary}, {what}",
        make=make,
        sides=sides,
        truth=lambda x: side(stock)(x, x["logits"].double()),
        gradients=int(gradient),
        tolerance=5e-2,
        floors={"copy of the logits": lambda x: [x["out"].copy_(x["logits"])]},
        goals=[
            Goal("times as fast as torch eager", against("torch"), ">=", eager),
            Goal("times as fast as torch.compile", against("torch.compile"), ">=", 2.0),
        ],
        memory=("ours", "torch"),
    )


def drawn(n: int, width: int, vocabulary: int, kind: torch.dtype) -> dict[str, Any]:
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(n, width, generator=g).to(kind)
    weight = (torch.randn(vocabulary, width, generator=g) / width**0.5).to(kind)
    target = torch.randint(0, vocabulary, (n,), generator=g)
    cu = torch.arange(ROWS + 1) * (n // ROWS)
    advantage = torch.randn(ROWS, generator=g)
    with torch.no_grad():
        taken = linear_logp(hidden, weight, target)
    return {
        "hidden": hidden, "weight": weight, "target": target, "cu": cu, "advantage": advantage,
        "old": taken + 0.1 * torch.randn(n, generator=g), "mask": None,
    }  # fmt: skip


def trained(loss):
    """A loss of (hidden, weight) as a side: value, dX, dW."""

    def call(x: dict[str, Any], kind: torch.dtype | None = None) -> list[Tensor]:
        leaves = [x[name].to(kind or x[name].dtype).detach().requires_grad_() for name in HEAD]
        value = loss(*leaves, x)
        return [value, *torch.autograd.grad(value, leaves)]

    return call


HEAD = ("hidden", "weight")


def ours(hidden: Tensor, weight: Tensor, x: dict[str, Any]) -> Tensor:
    known = {"cu_seqlens": x["cu"], "mask": x["mask"]}
    impl = impl_of(hidden)
    old, advantage = (None if v is None else v.to(full(hidden)) for v in (x["old"], x["advantage"]))
    return linear_policy_loss(
        hidden, weight, x["target"], old, advantage, SPEC, impl=impl, **known
    ).loss


def full(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def after(log_p):
    """Somebody's log-probabilities (hidden, weight, target) under the stock loss."""

    def loss(hidden: Tensor, weight: Tensor, x: dict[str, Any]) -> Tensor:
        taken = log_p(hidden, weight, x["target"])
        known = {"cu_seqlens": x["cu"], "mask": x["mask"], "impl": "reference"}
        return policy_loss(taken.float(), x["old"], x["advantage"], SPEC, **known).loss

    return loss


def naive(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    log_p = torch.log_softmax((hidden @ weight.T).float(), -1)
    return log_p.gather(-1, target[:, None])[:, 0]


def linear_sides() -> dict[str, Any]:
    sides = {"ours": trained(ours), "torch": trained(after(naive))}
    if liger := rivals.liger():
        sides["liger"] = trained(lambda h, w, x: liger_loss(liger, h, w, x))
    if verl := rivals.verl_linear():
        fused = verl.FusedLinearForPPO()
        sides["verl"] = trained(after(lambda h, w, t: fused(h[None], w, t[None])[0][0]))
    if cce := rivals.cut_cross_entropy():
        for impl in ("torch_compile", "cce") if torch.cuda.is_available() else ("torch_compile",):
            sides[f"cce {impl}"] = trained(after(cce_logp(cce, impl)))
    return sides


def cce_logp(cce: Any, impl: str):
    return lambda h, w, t: -cce.linear_cross_entropy(h, w, t, reduction="none", impl=impl)


def liger_loss(liger: Any, hidden: Tensor, weight: Tensor, x: dict[str, Any]) -> Tensor:
    fused = liger.LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=hidden.is_cuda, use_ref_model=False, epsilon_low=SPEC.clip_low,
        epsilon_high=SPEC.clip_high, loss_type="bnpo",
    )  # fmt: skip
    length = hidden.shape[0] // ROWS
    padded = hidden.view(ROWS, length, -1)
    ids, old = (v.view(ROWS, length) for v in (x["target"], x["old"]))
    mask = torch.ones(ROWS, length)
    return fused(padded, weight, ids, mask, x["advantage"], old_per_token_logps=old)[0]


def linear_case(dtype: str, n: int, width: int, vocabulary: int) -> Case:
    kind = DTYPES[dtype]

    def products(x: dict[str, Any]) -> list[Tensor]:
        u = torch.mm(x["hidden"], x["weight"].T)
        return [torch.mm(u, x["weight"]), torch.mm(u.T, x["hidden"])]

    goals = [
        Goal("times the three bare products", over_floor("three products"), "<=", 1.15),
        Goal("times as fast as the best rival", best_rival, ">=", 1.0),
    ]
    if dtype == "bf16":
        goals += [Goal(f"times as fast as {r}", against(r), ">=", 2.2) for r in ("liger", "verl")]
    return Case(
        key=f"linear_policy_loss/{dtype}/{n}x{width}x{vocabulary}",
        title=f"linear_policy_loss, {dtype}, N {n}, D {width}, V {vocabulary}, loss and gradients",
        make=lambda: drawn(n, width, vocabulary, kind),
        sides=linear_sides(),
        truth=lambda x: trained(ours)(x, torch.float64),
        gradients=2,
        tolerance=5e-2,
        floors={"three products": products},
        goals=goals,
        rounds=3,
        memory=("ours", "torch", "liger", "verl"),
    )


def skipping_case(n: int, width: int, vocabulary: int) -> Case:
    """60 % of the rows without effect, known before the forward or only after it."""

    def make() -> dict[str, Any]:
        x = drawn(n, width, vocabulary, torch.float32)
        x["advantage"] = x["advantage"].repeat_interleave(n // ROWS)
        dead = torch.rand(n, generator=torch.Generator().manual_seed(3)) < 0.6
        return x | {"dead": dead}

    def variant(change):
        return lambda x, kind=None: trained(ours)(x | change(x), kind)

    def clipped(x: dict[str, Any]) -> dict[str, Any]:
        push = torch.where(x["advantage"] > 0, -1.0, 1.0)  # far outside, on the side that is cut
        return {"old": torch.where(x["dead"], x["old"] + push, x["old"])}

    def idle(x: dict[str, Any]) -> dict[str, Any]:
        return {"old": None, "advantage": x["advantage"].masked_fill(x["dead"], 0.0)}

    sides = {
        "ours": variant(lambda x: {}),
        "masked": variant(lambda x: {"mask": ~x["dead"]}),
        "dead groups, on policy": variant(idle),
        "clipped": variant(clipped),
        "dead groups, old log p given": variant(
            lambda x: {"advantage": x["advantage"].masked_fill(x["dead"], 0.0)}
        ),
    }
    saved = [
        ("masked", "masked rows", 0.45),
        ("dead groups, on policy", "dead groups on policy", 0.45),
        ("clipped", "clipped rows", 0.30),
    ]
    return Case(
        key="linear_policy_loss/skipping",
        title=f"the same, fp32, N {n}, 60 % of the rows without effect (share of time saved)",
        make=make,
        sides=sides,
        truths={name: double(side) for name, side in sides.items()},
        stock="",
        goals=[
            Goal(f"of the time saved, {text}", saving(name), ">=", target)
            for name, text, target in saved
        ],
        rounds=5,
    )


def double(side):
    return lambda x: side(x, torch.float64)


def saving(name: str):
    def value(row):
        ratio = row["sides"].get(name, {}).get("ratio")
        return 1 - ratio if ratio else None

    return value
