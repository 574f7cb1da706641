"""The product with an output head on the CPU, a chunk of logits at a time, and its gradients.

For native_linear.py and native_vocab.py. dW is summed in fp32; extra memory is one chunk. Where the
CPU multiplies half precision fast, logits are rounded to it, as torch rounds; elsewhere tiles of
the weight are widened and the products are fp32. Where one chunk is all there is, products become
the gradients as torch made them. A head of a few words has products of ours, where those are faster
(native_products.py).
Legend: N tokens, K rows in use, R rows of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from reasonrl.kernels.native import core, pointer, row_grad, threads
from reasonrl.kernels.native_products import products
from reasonrl.kernels.products import Products

CHUNK_BYTES = 1 << 27  # of logits alive at one time
CHUNK_ROWS = 0  # rows of a chunk where not 0: overrides CHUNK_BYTES
WIDEN: bool | None = None  # half precision as fp32 products; None: where this CPU is slow at it
SMALL = 1 << 18  # weights of a head whose products torch looks for as long as it makes them
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
        self.dx = self.dw = self.db = self.products = None
        self.wants_dx = self.wants_dw = False

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
        self.wants_dx, self.wants_dw = hidden, weight
        if bias and self.bias is not None:
            self.db = torch.zeros(self.bias.shape, dtype=torch.float32)

    def growing(self) -> bool:
        return self.wants_dx or self.wants_dw or self.db is not None

    def spans(self) -> list[tuple[int, int]]:
        starts = range(0, self.count, max(1, self.even(self.count)))
        return [(s, min(s + starts.step, self.count)) for s in starts]

    def inputs(self, rows: slice | Tensor) -> Tensor:
        if self.rows is not None:
            rows = self.rows[rows]
        elif isinstance(rows, slice) and rows.stop - rows.start == self.count:
            return self.hidden.to(self.dtype)
        return self.hidden[rows].to(self.dtype)

    def tiles(self):
        """(columns of the logits, their rows of the weight), widened, one at a time."""
        for start in range(0, self.weight.shape[0], TILE):
            yield slice(start, start + TILE), self.matrix[start : start + TILE].to(self.dtype)

    def small(self, rows: int) -> Products | None:
        """The products of so many rows with a head of a few words; None where it has many."""
        if self.weight.numel() > SMALL:
            return None
        if self.products is None or self.products.tokens != rows:
            bias = None if self.bias is None else self.bias.float()
            weight = self.weight.float().contiguous()
            self.products = products([weight], [bias], rows, self.dtype)
        return self.products

    def logits(self, x: Tensor) -> Tensor:  # (R, D) -> (R, V)
        if small := self.small(len(x)):
            return small.forward(x.contiguous())
        out = scratch(x.shape[0], self.weight.shape[0], self.dtype, self.size)
        if not self.widened:
            return _logits(x, self.matrix, self.addend, out)
        for columns, w in self.tiles():
            addend = None if self.addend is None else self.addend[columns]
            _logits(x, w, addend, out[:, columns])
        return out

    def back(self, du: Tensor) -> Tensor:  # (K, V) -> (K, D)
        if small := self.small(len(du)):
            return small.by_input(du)
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
        live = c if eta is None else (c != 0) | (eta != 0)
        count, source, room = int(live.count_nonzero()), None, u
        if count == 0:
            return
        if count < u.shape[0]:
            source, room = fold(live != 0, count), u[:count]
            x = x[source]
        du = row_grad(u, target, stats, self.scale, c, eta, room, source)
        if self.wants_dw and (small := self.small(count)):
            part = small.by_weight(du, x.contiguous())
            self.dw = part if self.dw is None else self.dw.add_(part)
        elif self.wants_dw:
            self.dw = add_product(self.dw, du, x, last=self.size >= self.count)
        if self.db is not None:
            self.db += du.sum(0, dtype=torch.float32)
        if not self.wants_dx:
            return
        if count == self.hidden.shape[0]:  # all rows there are, in their order
            self.dx = self.back(du).to(self.hidden.dtype)
            return
        if self.dx is None:
            self.dx = torch.zeros_like(self.hidden)
        if source is None and self.rows is None and isinstance(at, int):
            self.dx[at : at + count].copy_(self.back(du))
            return
        place = torch.arange(u.shape[0]) + at if isinstance(at, int) else at
        place = place if source is None else place[source]
        place = place if self.rows is None else self.rows[place]
        self.dx.index_copy_(0, place, self.back(du).to(self.dx.dtype))

    def grads(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if self.wants_dx and self.dx is None:
            self.dx = torch.zeros_like(self.hidden)
        dw = self.dw
        if self.wants_dw:
            dw = torch.zeros_like(self.weight) if dw is None else dw.to(self.weight.dtype)
        db = None if self.db is None or self.bias is None else self.db.to(self.bias.dtype)
        return self.dx, dw, db


def _logits(x: Tensor, w: Tensor, addend: Tensor | None, out: Tensor) -> Tensor:
    if addend is None:
        return torch.mm(x, w.t(), out=out)
    return torch.addmm(addend, x, w.t(), out=out)


def scratch(count: int, width: int, dtype: torch.dtype, room: int) -> Tensor:  # (count, width)
    """The front of this thread's chunk, which has room for as many rows and is kept between calls:
    fresh pages cost as much as a small product. It is kept as the matrix it was last, too."""
    asked = count, width, dtype, room
    if getattr(_kept, "asked", None) == asked:
        return _kept.matrix
    kept, size = getattr(_kept, "chunk", None), room * width * dtype.itemsize
    if kept is None or kept.numel() < size:
        _kept.asked = _kept.matrix = _kept.chunk = None
        kept = _kept.chunk = torch.empty(size, dtype=torch.uint8)
    _kept.matrix = kept[: count * width * dtype.itemsize].view(dtype).view(count, width)
    _kept.asked = asked
    return _kept.matrix


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
