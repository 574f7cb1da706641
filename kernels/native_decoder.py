"""A decoder layer (decoder.py) on the CPU: one call each way (csrc/cpu/layer.cpp) where products
are ours; else what stands between those of torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from reasonrl.kernels.decoder import (
    BOTH,
    DOWN,
    HEADS,
    NAMES,
    OUT,
    QKV,
    Between,
    Known,
    Norms,
    Turn,
    by_parts,
)
from reasonrl.kernels.native import DTYPES, core, pointer, threads
from reasonrl.kernels.native_layers import joined_swiglu
from reasonrl.kernels.native_products import fast, products

SHARES = 64  # of tokens, for the gradient of heads' norms: sums in one order for any threads
OF_WEIGHTS = (("norm1",), ("norm2",), HEADS, QKV, OUT, BOTH, DOWN)
DOWN_AT = NAMES.index("down")
PLACES = [[NAMES.index(name) for name in names] for names in OF_WEIGHTS]
PARTS = [(mine, mine) for mine in PLACES]  # of one gradient: places in NAMES, and whose rows it has
PARTS += [([NAMES.index(f"{NAMES[i]}_bias") for i in mine], mine) for mine in PLACES[3:]]
DOTS = True  # False: without the instruction for pairs of bf16
Given = Sequence[Tensor | None]  # a layer's, in the order of NAMES


def decoder_layer(
    x: Tensor,  # (L, D) fp32, contiguous
    cos: Tensor,  # (L, d)
    sin: Tensor,  # (L, d)
    known: Sequence,
    weights: Sequence[Tensor],  # fp32, contiguous, in the order of decoder.Weights
    biases: Sequence[Tensor | None],  # of q, k, v, o, gate, up, down
    norms: Sequence[Tensor | None] = (None, None),  # of q's heads and k's
    asked: Tensor | None = None,  # (A,) int64, tokens that go on behind the attention, ascending
) -> Tensor:  # (L, D) fp32, or (A, D)
    how, given = Known(*known), (*weights, *biases, *norms)
    if holds(len(x), how.dtype, given):
        return Whole.apply(x, cos, sin, how, asked, *given)
    out = by_parts(x, cos, sin, how, BETWEEN, *given)
    return out if asked is None else out.index_select(0, asked)


def holds(tokens: int, dtype: torch.dtype, given: Given) -> bool:
    """Whether a layer is one call: its products are ours, and bf16 is read in pairs."""
    down = given[DOWN_AT]
    even = dtype == torch.float32 or down.shape[0] % 2 == down.shape[1] % 2 == 0
    return bool(fast(core().isa(), dtype) and even and tokens)


class Held(NamedTuple):
    """A layer between its two ways."""

    task: Any
    x: Tensor  # (L, D), what it read
    kept: Tensor  # bytes
    given: Given


class Scratch:
    """Bytes for a moment, the same ones for all layers: a piece a layer would cut the heap up."""

    bytes = torch.empty(0, dtype=torch.uint8)

    def of(self, count: int) -> Tensor:
        if len(self.bytes) < count:
            self.bytes = _bytes(count)
        return self.bytes


def held_layer(
    x: Tensor, cos: Tensor, sin: Tensor, known: Known, asked: Tensor | None, given: Given,
    scratch: Scratch,
) -> tuple[Tensor, Held]:  # fmt: skip
    """What the layer makes of x, and what `held_layer_grad` wants. Nothing may move meanwhile."""
    task = _layer(x, cos, sin, known, asked, given)
    kept, needs = _bytes(task.keeps()), scratch.of(task.needs())
    out = torch.empty_like(x if asked is None else x[: len(asked)])
    places = (t.data_ptr() for t in (x, kept, needs, out))
    core().decoder_layer(task, *places, threads())
    return out, Held(task, x, kept, given)


def held_layer_grad(
    held: Held, grad: Tensor, wants: Sequence[bool], scratch: Scratch
) -> tuple[Tensor, list[Tensor | None]]:
    """By what the layer read, and by all of `given` that wants it. grad is contiguous."""
    out, needs = torch.empty_like(held.x), scratch.of(held.task.needs())
    found, into = _gradients(held.given, wants)
    places = (t.data_ptr() for t in (held.x, held.kept, needs, grad, out))
    core().decoder_layer_grad(held.task, *places, into, threads())
    return out, found


class Whole(torch.autograd.Function):
    """All of DecoderLayer in one call each way, to the same bits; what it keeps is one piece."""

    @staticmethod
    def forward(ctx, x, cos, sin, known, asked, *given):
        out, held = held_layer(x, cos, sin, known, asked, given, Scratch())
        ctx.known, ctx.asked = known, asked
        ctx.save_for_backward(x, cos, sin, held.kept, *given)
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, cos, sin, kept, *given = ctx.saved_tensors
        # weights that are gathered for a forward stand elsewhere in its backward
        held = Held(_layer(x, cos, sin, ctx.known, ctx.asked, given), x, kept, given)
        wants = ctx.needs_input_grad[5:]
        out, found = held_layer_grad(held, grad.contiguous(), wants, Scratch())
        return out, None, None, None, None, *found


def _layer(
    x: Tensor, cos: Tensor, sin: Tensor, known: Known, asked: Tensor | None, given: Given
) -> Any:
    blocks, size, (_, q, k, *_), down = known.packing, known.size, given, given[DOWN_AT]
    heads = q.shape[0] // size, k.shape[0] // size
    sizes = *x.shape, down.shape[1], *heads, size, len(blocks), len(x if asked is None else asked)
    places = map(pointer, (blocks, cos, sin, asked))
    kinds, scales = (DTYPES[known.dtype], DTYPES[cos.dtype]), (*known.eps, known.scaling)
    return core().LayerTask([*map(pointer, given)], [*places], sizes, kinds, scales, DOTS)


def _gradients(given: Given, wants: Sequence[bool]) -> tuple[list[Any], list[int]]:
    """A gradient for everything that wants one, and where those that stand together begin."""
    found: list[Any] = [None] * len(given)
    begins = []
    for mine, like in PARTS:
        if not any(wants[i] for i in mine):
            begins.append(0)
            continue
        rows = [given[i].shape[0] for i in like]
        whole = torch.empty((sum(rows), *(given[like[0]].shape[1:] if mine is like else ())))
        begins.append(whole.data_ptr())
        for i, part in zip(mine, whole.split(rows) if len(rows) > 1 else [whole], strict=True):
            if wants[i]:
                found[i] = part
    return found, begins


def _bytes(count: int) -> Tensor:
    return torch.empty(count, dtype=torch.uint8)


def norm(x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype):
    """The norm of x + delta, the sum, and 1 / rms of its rows."""
    y, scale = torch.empty(x.shape, dtype=dtype), torch.empty(len(x))
    total = x if delta is None else torch.empty_like(x)
    added = (0, 0, 0) if delta is None else (pointer(delta), pointer(total), DTYPES[delta.dtype])
    core().rms_norm(_task(x, weight, scale, eps, dtype), *added, pointer(y), threads())
    return y, total, scale


def norm_grad(
    x: Tensor, weight: Tensor, scale: Tensor, grad: Tensor, beside: Tensor, learnt: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """By the rows of a norm, with the gradient that came beside it: in fp32, in grad's dtype; what
    the norm gave; by its weight."""
    out, narrow, again = torch.empty_like(x), torch.empty_like(grad), torch.empty_like(grad)
    by_weight = torch.empty_like(weight) if learnt else None
    given = (pointer(t) for t in (grad, beside, out, narrow, by_weight, again))
    task = _task(x, weight, scale, 0.0, grad.dtype)
    core().rms_norm_grad(task, *given, DTYPES[grad.dtype], threads())
    return out, narrow, again, by_weight


def gate_grad(both: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """By gate and up, (L, 2 F), and what they gave, (L, F)."""
    rows, width = grad.shape
    out, again, step = torch.empty_like(both), torch.empty_like(grad), width * both.element_size()
    gate, into = both.data_ptr(), out.data_ptr()
    task = core().GateTask(gate, gate + step, rows, width, 2 * width, DTYPES[both.dtype])
    given = pointer(grad), into, into + step, pointer(again), 2 * width
    core().swiglu_grad(task, *given, threads())
    return out, again


def attend(
    qkv: Tensor, turn: Turn, known: Known, key_heads: int, norms: Norms
) -> tuple[Tensor, list[Tensor]]:
    """What was seen, and what weights are made of again. q and k are turned where they stand, but
    where they are normed, since the norm's gradient wants them as they came."""
    heads = qkv.shape[1] // known.size - 2 * key_heads
    seen = torch.empty((len(qkv), heads * known.size), dtype=qkv.dtype)
    shares = torch.empty(len(qkv), heads, 2)
    given, how = (qkv, turn) if not norms else (_normed(qkv, turn, known, key_heads, norms), None)
    core().attend_packed(_packed(given, how, known, key_heads, shares, seen), threads())
    return seen, [shares]


