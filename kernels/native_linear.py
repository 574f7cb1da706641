"""`linear_logp` and `linear_policy_loss` on the CPU: torch's matrix products, our epilogue.

u = hidden @ weight.T + bias is made for some rows at a time; the C++ epilogue turns that chunk into
log p, then, in place, into dL/du, from which dX = dU W and dW += dU^T X. With a token ratio
`linear_policy_loss` does this in one pass (6 N D V FLOP); its backward only scales. Sequence ratios
take chunks that end where completions end; one longer than a chunk makes it two passes (8 N D V).
Skipped exactly: before the forward masked rows, and on policy without a reference (so that no
metric needs their log p) rows without advantage; before the two gradient products all rows whose
coefficients are 0. dW is summed in fp32; extra memory is one chunk. Where the CPU multiplies half
precision fast, logits are rounded to it, as torch rounds; elsewhere tiles of the weight are widened
and the products are fp32.
Legend: N tokens, K rows in use, D hidden, V vocabulary.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from reasonrl.kernels.native import (
    Policy,
    core,
    count_tokens,
    detached,
    named_metrics,
    pointer,
    row_grad,
    row_stats,
    threads,
)

CHUNK_BYTES = 1 << 27  # of logits alive at one time
CHUNK_ROWS = 0  # rows of a chunk where not 0: overrides CHUNK_BYTES
WIDEN: bool | None = None  # half precision as fp32 products; None: where this CPU is slow at it
_kept = threading.local()
TILE = 4096  # rows of weight whose half-precision dW, or fp32 copy, is alive at one time


@cache
def slow(dtype: torch.dtype) -> bool:
    """Whether torch's products of this half precision crawl here (10 times slower than fp32)."""
    if dtype == torch.bfloat16:
        return not (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return dtype == torch.float16 and not torch.cpu._is_amx_fp16_supported()


@dataclass
class Head:
    """The inputs of the product, the rows in use, and the gradients as they grow."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    scale: tuple[float, float]  # temperature, softcap (0 = none)
    rows: Tensor | None = None  # (K,) int64, None = all

    def __post_init__(self):
        self.dtype = torch.promote_types(self.hidden.dtype, self.weight.dtype)
        half = self.dtype in (torch.bfloat16, torch.float16)
        self.widened = half and (slow(self.dtype) if WIDEN is None else WIDEN)
        if self.widened:
            self.dtype = torch.float32
        self.matrix = self.weight if self.widened else self.weight.to(self.dtype)
        self.addend = None if self.bias is None else self.bias.to(self.dtype)
        self.count = self.hidden.shape[0] if self.rows is None else self.rows.numel()
        self.size = self.chunk(CHUNK_BYTES)
        self.dx = self.dw = self.db = None
        self.wants_dw = False

    def chunk(self, size: int) -> int:
        rows = size // max(1, self.weight.shape[0] * self.dtype.itemsize) // 32 * 32
        return max(1, min(CHUNK_ROWS or max(rows, 32), self.count))

    def even(self, count: int) -> int:
        """Rows of a chunk that leaves no small one behind: as even as rows by 32 allow."""
        return min(self.size, -(-count // max(1, -(-count // self.size)) // 32) * 32)

    def want(self, hidden: bool, weight: bool, bias: bool) -> None:
        """Which gradients to make; rows that are skipped keep dX = 0.

        Each chunk passes dW through memory, so chunks grow with it. Half precision needs an fp32
        sum of dW beside several chunks: one chunk of all rows is taken if it is no larger.
        """
        if weight:
            total = 4 * self.weight.numel()
            self.size = self.chunk(max(CHUNK_BYTES, total * 3 // 8))
            all_rows = 2 * self.count * self.weight.shape[0]
            if self.dtype.itemsize == 2 and all_rows <= CHUNK_BYTES + total:
                self.size = CHUNK_ROWS or max(1, self.count)
        if hidden:
            self.dx = torch.zeros_like(self.hidden)
        self.wants_dw = weight
        if bias and self.bias is not None:
            self.db = torch.zeros(self.bias.shape, dtype=torch.float32)

    def growing(self) -> bool:
        return self.wants_dw or self.dx is not None or self.db is not None

    def spans(self) -> list[tuple[int, int]]:
        starts = range(0, self.count, max(1, self.even(self.count)))
        return [(s, min(s + starts.step, self.count)) for s in starts]

    def inputs(self, rows: slice | Tensor) -> Tensor:
        return self.hidden[rows if self.rows is None else self.rows[rows]].to(self.dtype)

    def tiles(self):
        """(columns of the logits, their rows of the weight), widened ones one at a time."""
        if not self.widened:
            yield slice(None), self.matrix
            return
        for start in range(0, self.weight.shape[0], TILE):
            yield slice(start, start + TILE), self.matrix[start : start + TILE].to(self.dtype)

    def logits(self, x: Tensor) -> Tensor:  # (R, D) -> (R, V), a view of the scratch
        out = scratch(self.size * self.weight.shape[0], self.dtype)
        out = out[: x.shape[0] * self.weight.shape[0]].view(x.shape[0], self.weight.shape[0])
        for columns, w in self.tiles():
            if self.addend is None:
                torch.mm(x, w.t(), out=out[:, columns])
            else:
                torch.addmm(self.addend[columns], x, w.t(), out=out[:, columns])
        return out

    def back(self, du: Tensor) -> Tensor:  # (K, V) -> (K, D)
        if not self.widened:
            return torch.mm(du, self.matrix)
        total = torch.zeros(du.shape[0], self.weight.shape[1])
        for columns, w in self.tiles():
            total.addmm_(du[:, columns], w)
        return total

    def grow(self, u: Tensor, x: Tensor, target, stats, c, eta, at: int | Tensor) -> None:
        """Add what the rows of u contribute to dX, dW and db; u becomes dL/du of the live rows.

        `at`: the first row in use that u stands for, or all of them.
        """
        live = c != 0 if eta is None else (c != 0) | (eta != 0)
        count = int(live.sum())
        if count == 0:
            return
        source = None
        if count < u.shape[0]:
            source = fold(live, count)
            x = x[source]
        du = row_grad(u, target, stats, self.scale, c, eta, u[:count], source)
        if self.wants_dw:
            self.dw = add_product(self.dw, du, x, last=self.size >= self.count)
        if self.db is not None:
            self.db += du.sum(0, dtype=torch.float32)
        if self.dx is None:
            return
        if source is None and self.rows is None and isinstance(at, int):
            self.dx[at : at + count].copy_(self.back(du))
            return
        place = torch.arange(u.shape[0]) + at if isinstance(at, int) else at
        place = place if source is None else place[source]
        place = place if self.rows is None else self.rows[place]
        self.dx.index_copy_(0, place, self.back(du).to(self.dx.dtype))

    def grads(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dw = self.dw
        if self.wants_dw:
            dw = torch.zeros_like(self.weight) if dw is None else dw.to(self.weight.dtype)
        db = None if self.db is None or self.bias is None else self.db.to(self.bias.dtype)
        return self.dx, dw, db


def scratch(numel: int, dtype: torch.dtype) -> Tensor:  # (numel,)
    """The chunk of this thread, kept between calls: fresh pages cost as much as a small product."""
    kept = getattr(_kept, "chunk", None)
    if kept is None or kept.numel() < numel * dtype.itemsize:
        _kept.chunk = None
        kept = _kept.chunk = torch.empty(numel * dtype.itemsize, dtype=torch.uint8)
    return kept[: numel * dtype.itemsize].view(dtype)


def fold(live: Tensor, count: int) -> Tensor:  # (R,) bool -> (count,) int64
    """Which row moves to each of the first `count` places: live ones stay, later ones fill holes.

    No row that is read is written for another one, so the move can be made in place, in any order.
    """
    source = torch.arange(count)
    source[~live[:count]] = live[count:].nonzero()[:, 0] + count
    return source


def add_product(total: Tensor | None, du: Tensor, x: Tensor, last: bool) -> Tensor:
    """total (V, D) fp32 + du^T x, in place; some rows at a time where products are half precision.

    None counts as 0: a product that is first and last needs no sum, and stays as torch made it.
    """
    if total is None and (last or du.dtype == torch.float32):
        return torch.mm(du.t(), x)
    if du.dtype == torch.float32:
        return total.addmm_(du.t(), x)
    first = total is None
    if first:
        total = torch.empty(du.shape[1], x.shape[1])
    for start in range(0, total.shape[0], TILE):
        part = torch.mm(du[:, start : start + TILE].t(), x)
        rows = total[start : start + TILE]
        if first:
            rows.copy_(part)
        elif part.dtype == torch.bfloat16:
            core().add_bf16(pointer(rows), pointer(part), part.numel(), threads())
        else:
            rows += part
    return total


def linear_logp(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    bias: Tensor | None,  # (V,)
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """log p of the target and the entropy; chunks of logits, made again for the gradient."""
    scale = (temperature, softcap or 0.0)
    taken, ent = _LinearLogp.apply(hidden, weight, bias, target, scale, entropy)
    return taken, ent if entropy else None


class _LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, scale, entropy):
        ctx.scale = scale
        ctx.set_materialize_grads(False)
        head = Head(hidden, weight, bias, scale)
        taken, ent, stats = forward_only(head, target, entropy)
        ctx.save_for_backward(hidden, weight, bias, target, stats)
        return taken, ent

    @staticmethod
    def backward(ctx, grad_logp, grad_entropy=None):
        hidden, weight, bias, target, stats = ctx.saved_tensors
        if grad_logp is None and grad_entropy is None:
            return (None,) * 6
        head = Head(hidden, weight, bias, ctx.scale)
        head.want(*ctx.needs_input_grad[:3])
        c = torch.zeros(head.count) if grad_logp is None else grad_logp.contiguous()
        backward_only(head, target, stats, c, detached(grad_entropy))
        return *head.grads(), None, None, None


def forward_only(head: Head, target: Tensor, entropy: bool):
    """(logp, entropy or None, stats) of all rows in use."""
    taken, stats = torch.empty(head.count), torch.empty(head.count, 3)
    ent = torch.empty(head.count) if entropy else None
    for start, end in head.spans():
        u = head.logits(head.inputs(slice(start, end)))
        part = row_stats(u, target[start:end], head.scale, True)
        taken[start:end], stats[start:end] = part[0], part[2]
        if ent is not None:
            ent[start:end] = part[1]
    return taken, ent, stats


def backward_only(head: Head, target: Tensor, stats: Tensor, c: Tensor, eta: Tensor | None) -> None:
    """The gradients for given coefficients; rows without one are dropped before the logits."""
    live = c != 0 if eta is None else (c != 0) | (eta != 0)
    rows = live.nonzero()[:, 0]
    for part in rows.split(head.even(len(rows))) if len(rows) else ():
        whole = part.numel() == int(part[-1]) - int(part[0]) + 1
        pick = slice(int(part[0]), int(part[-1]) + 1) if whole else part
        x = head.inputs(pick)
        given = [None if t is None else t[pick] for t in (target, stats, c, eta)]
        head.grow(head.logits(x), x, *given, int(part[0]) if whole else part)


def linear_policy_loss(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    old_logp: Tensor | None,
    advantage: Tensor,
    spec: Any,  # a LossSpec
    cu: Tensor,
    mask: Tensor | None,
    ref_logp: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    is_weight: Tensor | None,
    denominator: float | Tensor | None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy_loss` of `linear_logp`; one pass gives loss, dX, dW and db, backward scales them."""
    known = [detached(x) for x in (old_logp, advantage, ref_logp, is_weight)]
    scale = (temperature, softcap or 0.0)
    loss, values = _LinearPolicy.apply(
        hidden, weight, bias, target, known, spec, cu, mask, scale, denominator
    )
    return loss, named_metrics(values)


class _LinearPolicy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, known, spec, cu, mask, scale, denominator):
        counts = count_tokens(mask, cu)
        keep = None if mask is None or bool(mask.all()) else mask
        idle = without_effect(hidden, weight, bias, known, spec, cu, keep)
        rows = keep
        if idle is not None:
            rows = ~idle if keep is None else keep & ~idle
        if rows is not None:
            left = count_tokens(rows, cu)
            rows = rows.nonzero()[:, 0]
            target, known = target[rows], [None if x is None else x[rows] for x in known]
            cu = torch.cat([cu[:1] * 0, left.cumsum(0)])
        head = Head(hidden, weight, bias, scale, rows)
        head.want(*ctx.needs_input_grad[:3])
        policy = Policy(spec, counts, denominator)
        policy.left_out(0 if idle is None else int(idle.sum()))
        spans = head.spans() if spec.ratio == "token" else whole_spans(head, cu)
        if spans is None:
            two_passes(head, policy, target, known, cu)
        else:
            one_pass(head, policy, target, known, cu, spans)
        ctx.save_for_backward(*head.grads())
        loss, values = policy.result()
        ctx.mark_non_differentiable(values)
        return loss, values

    @staticmethod
    def backward(ctx, grad, _):
        unit = float(grad) == 1.0
        grads = [
            None if g is None else g if unit else g * grad.to(g.dtype) for g in ctx.saved_tensors
        ]
        return *grads, None, None, None, None, None, None, None


