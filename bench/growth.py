"""How time grows with the number of tokens, and memory with the rows of a head; a plot of both."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.cases_reward import gen
from bench.cases_token import SPEC, tokens
from bench.race import race
from reasonrl import StepCredit, ops, policy_loss

LENGTH = 1024
GOAL = (0.95, 1.05)


def measure(small: bool, seed: int = 0) -> dict[str, Any]:
    """Seconds of each op at 2^13 .. 2^17 tokens, interleaved, and the log-log slopes."""
    sizes = [2**k for k in ((9, 10, 11) if small else (13, 14, 15, 16, 17))]
    found: dict[str, Any] = {"sizes": sizes, "seconds": {}, "slope": {}, "goal": GOAL}
    for name, side in OPS.items():
        inputs = {n: drawn(n) for n in sizes}
        sides = {str(n): (lambda _, x=inputs[n], side=side: side(x)) for n in sizes}
        times = race(sides, {}, 5 if small else 15, seed)
        medians = [sorted(times[str(n)])[len(times[str(n)]) // 2] for n in sizes]
        found["seconds"][name] = medians
        found["slope"][name] = slope(sizes, medians)
    return found


def drawn(n: int) -> dict[str, Any]:
    rows, width = max(1, n // LENGTH), 16
    x: dict[str, Any] = dict(tokens(n))
    x["cu"] = torch.arange(rows + 1) * (n // rows)
    x["step"] = torch.arange(n) // width
    x["credit"] = StepCredit(
        torch.rand(rows, generator=gen(1)),
        torch.arange(rows) // 8,
        torch.rand(n // width, generator=gen(2)),
        x["step"],
        x["cu"] // width,
    )
    return x


def loss(x: dict[str, Any], advantage: Any):
    leaf = x["logp"].detach().requires_grad_()
    out = policy_loss(
        leaf, x["old"], advantage, SPEC, cu_seqlens=x["cu"], ref_logp=x["ref"], impl="native"
    )
    return [out.loss, *torch.autograd.grad(out.loss, leaf)]


OPS = {
    "policy_loss": lambda x: loss(x, x["advantage"]),
    "fused core": lambda x: loss(x, x["credit"]),
    "returns": lambda x: [ops.returns(x["advantage"], cu_seqlens=x["cu"], impl="native")],
    "step_reduce": lambda x: [
        ops.step_reduce(x["advantage"], x["step"], len(x["step"]) // 16, impl="native")
    ],
}


def slope(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    """Least squares through (log N, log t)."""
    x, y = [math.log(n) for n in sizes], [math.log(s) for s in seconds]
    middle = sum(x) / len(x), sum(y) / len(y)
    top = sum((a - middle[0]) * (b - middle[1]) for a, b in zip(x, y, strict=True))
    return top / sum((a - middle[0]) ** 2 for a in x)


def plot(growth: Mapping[str, Any], memory: Mapping[str, Any], path: Path) -> None:
    """Cost against N on the left, extra memory of linear_logp against N on the right."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, seconds in growth["seconds"].items():
        label = f"{name} (slope {growth['slope'][name]:.2f})"
        axes[0].loglog(growth["sizes"], [1e3 * s for s in seconds], "o-", label=label)
    axes[0].set(xlabel="tokens", ylabel="ms, forward and backward", title="time")
    axes[0].legend(fontsize=7)
    for name, mib in memory["mib"].items():
        axes[1].plot(memory["sizes"], mib, "o-", label=name)
    axes[1].set(xlabel="tokens", ylabel="MiB beside inputs", title="extra memory, log p of a head")
    axes[1].set_ylim(bottom=0)
    axes[1].legend(fontsize=7)
    for ax in axes:
        ax.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
    plt.close(figure)
