"""log p of the taken token from hidden states: library products, `logp`'s kernels on each chunk.

    u = x W^T + b, then `logp`'s formulae. Forward 2 N D V FLOP; backward makes u again, turns it
    into dL/du in place, then dX = dU W and dW += dU^T X, 6 N D V FLOP more.

One chunk of logits, at most SCRATCH bytes, is alive at a time, so memory does not grow with N;
where `tiles` makes product and statistics in one kernel, the forward holds no logits. dW is summed
in fp32. Rows whose gradients are both 0 are left out of the backward exactly. Half-precision logits
are rounded to their type.
Legend: N rows, D hidden, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from reasonrl.kernels import tiles
from reasonrl.kernels.common import add_product, available
from reasonrl.kernels.logp import row_grad, row_stats

__all__ = ["available", "linear_logp", "vocab_grads", "vocab_stats"]

SCRATCH = 1 << 30  # bytes of logits alive at one time
Rows = slice | Tensor  # a run of rows, or their numbers


class Head:
    """x W^T + b by chunks of rows, and what `logp` makes of a chunk."""

    def __init__(self, x, w, bias, target, scale: tuple[float, float | None]):
        dtype = torch.promote_types(x.dtype, w.dtype)
        self.x, self.w = x.to(dtype).contiguous(), w.to(dtype).contiguous()  # (N, D), (V, D)
        self.bias, self.target, self.scale = bias, target, scale

    def chunks(self, n: int, keep: bool = True) -> list[slice]:
        """n rows in runs of one size, a multiple of 256 where SCRATCH allows it; keep: their logits
        are wanted."""
        each = self.w.shape[0] * self.x.element_size()
        if not self.kept(keep) and self.tiled(n):
            each = tiles.row_bytes(self.w.shape[0])
        most = max(1, SCRATCH // max(1, each))
        parts = -(-n // most)
        size = min(most, -(-n // max(parts, 1) // 256) * 256) if n else 1
        return [slice(start, min(start + size, n)) for start in range(0, n, size)]

    def logits(self, rows: Rows) -> Tensor:
        if self.bias is None:
            return self.x[rows] @ self.w.t()
        return torch.addmm(self.bias.to(self.x.dtype), self.x[rows], self.w.t())

    def tiled(self, n: int) -> bool:
        return tiles.worth(n, self.x, self.w, self.scale[1])

    def kept(self, keep: bool) -> bool:
        """A bias beside a search for the taken word would not fit the registers."""
        return keep or self.bias is not None

    def scored(
        self, rows: Rows, entropy: bool, keep: bool = True
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """The logits (n, V) where they are kept, logp (n,), and (max, log of the sum above it,
        entropy) (n, 3)."""
        target = self.target[rows]
        if not self.tiled(target.numel()):
            u = self.logits(rows)
            return u, *row_stats(u, target, *self.scale)
        bias = None if self.bias is None else self.bias.to(self.x.dtype)
        args = self.x[rows], self.w, bias, target, self.scale[0], entropy
        return tiles.score_rows(*args, self.kept(keep))


class Gradients:
    """dX, dW and db, which grow by a chunk at a time."""

    def __init__(self, head: Head):
        self.head = head
        self.dx = torch.zeros_like(head.x)
        self.dw: Tensor | None = None  # fp32
        self.db = torch.zeros(head.w.shape[0] if head.bias is not None else 0, device=head.w.device)

    def add(
        self, u: Tensor, rows: Rows, stats: Tensor, g: Tensor, h: Tensor | None, x: Tensor
    ) -> None:
        """What these rows contribute, given dL/dlogp, dL/dentropy and their x; u becomes dL/du."""
        row_grad(u, self.head.target[rows], stats, g, h, u, *self.head.scale)
        if isinstance(rows, slice):
            torch.mm(u, self.head.w, out=self.dx[rows])
        else:
            self.dx.index_copy_(0, rows, u @ self.head.w)
        self.dw = add_product(self.dw, u.t(), x)
        if self.head.bias is not None:
            self.db += u.sum(0, dtype=torch.float32)

    def of(self, hidden: Tensor, weight: Tensor, bias: Tensor | None):
        """In the types of what they are gradients of."""
        db = None if bias is None else self.db.to(bias.dtype)
        dw = torch.zeros_like(weight) if self.dw is None else self.dw.to(weight.dtype)
        return self.dx.to(hidden.dtype), dw, db


class LinearLogp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, scale, entropy):
        taken, stats = vocab_stats(hidden, weight, target, bias, *scale, entropy)
        ctx.save_for_backward(hidden, weight, bias, target, stats)
        ctx.known = scale, entropy
        return taken, stats[:, 2].clone()

    @staticmethod
    def backward(ctx, g, h):  # type: ignore[override]
        hidden, weight, bias, target, stats = ctx.saved_tensors
        scale, entropy = ctx.known
        h = h if entropy else None
        return *vocab_grads(hidden, weight, target, bias, *scale, stats, g, h), None, None, None


def vocab_stats(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D), these words alone
    target: Tensor,  # (N,) int64, any word where the row's own stands elsewhere
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool = True,
) -> tuple[Tensor, Tensor]:
    """log p (N,) among these words, and (max, log of the sum above it, entropy) (N, 3); the last
    one where it is asked for."""
    head = Head(hidden, weight, bias, target, (temperature, softcap))
    taken = torch.empty(target.numel(), dtype=torch.float32, device=hidden.device)
    stats = torch.empty((target.numel(), 3), dtype=torch.float32, device=hidden.device)
    for rows in head.chunks(target.numel(), keep=False):
        _, taken[rows], stats[rows] = head.scored(rows, entropy, keep=False)
    return taken, stats


def vocab_grads(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,  # -1 where the row's own word stands elsewhere
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    stats: Tensor,  # (N, 3) of the whole vocabulary
    g: Tensor,  # (N,) dL/dlogp
    h: Tensor | None,  # (N,) dL/dentropy
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What these words contribute to dX, dW and db; rows without a gradient are left out."""
    head = Head(hidden, weight, bias, target, (temperature, softcap))
    grads = Gradients(head)
    live = (g != 0 if h is None else (g != 0) | (h != 0)).nonzero()[:, 0]
    for at in head.chunks(live.numel()):
        rows = at if live.numel() == g.numel() else live[at]
        given = stats[rows].contiguous(), g[rows], None if h is None else h[rows]
        grads.add(head.logits(rows), rows, *given, head.x[rows])
    return grads.of(hidden, weight, bias)


def linear_logp(
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    target: Tensor,  # (N,) int64
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    taken, ent = LinearLogp.apply(hidden, weight, bias, target, (temperature, softcap), entropy)
    return taken, ent if entropy else None
