"""One new token a row on a GPU: turned, placed into its slot, and its attention over the slot, by
one kernel.

    q, k = turn(norm(q)), turn(norm(k)),  keys[b, n], values[b, n] = k, v with n = length[b]
    o = softmax(scaling q K^T) V over places 0 .. n

A program is a row's key head with its query heads, and where these are few a part of its places:
the parts' sums are joined by a second kernel. The new token is never read back. Nothing waits for a
number that the host knows, so a step can be recorded.
Legend: B rows, H query and K key heads of size d, W places a slot, S parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from reasonrl.kernels.common import available, flag, log_of

__all__ = ["available", "place_and_attend"]

FEW = 264  # programs under which a row's places are split
PART = 256  # places that make a part worth its sum
WIDEST = 256  # head size


@triton.jit
def turned(
    from_ptr, weight_ptr, at, real, cos_ptr, sin_ptr, c, size, half, eps, NORMED: tl.constexpr
):  # fmt: skip
    """The halves of heads, in their own type: normed, then turned by the row's angles."""
    kind = from_ptr.dtype.element_ty
    a = tl.load(from_ptr + at, mask=real, other=0.0).to(tl.float32)
    b = tl.load(from_ptr + at + half, mask=real, other=0.0).to(tl.float32)
    if NORMED:
        scale = 1.0 / tl.sqrt_rn((tl.sum(a * a, 1) + tl.sum(b * b, 1))[:, None] / size + eps)
        a, b = (a * scale).to(kind).to(tl.float32), (b * scale).to(kind).to(tl.float32)
        a *= tl.load(weight_ptr + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
        b *= tl.load(weight_ptr + half + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
    cos_a = tl.load(cos_ptr + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
    cos_b = tl.load(cos_ptr + half + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
    sin_a = tl.load(sin_ptr + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
    sin_b = tl.load(sin_ptr + half + c, mask=c < half, other=0.0).to(tl.float32)[None, :]
    return (a * cos_a - b * sin_a).to(kind), (b * cos_b + a * sin_b).to(kind)


@triton.jit
def slot_kernel(
    qkv_ptr, cos_ptr, sin_ptr, q_norm_ptr, k_norm_ptr, keys_ptr, values_ptr, length_ptr, out_ptr,
    lse_ptr, heads, key_heads, width, size, scaling, eps, NORMED: tl.constexpr,
    GROUP: tl.constexpr, QUERIES: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    row, head = (tl.program_id(0) // key_heads).to(tl.int64), tl.program_id(0) % key_heads
    part, half = tl.program_id(1), size // 2
    c, all_c, g = tl.arange(0, HALF), tl.arange(0, 2 * HALF), tl.arange(0, QUERIES)
    one = tl.arange(0, 1)
    qkv_ptr += row * (heads + 2 * key_heads) * size
    cos_ptr, sin_ptr = cos_ptr + row * size, sin_ptr + row * size
    asks = (g[:, None] < GROUP) & (c[None, :] < half)
    at = (head * GROUP + g)[:, None] * size + c[None, :]
    qa, qb = turned(qkv_ptr, q_norm_ptr, at, asks, cos_ptr, sin_ptr, c, size, half, eps, NORMED)
    at = (heads + head + one)[:, None] * size + c[None, :]
    ka, kb = turned(
        qkv_ptr, k_norm_ptr, at, (c < half)[None, :], cos_ptr, sin_ptr, c, size, half, eps, NORMED
    )
    at = (heads + key_heads + head) * size + all_c
    v = tl.load(qkv_ptr + at, mask=all_c < size, other=0.0)

    count = tl.load(length_ptr + row)
    first = (row * width * key_heads + head) * size  # of the slot's key head
    step = key_heads * size
    each = tl.cdiv(tl.cdiv(count, PARTS), BLOCK) * BLOCK
    begin = part * each
    end = tl.minimum(count, begin + each)
    m = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, 2 * HALF], tl.float32)
    if part == 0:
        new = first + count * step
        tl.store(keys_ptr + new + c[None, :], ka, mask=(c < half)[None, :])
        tl.store(keys_ptr + new + half + c[None, :], kb, mask=(c < half)[None, :])
        tl.store(values_ptr + new + all_c, v, mask=all_c < size)
        score = tl.sum(qa.to(tl.float32) * ka.to(tl.float32), 1)
        m = (score + tl.sum(qb.to(tl.float32) * kb.to(tl.float32), 1)) * scaling
        total += 1.0
        out += v.to(tl.float32)[None, :]
    for start in range(begin, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        here = (first + j * step)[None, :] + c[:, None]
        known = (j < end)[None, :] & (c < half)[:, None]
        s = tl.dot(qa, tl.load(keys_ptr + here, mask=known, other=0.0), input_precision="ieee")
        more = tl.load(keys_ptr + here + half, mask=known, other=0.0)
        s = tl.dot(qb, more, s, input_precision="ieee") * scaling
        s = tl.where((j < end)[None, :], s, float("-inf"))
        here = (first + j * step)[:, None] + all_c[None, :]
        known = (j < end)[:, None] & (all_c < size)[None, :]
        values = tl.load(values_ptr + here, mask=known, other=0.0)
        top = tl.maximum(m, tl.max(s, 1))
        p, old = tl.exp(s - top[:, None]), tl.exp(m - top)
        total = total * old + tl.sum(p, 1)
        out = out * old[:, None]
        out = tl.dot(p.to(values.dtype), values, out, input_precision="ieee")
        m = top
    asks = (g[:, None] < GROUP) & (all_c[None, :] < size)
    at = row * heads + head * GROUP + g
    if PARTS == 1:
        out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at[:, None] * size + all_c[None, :], out, mask=asks)
    else:
        at = at * PARTS + part
        out = out / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out_ptr + at[:, None] * size + all_c[None, :], out, mask=asks)
        tl.store(lse_ptr + at, m + log_of(total), mask=g < GROUP)


@triton.jit
def join_kernel(part_ptr, lse_ptr, out_ptr, size, PARTS: tl.constexpr, SIZE: tl.constexpr):
    head, s, c = tl.program_id(0).to(tl.int64), tl.arange(0, PARTS), tl.arange(0, SIZE)
    lse = tl.load(lse_ptr + head * PARTS + s)
    share = tl.exp(lse - tl.max(lse, 0))
    share /= tl.sum(share, 0)
    at = (head * PARTS + s)[:, None] * size + c[None, :]
    part = tl.load(part_ptr + at, mask=(c < size)[None, :], other=0.0)
    out = tl.sum(part * share[:, None], 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + head * size + c, out, mask=c < size)


def place_and_attend(
    qkv: Tensor,  # (B, (H + 2 K) d), contiguous
    cos: Tensor,  # (B, d)
    sin: Tensor,  # (B, d)
    keys: Tensor,  # (B, W, K, d), of qkv's dtype, written in place
    values: Tensor,  # (B, W, K, d), likewise
    length: Tensor,  # (B,) int64, below W
    scaling: float,
    norms: Sequence[Tensor] = (),  # weights (d,) of the norms of q's heads and of k's
    eps: float = 0.0,
) -> Tensor:  # (B, H d)
    rows, width, key_heads, size = keys.shape
    heads = qkv.shape[1] // size - 2 * key_heads
    group, parts = heads // key_heads, split(rows * key_heads, width)
    assert all(t.is_contiguous() for t in (qkv, cos, sin, keys, values)) and size <= WIDEST
    out = qkv.new_empty((rows, heads * size))
    if not rows:
        return out
    lse, into = None, out
    if parts > 1:
        into = qkv.new_empty((rows, heads, parts, size), dtype=torch.float32)
        lse = qkv.new_empty((rows, heads, parts), dtype=torch.float32)
    q_norm, k_norm = norms or (qkv, qkv)
    half = max(16, triton.next_power_of_2(size // 2))
    slot_kernel[(rows * key_heads, parts)](
        qkv, cos, sin, q_norm, k_norm, keys, values, length, into, flag(lse, out), heads,
        key_heads, width, size, scaling, eps, NORMED=bool(norms), GROUP=group,
        QUERIES=max(16, triton.next_power_of_2(group)), HALF=half, PARTS=parts,
        **shape_of(half),
    )  # fmt: skip
    if lse is not None:
        join_kernel[(rows * heads,)](into, lse, out, size, PARTS=parts, SIZE=2 * half, num_warps=1)
    return out


def shape_of(half: int) -> dict[str, int]:
    """Places a pass, warps and stages: the fastest that spill nothing on an H200."""
    if half <= 64:
        wide = half <= 32
        return {"BLOCK": 128 if wide else 64, "num_warps": 4, "num_stages": 3 if wide else 2}
    return {"BLOCK": 32, "num_warps": 8, "num_stages": 2}


def split(programs: int, width: int) -> int:
    """Into how many parts the places of a row's key head go: a power of two, by shapes alone."""
    wanted = min(FEW // max(1, programs), width // PART)
    return 1 if wanted < 2 else min(16, 1 << (wanted.bit_length() - 1))
