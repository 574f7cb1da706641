"""Bytes and addresses of the Triton kernels in the interpreter: run by test_triton.py in its own
process.

Bytes are what programs ask for, before any cache. The interpreter alone does not notice a read
outside a tensor, so inputs and outputs also stand against pages that may not be touched, on either
side.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import os

import pytest
import torch
from triton_layer_cases import angles, backward, forward

from reasonrl import LossSpec, calls
from reasonrl.kernels import common, draw, layers, packed, policy_loss, slots, tiles
from reasonrl.kernels import logp as logp_kernels
from reasonrl.kernels import turn as turns

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="run by test_triton.py"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
NORESERVE = 0x4000
PAGE = mmap.PAGESIZE
PLAIN, FACTORS = (1.0, 1.0, 1.0, 1.0), (0.5, 2.0, 5.0, 0.2)  # temperature, softcap: inverses too
kept = []  # mappings that tensors look into


@pytest.fixture
def asked(monkeypatch):
    """Bytes that the programs load and store."""
    from triton.runtime.interpreter import InterpreterBuilder

    seen = {"load": 0, "store": 0}
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def size(ptrs):
        return ptrs.get_element_ty().primitive_bitwidth // 8 or 1

    def counted_load(self, ptrs, mask, *rest, **named):
        seen["load"] += int(mask.data.sum()) * size(ptrs)
        return load(self, ptrs, mask, *rest, **named)

    def counted_store(self, ptrs, value, mask, *rest, **named):
        seen["store"] += int(mask.data.sum()) * size(ptrs)
        return store(self, ptrs, value, mask, *rest, **named)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)
    return seen


def test_bytes_of_logp(asked):
    rows, vocab = 3, 5000
    u, target = torch.randn(rows, vocab), torch.zeros(rows).long()
    taken, stats = logp_kernels.row_stats(u, target, 1.0, None)
    assert asked == {"load": 4 * rows * vocab + rows * (8 + 4), "store": rows * 4 * 4}
    asked.update(load=0, store=0)
    du, blocks = torch.empty_like(u), math.ceil(vocab / 2048)
    logp_kernels.row_grad(u, target, stats, taken, taken, du, 1.0, None)
    per_program = 8 + 3 * 4 + 2 * 4  # target, statistics, two upstream gradients
    assert asked["load"] == 4 * rows * vocab + rows * blocks * per_program
    assert asked["store"] == 4 * rows * vocab


@pytest.mark.parametrize("keep", [False, True])
def test_bytes_of_tiles(keep, asked):
    """x once for every tile of words, w once for every tile of rows; the logits leave once."""
    n, depth, vocab = 300, 72, 520
    x, w = torch.randn(n, depth), torch.randn(vocab, depth)
    target, down, across = torch.arange(n), 3, 3
    tiles.score_rows(x, w, None, target, 1.0, True, keep)
    own = 4 * depth * (across * n + down * vocab) + (0 if keep else across * n * 8)
    join = n * (across * 12 + (8 + 4 if keep else 4))
    assert asked["load"] == own + join
    taken = 0 if keep else 4 * n
    assert asked["store"] == across * n * 12 + keep * 4 * n * vocab + taken + n * 16


@pytest.mark.parametrize(
    ("name", "reads"), [("grpo", 1), ("gspo", 3), ("gspo_token", 2), ("gmpo", 2)]
)
def test_bytes_of_policy_loss(name, reads, asked):
    n, rows = 1500, 3
    spec = LossSpec.named(name, kl_coef=0.1, entropy_coef=0.1)
    x = torch.randn(n)
    cu, mask = torch.tensor([0, 700, 700, n]), torch.ones(n, dtype=torch.bool)
    share, bonus = policy_loss.shares(spec, cu, mask, None)
    given = policy_loss.Inputs(x, x, x, x, mask, cu, share, bonus)
    policy_loss.coefficients(x, x, given, spec)
    token = 6 * 4 + 1  # logp, old, advantage, ref, weight, entropy; the mask
    assert asked["load"] == reads * n * token + rows * (2 * 8 + 2 * 4)
    assert asked["store"] == n * 2 * 4 + rows * 10 * 4


def mapped(count: int, dtype=torch.float32, flags=0) -> torch.Tensor:
    item = torch.empty(0, dtype=dtype).element_size()
    kept.append(mmap.mmap(-1, count * item, flags=mmap.MAP_PRIVATE | flags))
    return torch.frombuffer(kept[-1], dtype=dtype)


def test_rows_far_apart():
    """Rows 2^27 elements apart, in memory that exists only where it is written."""
    gap, rows, width = 1 << 27, 20, 40
    u = mapped(rows * gap, flags=NORESERVE).view(rows, gap)
    small = torch.randn(rows, width)
    u[:, :width] = small
    target = torch.arange(rows) % width
    taken, stats = torch.full((rows,), math.nan), torch.full((rows, 3), math.nan)
    logp_kernels.stats_kernel[(rows,)](
        u, target, taken, stats, gap, width, *PLAIN, CAPPED=False, WARM=False, BLOCK=64
    )
    want = torch.log_softmax(small, -1).gather(-1, target[:, None])[:, 0]
    torch.testing.assert_close(taken, want, rtol=1e-5, atol=1e-5)
    one = torch.ones(rows)
    logp_kernels.grad_kernel[(rows, 1)](
        u, target, stats, one, one, u, gap, width, *PLAIN, CAPPED=False, WARM=False, ENTROPY=False,
        BLOCK=64,
    )  # fmt: skip
    want = torch.nn.functional.one_hot(target, width) - torch.softmax(small, -1)
    torch.testing.assert_close(u[:, :width].clone(), want, rtol=1e-4, atol=1e-6)


def test_tiles_far_apart(monkeypatch):
    """The statistics of the 21st tile start past 2^31, and so do the logits of the last row."""
    from triton.runtime import interpreter

    n, across, gap = 36 << 20, 21, 3 * (36 << 20)
    part = mapped(across * gap, flags=NORESERVE).view(across, 3, n)
    part[:, :2, -8:] = torch.rand(across, 2, 8) + 0.5
    part[:, 2, -8:] = -part[:, 0, -8:]
    known = part[:, :, -8:].clone()
    target, taken = mapped(n, torch.int64, NORESERVE), mapped(n, flags=NORESERVE)
    stats, logits = mapped(3 * n, flags=NORESERVE).view(n, 3), mapped(n * 64, flags=NORESERVE)
    logits.view(n, 64)[-8:] = 0.25
    builder, last = interpreter.interpreter_builder, n // 8 - 1
    dim, idx = builder.set_grid_dim, builder.set_grid_idx
    monkeypatch.setattr(builder, "set_grid_dim", lambda *_: dim(n // 8, 1, 1), raising=False)
    monkeypatch.setattr(builder, "set_grid_idx", lambda *_: idx(last, 0, 0), raising=False)
    tiles.join_kernel[(1,)](
        logits, target, taken, stats, part, n, 64, across, 1.0, 1.0, WARM=False, KEEP=True,
        ENTROPY=True, R=8, TILES=128,
    )  # fmt: skip
    m = known[:, 0].max(0).values
    total = (known[:, 1] * (known[:, 0] - m).exp()).sum(0)
    torch.testing.assert_close(stats[-8:, 0], m)
    torch.testing.assert_close(stats[-8:, 1], total.log())
    torch.testing.assert_close(taken[-8:], 0.25 - m - total.log())


def test_tokens_beyond_two_to_the_31st():
    """A completion that starts past 2^31: every token pointer of the policy kernel."""
    start, n = (1 << 31) + 12_345, 700
    spec = LossSpec.named("gspo", clip_low=0.5, clip_high=0.5, kl_coef=0.1, entropy_coef=0.1)
    small = [torch.randn(n) * 0.1 for _ in range(6)]
    far = [mapped(start + n, flags=NORESERVE) for _ in range(8)]
    mask, c, eta = mapped(start + n, torch.bool, NORESERVE), far[6], far[7]
    for x, value in zip(far, small, strict=False):
        x[start:] = value
    mask[start:] = True

    def inputs(x, keep, cu):
        share, bonus = torch.full((1,), 0.01), torch.full((1,), 0.001)
        return policy_loss.Inputs(x[1], x[2], x[3], x[4], keep, cu, share, bonus)

    here = inputs(small, torch.ones(n, dtype=torch.bool), torch.tensor([0, n]))
    want = policy_loss.coefficients(small[0], small[5], here, spec)
    there = inputs(far, mask, torch.tensor([start, start + n]))
    sums = torch.full((1, 10), math.nan)
    policy_loss.kernel[(1,)](
        far[0], there.old, there.advantage, there.ref, there.weight, far[5], mask, there.cu,
        there.share, there.bonus, c, eta, sums, 0.5, 1.5, 0.5, 0.5, 0.0, 0.0, 1.0, 1.05, 0.1,
        **policy_loss.flags(spec, far[5], there), BLOCK=512,
    )  # fmt: skip
    torch.testing.assert_close(c[start:], want[0])
    torch.testing.assert_close(eta[start:], want[1])
    torch.testing.assert_close(sums.double(), want[2])


def guarded(x: torch.Tensor, last: bool) -> torch.Tensor:
    """A copy of x whose last (or first) byte touches a page that may not be read."""
    size = x.numel() * x.element_size()
    pages = -(-size // PAGE)
    area = mmap.mmap(-1, (pages + 2) * PAGE)
    kept.append(area)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    for at in (base, base + (pages + 1) * PAGE):
        assert libc.mprotect(ctypes.c_void_p(at), PAGE, 0) == 0
    start = PAGE + (pages * PAGE - size if last else 0)
    out = torch.frombuffer(area, dtype=x.dtype, count=x.numel(), offset=start).view(x.shape)
    out.copy_(x)
    return out


@pytest.mark.parametrize("last", [True, False])
def test_nothing_outside_the_tensors_is_touched(last):
    def g(x):
        return guarded(x, last)

    u, target = g(torch.randn(3, 77)), g(torch.tensor([0, 76, 5]))
    taken, stats, one = g(torch.zeros(3)), g(torch.zeros(3, 3)), g(torch.ones(3))
    flags = {"CAPPED": True, "WARM": True, "BLOCK": 64}
    logp_kernels.stats_kernel[(3,)](u, target, taken, stats, 77, 77, *FACTORS, **flags)
    logp_kernels.grad_kernel[(3, 2)](
        u, target, stats, one, one, u, 77, 77, *FACTORS, ENTROPY=True, **flags
    )
    spec = LossSpec.named("gspo", kl_coef=0.1, entropy_coef=0.1)
    cu, mask = g(torch.tensor([0, 3, 3, 600])), g(torch.ones(600, dtype=torch.bool))
    x, share, c, sums = (
        g(torch.randn(600)),
        g(torch.ones(3)),
        g(torch.zeros(600)),
        g(torch.zeros(3, 10)),
    )
    given = policy_loss.Inputs(x, x, x, x, mask, cu, share, share)
    policy_loss.kernel[(3,)](
        x, x, x, x, x, x, mask, cu, share, share, c, c, sums, 0.8, 1.2, 0.2, 0.2, 0.0, 0.0, 1.0,
        1.05, 0.1, **policy_loss.flags(spec, x, given), BLOCK=512,
    )  # fmt: skip
    n, depth, vocab = 131, 72, 264
    x, w, bias = (g(torch.randn(*size)) for size in ((n, depth), (vocab, depth), (vocab,)))
    target, taken, stats = g(torch.arange(n)), g(torch.zeros(n)), g(torch.zeros(n, 3))
    part, logits = g(torch.zeros(2, 3, n)), g(torch.zeros(n, vocab))
    for keep in (False, True):
        args = target, logits, taken, stats, part, 0.7, True, keep
        tiles.launch(x, w, bias if keep else None, *args)
        assert taken.isfinite().all() and stats.isfinite().all()
    out = g(torch.zeros(77))
    common.scale_kernel[(2,)](g(torch.randn(77)), one, out, 77, BLOCK=64)
    assert out.isfinite().all() and u.isfinite().all() and sums.isfinite().all()


@pytest.mark.parametrize("last", [True, False])
def test_nothing_outside_of_the_tensors_of_a_layer_is_touched(last, monkeypatch):
    def g(x):
        return guarded(x, last)

    plain = torch.Tensor.new_empty

    def like(x, *size, dtype=None, device=None):
        if device is not None:  # the interpreter's own
            return plain(x, *size, device=device)
        return g(torch.zeros(*(size or x.shape), dtype=dtype or x.dtype))

    def matrix(*size):
        return g(torch.randn(*size))

    monkeypatch.setattr(torch, "empty_like", like)
    monkeypatch.setattr(torch.Tensor, "new_empty", like)
    monkeypatch.setattr(packed, "_forward", forward)
    monkeypatch.setattr(packed, "_backward", backward)
    monkeypatch.setattr(slots, "FEW", 99)
    monkeypatch.setattr(slots, "PART", 16)
    monkeypatch.setattr(draw, "BLOCK", 64)
    x, delta, weight = matrix(5, 37), matrix(5, 37), matrix(37)
    _, total, scale = layers.norm(x, delta, weight, 1e-6, torch.float32)
    found = [*layers.norm_grad(total, weight, scale, delta, x, True)]
    both = matrix(5, 2 * 37)
    found += [layers.gate(both), *layers.gate_grad(both, x)]
    (heads, groups, size), rows, width = (6, 2, 10), 3, 50
    turn = [g(angle) for angle in angles(rows, size)]
    kept, norms = [matrix(rows, width, groups, size) for _ in range(2)], [matrix(size)] * 2
    length = g(torch.tensor([0, width - 1, 20]))
    qkv = matrix(rows, (heads + 2 * groups) * size)
    found.append(slots.place_and_attend(qkv, *turn, *kept, length, 0.3, norms, 1e-6))
    found += draw.draw(matrix(3, 150), g(torch.rand(3, dtype=torch.float64)), 0.7)
    at = calls.calls([(0, 3, [2, 1]), (6, 2, [])], "cpu")
    turn, qkv = [g(angle) for angle in angles(8, size)], matrix(8, heads + 2 * groups, size)
    raw, above = matrix(*qkv.shape), matrix(*qkv.shape)
    found += [turns.turned(raw, *turn, groups, norms, 1e-6), above]
    found.append(turns.head_norm_grad_(above, raw, groups, norms, 1e-6, True))
    turns.turn_(qkv, *turn, groups)
    parts = qkv.split([heads, groups, groups], 1)
    out, lse, states = packed.attend(*parts, at, 0.3)
    found += [
        out,
        packed.attend_grad(matrix(8, heads, size), *parts, out, lse, states, turn, at, 0.3),
    ]
    assert all(x.isfinite().all() for x in found)
