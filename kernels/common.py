"""What the Triton kernels share: where they can run, accurate small functions, int64 offsets.

Nothing here knows an op. Numbers are run-time arguments everywhere: a new clip, temperature or
length compiles nothing; only flags (a family, "is there a softcap") and block sizes are
compile-time.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor


def available() -> str | None:
    """None where Triton kernels can run, otherwise what is missing."""
    if os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available():
        return None
    return "there is no GPU (TRITON_INTERPRET=1, set before the start, runs Triton slowly on a CPU)"


def block(n: int, most: int) -> int:
    """A power of two that covers n, between 16 and `most`."""
    return max(16, min(most, triton.next_power_of_2(max(n, 1))))


def flag(x: Tensor | None, stand_in: Tensor) -> Tensor:
    """A pointer for an argument that may be absent; its flag keeps it from being read."""
    return stand_in if x is None else x


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """total + a @ b in fp32, in the place of total; half types on a GPU are summed there by the
    product itself."""
    full = torch.float32
    if a.is_cuda and a.dtype != full:
        if total is None:
            return torch.mm(a, b, out_dtype=full)
        return torch.addmm(total, a, b, out_dtype=full, out=total)
    return (a @ b).to(full) if total is None else total.add_(a @ b)


@triton.jit
def finite(x):
    return (x == x) & (tl.abs(x) != float("inf"))


@triton.jit
def log_of(x):
    """log x to about 1 ulp: x = 2^k f with f around 1, log f = 2 atanh((f - 1) / (f + 1)).

    A GPU has log2, whose error grows with the result: at x = 50 it would be 4 times a rounding.
    """
    bits = x.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True)
    r = (f - 1.0) / (f + 1.0)
    y = r * r
    series = 1.0 / 7.0 + y * (1.0 / 9.0)
    series = 1.0 / 3.0 + y * (1.0 / 5.0 + y * series)
    k = k.to(tl.float32)
    value = k * 0.693145751953125 + (k * 1.428606765330187e-06 + (2.0 * r + 2.0 * r * y * series))
    return tl.where((x > 1e-30) & (x < float("inf")), value, tl.log(x))


@triton.jit
def bounded_exp(x):
    """exp of x clamped to +-20, and whether x was inside.

    A GPU has 2^y: what rounding y = x log2(e) loses is put back, or e^20 would miss 20 ulp.
    """
    inside = (x >= -20.0) & (x <= 20.0)
    x = tl.minimum(tl.maximum(x, -20.0), 20.0)
    y = x * 1.4426950408889634
    lost = tl.fma(x, 1.4426950216293335, -y) + x * 1.925963033500e-08
    return tl.exp2(y) * (1.0 + 0.6931471805599453 * lost), inside


@triton.jit
def exp_minus_linear(r):
    """exp(clamped r) - r - 1 without cancellation near 0, and its derivative exp(r) - 1."""
    e, inside = bounded_exp(r)
    # r^2/2 (1 + r/3 (1 + r/4 (...))) while |r| is small
    t = 1.0 + r / 10.0
    t = 1.0 + r / 9.0 * t
    t = 1.0 + r / 8.0 * t
    t = 1.0 + r / 7.0 * t
    t = 1.0 + r / 6.0 * t
    t = 1.0 + r / 5.0 * t
    t = 1.0 + r / 4.0 * t
    t = 1.0 + r / 3.0 * t
    small = tl.abs(r) < 0.5
    value = tl.where(small, 0.5 * r * r * t, (e - 1.0) - r)
    slope = tl.where(small, r + 0.5 * r * r * t, tl.where(inside, e, 0.0) - 1.0)
    return value, slope


@triton.jit
def tanh(x):
    """tanh to fp32 accuracy, also near 0."""
    e = tl.exp(-2.0 * tl.abs(x))
    per = 1.0 / (1.0 + e)
    far = (1.0 - e) * per
    far += tl.fma(-far, 1.0 + e, 1.0 - e) * per  # a division may miss 2 ulp on a GPU
    y = x * x
    near = -1382.0 / 155925.0 * y + 62.0 / 2835.0
    near = near * y - 17.0 / 315.0
    near = near * y + 2.0 / 15.0
    near = near * y - 1.0 / 3.0
    near = x + x * y * near
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def over(x, heat, cold):
    """x / heat, rounded once, where cold is the rounded 1 / heat: a division on a GPU may miss 2
    ulp, the product with an inverse 1."""
    q = x * cold
    lost = tl.fma(-q, heat, x)
    return tl.fma(tl.where(lost == lost, lost, 0.0), cold, q)  # of an infinite x: not a number


@triton.jit
def scores(
    u, heat, cold, softcap, per_softcap, CAPPED: tl.constexpr, WARM: tl.constexpr
):  # fmt: skip
    """s = softcap tanh(u / softcap) / temperature and ds/du; heat is the temperature, cold and
    per_softcap are inverses; WARM where the temperature is not 1."""
    s, ds = u, 1.0
    if CAPPED:
        a = over(u, softcap, per_softcap)
        e = tl.exp(-2.0 * tl.abs(a))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - tanh^2, which would cancel near its ends
        s, ds = softcap * tanh(a), slope
    if WARM:
        s, ds = over(s, heat, cold), ds * cold
    return s, ds


@triton.jit
def absorb(m, total, moment, s):
    """Add the scores s to the running (max, sum e^(s-m), sum e^(s-m) (s-m)); -inf scores add
    nothing."""
    top = tl.maximum(m, tl.max(s, 0))
    safe = tl.where(top == float("-inf"), 0.0, top)
    old = tl.where(m == float("-inf"), 0.0, tl.exp(m - safe))
    shift = tl.where(m == float("-inf"), 0.0, m - safe)
    gap = s - safe
    e = tl.where(s == float("-inf"), 0.0, tl.exp(gap))
    moment = old * (moment + shift * total) + tl.sum(tl.where(s == float("-inf"), 0.0, e * gap), 0)
    return top, old * total + tl.sum(e, 0), moment


@triton.jit
def scale_kernel(x_ptr, g_ptr, out_ptr, n, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < n, other=0.0).to(tl.float32)
    tl.store(out_ptr + i, (x * tl.load(g_ptr)).to(out_ptr.dtype.element_ty), mask=i < n)


def scaled(x: Tensor, g: Tensor) -> Tensor:
    """x times a number that lies on the device, in the type of x: one read, one write."""
    out = torch.empty_like(x)
    if x.numel():
        scale_kernel[(triton.cdiv(x.numel(), 4096),)](x, g.float(), out, x.numel(), BLOCK=4096)
    return out
