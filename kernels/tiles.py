"""u = x W^T by tiles on tensor cores, with `logp`'s statistics of a tile while it is in registers.

    of a row in a tile: m = max s, S = sum e^(s-m), Q = sum e^(s-m) (s-m), from the rounded logits

A second kernel joins a row's tiles. The logits are written where they are needed again and nowhere
else, so a log p alone holds no logits at all. Programs stay on the device and walk tiles, rows
fastest: the copies of a tile run ahead while the one before it is summed up. Tiles and flags are
measured ones (bench/results/h200-20261127.md); where the library's product and a pass over its
result are as fast, `worth` says no. Legend: N rows, D hidden, V vocabulary, T tiles of words.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from reasonrl.kernels.common import flag, log_of, over
from reasonrl.kernels.logp import ROUNDED

__all__ = ["row_bytes", "score_rows", "worth"]

BM, BV, BK, GROUP = 128, 256, 64, 16  # rows and words of a tile, depth of a step, tiles of a group
OPTIONS = {"num_warps": 8, "num_stages": 3, **ROUNDED}
SCORES, DEPTH = 1 << 23, 4096  # from so many scores, up to this width it is faster
JOINED = {"R": 8, "TILES": 128}  # what a program of the second kernel reads at a time


# a count of rows that divides by 16 would be compiled to other sums: a row has the same bits always
@triton.jit(do_not_specialize=["n"])
def tile_kernel(
    x_desc, w_desc, u_desc, bias_ptr, target_ptr, logp_ptr, part_ptr, n, vocab, hidden, heat, cold,
    BIAS: tl.constexpr, WARM: tl.constexpr, KEEP: tl.constexpr, ENTROPY: tl.constexpr,
    BM: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(n, BM), tl.cdiv(vocab, BV)
    for tile in tl.range(tl.program_id(0), down * across, tl.num_programs(0), flatten=True):
        first = tile // (GROUP * across) * GROUP
        size = tl.minimum(down - first, GROUP)
        within = tile % (GROUP * across)
        r0, j = (first + within % size) * BM, within // size
        v0 = j * BV
        u = tl.zeros([BM, BV], tl.float32)
        for k in range(0, hidden, BK):
            u = tl.dot(x_desc.load([r0, k]), w_desc.load([v0, k]).T, u)
        col, row = tl.arange(0, BV), r0 + tl.arange(0, BM)
        if BIAS:
            b = tl.load(bias_ptr + v0 + col, mask=col < vocab - v0, other=0.0)
            u += b.to(tl.float32)[None, :]
        rounded = u.to(x_desc.dtype)
        if KEEP:
            u_desc.store([r0, v0], rounded)
        s = rounded.to(tl.float32)
        if WARM:
            s = over(s, heat, cold)
        if v0 + BV > vocab:
            s = tl.where((col < vocab - v0)[None, :], s, float("-inf"))
        if not KEEP:
            y = tl.load(target_ptr + row, mask=row < n, other=-1) - v0
            here = (y >= 0) & (y < BV)
            if tl.max(here.to(tl.int32), 0) > 0:
                hit = col[None, :] == y.to(tl.int32)[:, None]
                tl.store(logp_ptr + row, tl.sum(tl.where(hit, s, 0.0), 1), mask=here)
        m = tl.max(s, 1)
        gap = s - tl.where(m == float("-inf"), 0.0, m)[:, None]
        e = tl.exp(gap)
        part = part_ptr + j.to(tl.int64) * 3 * n + row
        tl.store(part, m, mask=row < n)
        tl.store(part + n, tl.sum(e, 1), mask=row < n)
        if ENTROPY:  # of a score of -inf: 0, not 0 times -inf
            gap = tl.maximum(gap, -1e4, propagate_nan=tl.PropagateNan.ALL)
            tl.store(part + 2 * n, tl.sum(e * gap, 1), mask=row < n)


@triton.jit(do_not_specialize=["n"])
def join_kernel(
    u_ptr, target_ptr, logp_ptr, stats_ptr, part_ptr, n, vocab, tiles, heat, cold,
    WARM: tl.constexpr, KEEP: tl.constexpr, ENTROPY: tl.constexpr,
    R: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * R + tl.arange(0, R)
    live = row < n
    m = tl.full([R], float("-inf"), tl.float32)
    total, moment = tl.zeros([R], tl.float32), tl.zeros([R], tl.float32)
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        part = part_ptr + tile.to(tl.int64)[:, None] * 3 * n + row[None, :]
        there = (tile < tiles)[:, None] & live[None, :]
        own = tl.load(part, mask=there, other=float("-inf"))
        top = tl.maximum(m, tl.max(own, 0))
        safe = tl.where(top == float("-inf"), 0.0, top)
        shift = tl.where(own == float("-inf"), 0.0, own - safe[None, :])
        scale = tl.where(own == float("-inf"), 0.0, tl.exp(shift))
        sums = tl.load(part + n, mask=there, other=0.0)
        before = tl.where(m == float("-inf"), 0.0, m - safe)
        old = tl.where(m == float("-inf"), 0.0, tl.exp(before))
        if ENTROPY:
            q = tl.load(part + 2 * n, mask=there, other=0.0)
            moment = old * (moment + before * total) + tl.sum(scale * (q + shift * sums), 0)
        total = old * total + tl.sum(scale * sums, 0)
        m = top
    log_sum = log_of(total)
    if KEEP:
        y = tl.load(target_ptr + row, mask=live, other=0)
        taken = tl.load(u_ptr + row.to(tl.int64) * vocab + y, mask=live, other=0.0).to(tl.float32)
        if WARM:
            taken = over(taken, heat, cold)
    else:
        taken = tl.load(logp_ptr + row, mask=live, other=0.0)
    tl.store(logp_ptr + row, (taken - m) - log_sum, mask=live)
    tl.store(stats_ptr + 3 * row, m, mask=live)
    tl.store(stats_ptr + 3 * row + 1, log_sum, mask=live)
    if ENTROPY:
        tl.store(stats_ptr + 3 * row + 2, log_sum - moment / total, mask=live)


def worth(n: int, x: Tensor, w: Tensor, softcap: float | None) -> bool:
    """Whether n rows of x (.., D) with w (V, D) are made here; measured on one card alone."""
    return (
        x.is_cuda
        and x.element_size() == 2
        and softcap is None
        and n * w.shape[0] >= SCORES
        and x.shape[1] <= DEPTH
        and x.shape[1] % 8 == w.shape[0] % 8 == w.data_ptr() % 16 == x.data_ptr() % 16 == 0
        and torch.version.hip is None  # which counts its generations alike
        and _generation(x.device) == (9, 0)
    )


def row_bytes(vocab: int) -> int:
    """What the statistics of a row's tiles take."""
    return 12 * triton.cdiv(vocab, BV)


