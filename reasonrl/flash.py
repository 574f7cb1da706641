"""Packed, prefix-shared attention by flash kernels: no padding, no mask, no scores in memory.

Every prompt and every completion attends to itself (one causal call over all L tokens), and every
completion to its prompt (one call more). The two softmaxes of a completion's token are one:

    lse = log(e^lse_a + e^lse_b),   o = e^(lse_a - lse) o_a + e^(lse_b - lse) o_b

Backward asks for the gradient of each part with the *joint* o and lse, for which p = e^(s - lse)
is the joint softmax: exact, and nothing is made again. The kernels are torch's own FlashAttention-2
for sequences of any length; they need CUDA and a half type. Sums over a key's queries use atomics:
the last bits vary between runs unless torch.use_deterministic_algorithms is on.
Shapes: L tokens, H query heads, K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

HALF = (torch.bfloat16, torch.float16)
WIDEST = 256  # head width the kernels have; a multiple of 8


@dataclass(frozen=True)
class Spans:
    """Where the sequences of a packing stand, for both calls; int32 offsets on the device."""

    own: Tensor  # (P + B + 1,) prompts and completions in the order of the packing
    longest: int
    completion: Tensor  # (L - prompts,) int64, tokens of completions
    prompt: Tensor  # int64, tokens of prompts that have completions
    asks: Tensor  # (P' + 1,) offsets of a group's completions among `completion`
    asked: Tensor  # (P' + 1,) offsets of its prompt among `prompt`
    most: tuple[int, int]  # the longest of each


def spans(layout: Sequence[tuple[int, int, Sequence[int]]], device) -> Spans:
    """Of a packing [prompt | completion | completion ...]: (start, prompt length, lengths)."""
    lengths = [n for _, prompt, rows in layout for n in (prompt, *rows)]
    shared = [(start, prompt, sum(rows)) for start, prompt, rows in layout if sum(rows)]

    def offsets(sizes: Sequence[int]) -> Tensor:
        return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device)

    def joined(runs: Sequence[tuple[int, int]]) -> Tensor:
        parts = [torch.arange(first, first + n) for first, n in runs]
        return (torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)).to(device)

    return Spans(
        own=offsets(lengths),
        longest=max(lengths, default=0),
        completion=joined([(start + prompt, n) for start, prompt, n in shared]),
        prompt=joined([(start, prompt) for start, prompt, _ in shared]),
        asks=offsets([n for *_, n in shared]),
        asked=offsets([prompt for _, prompt, _ in shared]),
        most=(
            max((n for *_, n in shared), default=0),
            max((prompt for _, prompt, _ in shared), default=0),
        ),
    )


def missing(q: Tensor) -> str | None:
    """None where the kernels take q (L, H, d), otherwise why not."""
    if q.device.type != "cuda":
        return f"tensors on CUDA, got {q.device.type}"
    if q.dtype not in HALF:
        return f"bf16 or fp16, got {q.dtype}"
    return unfit(q.shape[-1], q.device)


def unfit(size: int, device: torch.device) -> str | None:
    """The same for heads of that size, of a half type, on a GPU."""
    if size > WIDEST or size % 8:
        return f"a head width that is a multiple of 8 up to {WIDEST}, got {size}"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "an Ampere GPU or a later one"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, at: Spans, scaling: float) -> Tensor:
    """q (L, H, d), k and v (L, K, d) -> (L, H, d), differentiable."""
    return _SharedPrefix.apply(q, k, v, at, scaling)  # type: ignore[return-value]


def attend_slots(q: Tensor, k: Tensor, v: Tensor, used: Tensor, scaling: float) -> Tensor:
    """One query a row over its first `used` (B,) int32 keys: q (B, H, d), k and v (B, W, K, d) ->
    (B, H, d); no number has to be known before the kernel runs."""
    rows, width = k.shape[:2]
    starts = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
    lengths = (starts, starts * width, 1, width)
    return torch.ops.aten._flash_attention_forward(
        q, k.flatten(0, 1), v.flatten(0, 1), *lengths, 0.0, False, False, scale=scaling,
        seqused_k=used,
    )[0]  # fmt: skip


class _SharedPrefix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, at: Spans, scaling: float):
        rng = []
        out, lse, *state = _forward(
            q, k, v, (at.own, at.own, at.longest, at.longest), True, scaling
        )
        rng.append(state)
        if at.completion.numel():
            parts = q[at.completion], k[at.prompt], v[at.prompt]
            more, above, *state = _forward(*parts, (at.asks, at.asked, *at.most), False, scaling)
            rng.append(state)
            own = lse[:, at.completion]
            joint = torch.logaddexp(own, above)
            a, b = ((x - joint).exp().T[:, :, None] for x in (own, above))
            mixed = a * out[at.completion].to(lse.dtype) + b * more.to(lse.dtype)
            out = out.index_copy(0, at.completion, mixed.to(out.dtype))
            lse = lse.index_copy(1, at.completion, joint)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.known = at, scaling, rng
        return out

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        q, k, v, out, lse = ctx.saved_tensors
        at, scaling, rng = ctx.known
        own = (at.own, at.own, at.longest, at.longest)
        grad = grad.contiguous()
        dq, dk, dv = _backward(grad, q, k, v, out, lse, own, True, rng[0], scaling)
        if at.completion.numel():
            here, there = at.completion, at.prompt
            parts = grad[here], q[here], k[there], v[there], out[here], lse[:, here].contiguous()
            more = _backward(*parts, (at.asks, at.asked, *at.most), False, rng[1], scaling)
            for total, part, rows in zip((dq, dk, dv), more, (here, there, there), strict=True):
                total.index_add_(0, rows, part)
        return dq, dk, dv, None, None


def _forward(q, k, v, lengths, causal: bool, scaling: float):
    """(out, log-sum-exp (H, tokens) fp32, what the backward wants of random numbers)."""
    out, lse, *rng, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, *lengths, 0.0, causal, False, scale=scaling
    )
    return out, lse, *rng


def _backward(grad, q, k, v, out, lse, lengths, causal: bool, rng, scaling: float):
    return torch.ops.aten._flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, 0.0, causal, *rng, scale=scaling
    )
