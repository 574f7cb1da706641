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


@triton.jit
def finite(x):
    return (x == x) & (tl.abs(x) != float("inf"))


@triton.jit
def bounded_exp(x):
    """exp of x clamped to +-20, and whether x was inside."""
    return tl.exp(tl.minimum(tl.maximum(x, -20.0), 20.0)), (x >= -20.0) & (x <= 20.0)


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
    far = (1.0 - e) / (1.0 + e)
    y = x * x
    near = -1382.0 / 155925.0 * y + 62.0 / 2835.0
    near = near * y - 17.0 / 315.0
    near = near * y + 2.0 / 15.0
    near = near * y - 1.0 / 3.0
    near = x + x * y * near
    return tl.where(tl.abs(x) < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def scores(u, temperature, softcap, CAPPED: tl.constexpr):
    """s = softcap tanh(u / softcap) / temperature and ds/du."""
    if CAPPED:
        a = u / softcap
        e = tl.exp(-2.0 * tl.abs(a))
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))  # 1 - tanh^2, which would cancel near its ends
        s, ds = softcap * tanh(a) / temperature, slope / temperature
    else:
        s, ds = u / temperature, 1.0 / temperature
    return s, ds


@triton.jit
def absorb(m, total, moment, s, AXIS: tl.constexpr):
    """Add the scores s to the running (max, sum e^(s-m), sum e^(s-m) (s-m)); -inf scores add
    nothing."""
    top = tl.maximum(m, tl.max(s, AXIS))
    safe = tl.where(top == float("-inf"), 0.0, top)
    old = tl.where(m == float("-inf"), 0.0, tl.exp(m - safe))
    shift = tl.where(m == float("-inf"), 0.0, m - safe)
    gap = s - tl.expand_dims(safe, AXIS) if AXIS == 1 else s - safe
    e = tl.where(s == float("-inf"), 0.0, tl.exp(gap))
    moment = old * (moment + shift * total) + tl.sum(
        tl.where(s == float("-inf"), 0.0, e * gap), AXIS
    )
    return top, old * total + tl.sum(e, AXIS), moment


def merged(m: Tensor, total: Tensor, moment: Tensor) -> Tensor:
    """(splits, N) partial statistics -> (N, 3): max, log of the sum above it, entropy; in fixed
    order."""
    top = m.amax(0)
    safe = torch.where(top == -torch.inf, 0.0, top)
    gap = torch.where(m == -torch.inf, 0.0, m - safe)
    scale = torch.where(m == -torch.inf, 0.0, gap.exp())
    whole = (scale * total).sum(0)
    entropy = whole.log() - (scale * (moment + gap * total)).sum(0) / whole
    return torch.stack([top, whole.log(), entropy], 1)