def score_rows(
    x: Tensor,  # (N, D)
    w: Tensor,  # (V, D), of the type of x
    bias: Tensor | None,
    target: Tensor,  # (N,) int64 in [0, V)
    temperature: float,
    entropy: bool,
    keep: bool,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The logits (N, V) where they are to be kept, logp (N,), and (max, log of the sum above it,
    entropy) (N, 3), the last one only where it is asked for."""
    n, vocab = x.shape[0], w.shape[0]
    full = {"dtype": torch.float32, "device": x.device}
    u = torch.empty((n, vocab) if keep else (1, 8), dtype=x.dtype, device=x.device)
    taken, stats = torch.empty(n, **full), torch.empty((n, 3), **full)
    part = torch.empty((triton.cdiv(vocab, BV), 3, n), **full)
    launch(x, w, bias, target, u, taken, stats, part, temperature, entropy, keep)
    return u if keep else None, taken, stats


def launch(
    x, w, bias, target, u, taken, stats, part, temperature: float, entropy: bool, keep: bool
) -> None:
    """Both kernels, into u, taken and stats; part (T, 3, N) lies between them."""
    assert keep or bias is None  # together they take more registers than there are
    (n, depth), vocab, across = x.shape, w.shape[0], part.shape[0]
    heat = temperature, 1.0 / temperature
    flags = {"WARM": temperature != 1.0, "KEEP": keep, "ENTROPY": entropy}
    shape = {"BM": BM, "BV": BV, "BK": BK, "GROUP": GROUP}
    desc = TensorDescriptor.from_tensor
    tile_kernel[(min(triton.cdiv(n, BM) * across, _programs(x.device)),)](
        desc(x, [BM, BK]), desc(w, [BV, BK]), desc(u, [BM, BV]), flag(bias, x), target, taken,
        part, n, vocab, depth, *heat, **flags, BIAS=bias is not None, **shape, **OPTIONS,
    )  # fmt: skip
    join_kernel[(triton.cdiv(n, JOINED["R"]),)](
        u, target, taken, stats, part, n, vocab, across, *heat, **flags, **JOINED, num_warps=4,
        **ROUNDED,
    )  # fmt: skip


@cache
def _generation(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _programs(device: torch.device) -> int:
    """One a multiprocessor; a few in the interpreter, so that each walks several tiles."""
    if device.type == "cpu":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count
