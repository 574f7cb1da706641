"""How time grows with tokens, vocabulary and group size, memory with the rows of a head; a plot.

Every point is the median of interleaved rounds. `call` is the time of the smallest input, one
completion: what Python and the checks cost whatever the size. Slopes are log-log by least squares,
of the time as it is and, `net`, of what exceeds the call.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cases_reward import gen
from bench.cases_token import SPEC, tokens
from bench.race import impl_of, placed, race
from reasonrl import LossSpec, StepCredit, linear_policy_loss, logp, ops, policy_loss

LENGTH, WIDTH, DENSE = 1024, 16, 64  # tokens of a completion, of a step; D
GOAL = (0.95, 1.05)
Made = Callable[[int, str], Callable[[], Any]]  # size, device -> the call to time


def measure(small: bool, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """For each axis its sizes, and each op's seconds, seconds of a call, and slopes."""
    return {name: along(axis, small, seed, device) for name, axis in axes(small).items()}


def axes(small: bool) -> dict[str, tuple[list[int], int, dict[str, Made]]]:
    """Sizes, the size that counts as none, ops."""
    powers = [2**k for k in ((9, 10, 11) if small else (13, 14, 15, 16, 17))]
    groups = [2, 4, 8] if small else [2, 4, 8, 16, 32, 64]
    rows = groups[-1]
    return {
        "tokens": (powers, 16, TOKENS),
        "vocabulary": (powers, 16, VOCABULARY),
        "group size": (groups, 0, {name: made(rows) for name, made in GROUPS.items()}),
    }


def along(
    axis: tuple[list[int], int, dict[str, Made]], small: bool, seed: int, device: str
) -> dict[str, Any]:
    sizes, least, ops_of = axis
    found: dict[str, Any] = {"sizes": sizes, "ops": {}}
    for name, made in ops_of.items():
        calls = {n: made(n, device) for n in ([least] if least else []) + sizes}
        sides = {str(n): (lambda _, call=call: call()) for n, call in calls.items()}
        times = race(sides, {"at": torch.empty(0, device=device)}, 5 if small else 15, seed)
        medians = {n: statistics.median(times[str(n)]) for n in calls}
        seconds = [medians[n] for n in sizes]
        row: dict[str, Any] = {"seconds": seconds, "slope": slope(sizes, seconds)}
        if least:
            row["call"] = medians[least]
            row["net"] = slope(sizes, [max(s - medians[least], 1e-9) for s in seconds])
        found["ops"][name] = row
    return found


