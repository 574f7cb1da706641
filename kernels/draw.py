"""A token a row by the inverse transform on a GPU, and its log p.

    y = u / tau,  w = exp(y - max y),  token = the first whose sum of w up to it exceeds
    uniform * sum w,  logp = y[token] - max y - log sum w

In two levels: a block's largest y and its sum above that, every block by a program; then a program
a row, which finds the block that is meant and reads that one again. Nothing of the vocabulary's
size is written. A row that has no distribution (NaN, inf, or -inf alone) gives token 0 with log p
NaN. Legend: B rows, V vocabulary, N blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonrl.kernels.common import available, over

__all__ = ["available", "draw"]

BLOCK = 4096


@triton.jit
def scaled_block(u_ptr, v, vocab, heat, cold, WARM: tl.constexpr):
    y = tl.load(u_ptr + v, mask=v < vocab, other=float("-inf")).to(tl.float32)
    if WARM:
        y = over(y, heat, cold)
    return y


@triton.jit
def block_kernel(
    u_ptr, most_ptr, sum_ptr, vocab, heat, cold, WARM: tl.constexpr, BLOCK: tl.constexpr
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    v = block * BLOCK + tl.arange(0, BLOCK)
    y = scaled_block(u_ptr + row * vocab, v, vocab, heat, cold, WARM)
    most = tl.max(y, 0)
    e = tl.where(y == float("-inf"), 0.0, tl.exp(y - tl.where(most == float("-inf"), 0.0, most)))
    broken = tl.max(tl.where(y < float("inf"), 0, 1), 0)
    at = row * tl.num_programs(1) + block
    tl.store(most_ptr + at, tl.where(broken > 0, float("nan"), most))
    tl.store(sum_ptr + at, tl.sum(e, 0))


@triton.jit
def first(ends, mass, aim, at, none):
    """The first of any mass whose end passes the aim; where rounding aims past them all, the last
    of any mass. A scan's ends may fall by a rounding, and rise where there is no mass."""
    last = tl.max(tl.where(mass > 0, at, 0), 0)
    return tl.minimum(tl.min(tl.where((mass > 0) & (ends > aim), at, none), 0), last)


@triton.jit
def pick_kernel(
    u_ptr, most_ptr, sum_ptr, uniform_ptr, token_ptr, logp_ptr, vocab, blocks, heat, cold,
    WARM: tl.constexpr, MANY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, b, i = tl.program_id(0).to(tl.int64), tl.arange(0, MANY), tl.arange(0, BLOCK)
    most = tl.load(most_ptr + row * blocks + b, mask=b < blocks, other=float("-inf"))
    broken = tl.max(tl.where(most == most, 0, 1), 0) > 0
    top = tl.max(tl.where(most == most, most, float("-inf")), 0)
    broken |= top == float("-inf")
    sums = tl.load(sum_ptr + row * blocks + b, mask=b < blocks, other=0.0)
    factor = tl.where(most == float("-inf"), 0.0, tl.exp(most - top))
    mass = tl.where(broken, 0.0, sums * factor).to(tl.float64)
    ends = tl.cumsum(mass, 0)
    total = tl.max(ends, 0)
    aim = tl.load(uniform_ptr + row) * total
    block = first(ends, mass, aim, b, MANY)
    before = tl.sum(tl.where(b == block, ends - mass, 0.0), 0)

    y = scaled_block(u_ptr + row * vocab, block * BLOCK + i, vocab, heat, cold, WARM)
    w = tl.where(y == float("-inf"), 0.0, tl.exp(y - top)).to(tl.float64)
    at = first(before + tl.cumsum(w, 0), w, aim, i, BLOCK)
    taken = tl.sum(tl.where(i == at, tl.where(y == float("-inf"), 0.0, y), 0.0), 0)
    logp = (taken - top).to(tl.float64) - tl.log(tl.where(broken, 1.0, total))
    tl.store(token_ptr + row, tl.where(broken, 0, block * BLOCK + at).to(tl.int64))
    tl.store(logp_ptr + row, tl.where(broken, float("nan"), logp.to(tl.float32)))


def draw(
    logits: Tensor,  # (B, V), contiguous
    uniform: Tensor,  # (B,) float64 in [0, 1), contiguous
    temperature: float,  # above 0
) -> tuple[Tensor, Tensor]:  # (B,) int64 and (B,) fp32
    rows, vocab = logits.shape
    assert logits.is_contiguous() and uniform.is_contiguous()
    blocks = triton.cdiv(vocab, BLOCK)
    token = torch.empty(rows, dtype=torch.long, device=logits.device)
    logp, most, sums = (
        logits.new_empty(n, dtype=torch.float32) for n in (rows, *2 * (rows * blocks,))
    )
    warm = (temperature, 1.0 / temperature), {"WARM": temperature != 1.0}
    if rows:
        block_kernel[(rows, blocks)](
            logits, most, sums, vocab, *warm[0], **warm[1], BLOCK=BLOCK, num_warps=8
        )
        pick_kernel[(rows,)](
            logits, most, sums, uniform, token, logp, vocab, blocks, *warm[0], **warm[1],
            MANY=max(2, triton.next_power_of_2(blocks)), BLOCK=BLOCK, num_warps=8,
        )  # fmt: skip
    return token, logp
