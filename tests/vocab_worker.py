"""One rank of test_vocab_parallel.py: the cases, and the script that runs them under gloo.

python vocab_worker.py RANK OUT
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import Tensor

from reasonrl import vocab_parallel_linear_logp

RANKS, N, D, V = 4, 37, 16, 211
CUTS = (0, 40, 41, 160, 211)  # uneven parts, one of a single word
CASES = [
    {"dtype": "fp32", "entropy": True},
    {"dtype": "fp32", "entropy": False, "temperature": 0.7},
    {"dtype": "fp32", "entropy": True, "bias": True, "softcap": 5.0, "temperature": 1.3},
    {"dtype": "fp32", "entropy": True, "impl": "reference", "bias": True, "softcap": 5.0},
    {"dtype": "fp64", "entropy": True, "bias": True, "softcap": 5.0, "temperature": 1.3},
    {"dtype": "fp32", "entropy": True, "shift": 60.0},
    {"dtype": "bf16", "entropy": True, "bias": True},
]
TYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}


def made(case: dict) -> list[Tensor | None]:
    g = torch.Generator().manual_seed(7)
    kind = TYPES[case["dtype"]]
    hidden = torch.randn(N, D, generator=g)
    hidden[:, 0] = 1.0
    weight = torch.randn(V, D, generator=g)
    weight[:, 0] += case.get("shift", 0.0)
    bias = torch.randn(V, generator=g).to(kind) if case.get("bias") else None
    return [hidden.to(kind), weight.to(kind), bias]


def target() -> Tensor:
    ids = torch.arange(N) * 17 % V
    ids[:6] = torch.tensor([0, 39, 40, 41, 159, 210])  # every edge of a part
    return ids


def ups(case: dict) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(9)
    kind = torch.float64 if case["dtype"] == "fp64" else torch.float32
    a, b = torch.randn(2, N, generator=g, dtype=kind)
    a[3], b[3] = 0.0, 0.0  # a row without a gradient
    return a, b


def loss(out, case: dict) -> Tensor:
    a, b = ups(case)
    return (a * out[0]).sum() + (b * out[1]).sum() if case["entropy"] else (a * out).sum()


def options(case: dict) -> dict:
    return {k: case[k] for k in ("temperature", "softcap", "entropy", "impl") if k in case}


def part(rank: int, out: str) -> None:
    torch.set_num_threads(1)
    address = f"file://{out}/meeting"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    calls: list[str] = []
    for name in ("all_gather", "all_reduce"):
        inner = getattr(dist, name)

        def counted(*args, inner=inner, name=name, **known):
            calls.append(name)
            return inner(*args, **known)

        setattr(dist, name, counted)
    found = []
    for case in CASES:
        hidden, weight, bias = made(case)
        assert hidden is not None and weight is not None
        mine = slice(CUTS[rank], CUTS[rank + 1])
        leaves = [hidden, weight[mine].clone(), None if bias is None else bias[mine].clone()]
        used = [x.requires_grad_() for x in leaves if x is not None]
        calls.clear()
        value = vocab_parallel_linear_logp(
            leaves[0], leaves[1], target(), first=CUTS[rank], bias=leaves[2], **options(case)
        )
        grads = torch.autograd.grad(loss(value, case), used)
        found.append({"value": value, "grads": grads, "calls": list(calls)})
    wrong = target().clone()
    wrong[5] = V
    try:
        hidden, weight, _ = made(CASES[0])
        vocab_parallel_linear_logp(hidden, weight[mine], wrong, first=CUTS[rank])
    except ValueError as error:
        found.append(str(error))
    torch.save(found, f"{out}/{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    part(int(sys.argv[1]), sys.argv[2])