def drawn(n: int, device: str, group: int = 8) -> dict[str, Any]:
    rows = max(1, n // LENGTH)
    x: dict[str, Any] = dict(tokens(n))
    x["cu"] = torch.arange(rows + 1) * (n // rows)
    x["step"] = torch.arange(n) // WIDTH
    x["outcome"], x["group"] = torch.rand(rows, generator=gen(1)), torch.arange(rows) // group
    worth = torch.rand(n // WIDTH, generator=gen(2))
    x["credit"] = StepCredit(x["outcome"], x["group"], worth, x["step"], x["cu"] // WIDTH)
    return placed(x, device)


def loss(x: dict[str, Any], key: str) -> Callable[[], Any]:
    def call():
        leaf = x["logp"].detach().requires_grad_()
        known = {"cu_seqlens": x["cu"], "ref_logp": x["ref"], "impl": impl_of(leaf)}
        out = policy_loss(leaf, x["old"], x[key], SPEC, **known)
        return torch.autograd.grad(out.loss, leaf)

    return call


def returns(x: dict[str, Any]) -> Callable[[], Any]:
    return lambda: ops.returns(x["advantage"], cu_seqlens=x["cu"], impl=impl_of(x["advantage"]))


def steps(x: dict[str, Any]) -> Callable[[], Any]:
    count = len(x["step"]) // WIDTH
    return lambda: ops.step_reduce(x["advantage"], x["step"], count, impl=impl_of(x["advantage"]))


def prime(x: dict[str, Any]) -> Callable[[], Any]:
    given = (x["advantage"], x["outcome"], x["group"])
    return lambda: ops.prime_advantage(*given, cu_seqlens=x["cu"], impl=impl_of(x["advantage"]))


def head(n: int, vocabulary: int, device: str) -> Callable[[], Any]:
    """linear_policy_loss of n rows, on logits of D = 64."""
    hidden = torch.randn(n, DENSE, generator=gen(3)).to(device).requires_grad_()
    weight = 0.1 * torch.randn(vocabulary, DENSE, generator=gen(4))
    weight = weight.to(device).requires_grad_()
    target = torch.randint(0, vocabulary, (n,), generator=gen(5)).to(device)
    advantage = torch.randn(n, generator=gen(6)).to(device)
    given = (hidden, weight, target, None, advantage, LossSpec.named("dapo"))

    def call():
        loss = linear_policy_loss(*given, impl=impl_of(hidden)).loss
        return torch.autograd.grad(loss, (hidden, weight))

    return call


def logits(vocabulary: int, device: str) -> Callable[[], Any]:
    u = torch.randn(128, vocabulary, generator=gen(7)).to(device)
    target = torch.randint(0, vocabulary, (128,), generator=gen(8)).to(device)
    return lambda: logp(u, target, entropy=True, impl=impl_of(u))


TOKENS: dict[str, Made] = {
    "policy_loss": lambda n, at: loss(drawn(n, at), "advantage"),
    "fused core": lambda n, at: loss(drawn(n, at), "credit"),
    "returns": lambda n, at: returns(drawn(n, at)),
    "step_reduce": lambda n, at: steps(drawn(n, at)),
    "prime_advantage": lambda n, at: prime(drawn(n, at)),
    "linear_policy_loss, V 2,000": lambda n, at: head(n, 2000, at),
}
VOCABULARY: dict[str, Made] = {
    "logp + entropy, 128 rows": logits,
    "linear_policy_loss, 256 rows": lambda v, at: head(256, v, at),
}
GROUPS: dict[str, Callable[[int], Made]] = {
    "fused core": lambda rows: lambda g, at: loss(drawn(rows * LENGTH, at, g), "credit"),
    "prime_advantage": lambda rows: lambda g, at: prime(drawn(rows * LENGTH, at, g)),
}


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Least squares through (log N, log t)."""
    x, y = [math.log(n) for n in sizes], [math.log(s) for s in seconds]
    middle = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - middle[0]) * (b - middle[1]) for a, b in zip(x, y, strict=True))
    return top / sum((a - middle[0]) ** 2 for a in x)


def text(growth: Mapping[str, Any], memory: Mapping[str, Any]) -> str:
    lines = []
    for axis, found in growth.items():
        lines.append(f"\ntime against {axis}, {found['sizes'][0]} to {found['sizes'][-1]}")
        for name, row in found["ops"].items():
            ms = " ".join(f"{1e3 * s:.3g}" for s in row["seconds"])
            line = f"  {name:30} {ms} ms, slope {row['slope']:.3f}"
            if "net" in row:
                if axis == "tokens":
                    verdict = "met" if GOAL[0] <= row["slope"] <= GOAL[1] else "MISSED"
                    line += f" (goal {GOAL[0]} to {GOAL[1]}: {verdict})"
                line += f", {row['net']:.3f} beyond the call's {1e3 * row['call']:.3g} ms"
            lines.append(line)
    for name, mib in memory.get("mib", {}).items():
        pairs = ", ".join(f"{n}: {m}" for n, m in zip(memory["sizes"], mib, strict=True))
        lines.append(f"  extra memory, MiB, {name}: {pairs}")
    return "\n".join(lines)


def plot(growth: Mapping[str, Any], memory: Mapping[str, Any], path: Path) -> None:
    """Cost against each axis, and extra memory of linear_logp against its rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(2, 2, figsize=(9, 7), layout="constrained")
    panels = panels.reshape(-1)
    for ax, (axis, found) in zip(panels, growth.items(), strict=False):
        for name, row in found["ops"].items():
            label = f"{name} (slope {row['slope']:.2f})"
            ax.loglog(found["sizes"], [1e3 * s for s in row["seconds"]], "o-", label=label)
        ax.set(xlabel=axis, ylabel="ms", title=f"time against {axis}")
        ax.set_xticks(found["sizes"], [f"{n:,}" for n in found["sizes"]])
        ax.minorticks_off()
    for name, mib in memory["mib"].items():
        panels[3].plot(memory["sizes"], mib, "o-", label=name)
    panels[3].set(xlabel="rows", ylabel="MiB beside inputs", title="extra memory, log p of a head")
    panels[3].set_ylim(bottom=0)
    for ax in panels:
        ax.legend(fontsize=7)
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