def attend_grad(
    grad: Tensor, qkv: Tensor, seen: Tensor, kept: Sequence[Tensor], turn: Turn, known: Known,
    key_heads: int, norms: Norms, learnt: bool,
) -> tuple[Tensor, Sequence[Tensor | None]]:  # fmt: skip
    by_qkv, heads = torch.empty_like(qkv), qkv
    if norms:
        heads = _normed(qkv, turn, known, key_heads, norms)
    task = _packed(heads, turn, known, key_heads, kept[0], None)
    core().attend_packed_grad(task, pointer(grad), pointer(by_qkv), threads())
    if not norms:
        return by_qkv, (None, None)
    parts = torch.empty(min(len(qkv), SHARES), 2, known.size)
    task = _norms(qkv, by_qkv, turn, known, key_heads, norms)
    core().norm_heads_grad(task, pointer(parts), len(parts), threads())
    return by_qkv, parts.sum(0).unbind() if learnt else (None, None)


def _normed(qkv: Tensor, turn: Turn, known: Known, key_heads: int, norms: Norms) -> Tensor:
    """Heads as attention reads them."""
    out = torch.empty_like(qkv)
    core().norm_heads(_norms(qkv, out, turn, known, key_heads, norms), threads())
    return out


def _norms(qkv: Tensor, out: Tensor, turn: Turn, known: Known, key_heads: int, norms: Norms):
    heads = qkv.shape[1] // known.size - 2 * key_heads
    given = (pointer(x) for x in (qkv, out, *turn, *norms))
    sizes = len(qkv), heads, key_heads, known.size
    kinds = DTYPES[qkv.dtype], DTYPES[turn.cos.dtype]
    return core().HeadsTask(*given, *sizes, *kinds, known.eps[2])


def _packed(
    qkv: Tensor, turn: Turn | None, known: Known, key_heads: int, shares: Tensor, seen: Any
):
    blocks, heads = known.packing, shares.shape[1]
    given = (pointer(x) for x in (qkv, *(turn or (None, None)), blocks, shares, seen))
    sizes = len(qkv), len(blocks), heads, key_heads, known.size
    kinds = DTYPES[qkv.dtype], DTYPES[turn.cos.dtype if turn else torch.float32]
    return core().PackedTask(*given, *sizes, *kinds, known.scaling, DOTS)


def _task(x: Tensor, weight: Tensor, scale: Tensor | None, eps: float, dtype: torch.dtype):
    kinds = DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[dtype]
    return core().NormTask(pointer(x), pointer(weight), pointer(scale), *x.shape, *kinds, eps)


BETWEEN = Between(norm, norm_grad, joined_swiglu, gate_grad, attend, attend_grad, products)