def without_effect(hidden, weight, bias, known, spec, cu, keep) -> Tensor | None:  # (N,) bool
    """Unmasked rows whose part in loss, gradients and metrics is known before their log p.

    Those with advantage 0 (with a sequence ratio: of completions without any other) where nothing
    else acts: their ratio is 1, they have no KL and no entropy bonus. None where there are none. A
    row or weight that is not finite is left to be found; products that overflow are not foreseen.
    """
    old, advantage, ref, _ = known
    if old is not None or ref is not None or spec.entropy_coef:
        return None
    idle = advantage == 0
    if spec.ratio != "token":
        mine = idle if keep is None else idle | ~keep
        busy = count_tokens(~mine, cu)
        idle &= (busy == 0).repeat_interleave(cu.diff(), output_size=len(idle))
    if keep is not None:
        idle &= keep
    if not bool(idle.any()):
        return None
    whole = [weight.sum(dtype=torch.float32)] + ([] if bias is None else [bias.sum()])
    if not all(bool(torch.isfinite(x)) for x in whole):
        return None
    at = idle.nonzero()[:, 0]
    idle[at] = torch.isfinite(hidden[at]).all(-1)
    return idle


def whole_spans(head: Head, cu: Tensor) -> list[tuple[int, int]] | None:
    """Chunks that end where completions end; None where a completion is longer than a chunk."""
    ends = cu.tolist()
    spans, start = [], 0
    for here, following in zip(ends, [*ends[1:], ends[-1]], strict=True):
        if following - here > head.size:
            return None
        if here > start and (following - start > head.size or here == head.count):
            spans.append((start, here))
            start = here
    return spans


def one_pass(head: Head, policy: Policy, target, known, cu, spans) -> None:
    """Each chunk of logits gives its loss and its gradients before the next one takes its place."""
    entropy = policy.spec.entropy_coef != 0
    for start, end in spans:
        x = head.inputs(slice(start, end))
        u, ids = head.logits(x), target[start:end]
        taken, ent, stats = row_stats(u, ids, head.scale, entropy)
        old, advantage, ref, weight = (None if k is None else k[start:end] for k in known)
        inside = (cu.clamp(start, end) - start).contiguous()
        c, eta = policy.add(taken, old, advantage, ref, ent, weight, None, inside)
        if head.growing():
            head.grow(u, x, ids, stats, c, eta, start)


def two_passes(head: Head, policy: Policy, target, known, cu) -> None:
    """All log-probabilities first, then the coefficients, then the gradients of the live rows."""
    taken, ent, stats = forward_only(head, target, policy.spec.entropy_coef != 0)
    old, advantage, ref, weight = known
    c, eta = policy.add(taken, old, advantage, ref, ent, weight, None, cu.contiguous())
    if head.growing():
        backward_only(head, target, stats, c, eta)
