"""The keys and values of the rows that are being decoded, each in a slot of one static cache.

The plan (attention.py) of one new token a row: row b holds `length[b]` keys, then its new one. The
prompt's keys come from a `Packed` prefill and are copied once a row. On a CPU a slot grows with the
longest row, `GROW` tokens at a time, and a kernel of ours places the new token and reads each row
as far as it goes (`slot_attention`). On a GPU nothing depends on a number that Python knows, so
that a step can be recorded once and replayed.
Shapes: B rows, H query heads, K key/value heads, W tokens a slot, d head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from reasonrl import checks, flash
from reasonrl.attention import Packed, attend
from reasonrl.implementations import native, run
from reasonrl.records import KernelUnavailable

GROW = 32  # tokens


class Slots:
    """`rows` empty slots of `width` tokens; attn as in `Packed`."""

    def __init__(self, rows: int, width: int, device: torch.device, attn: str = "auto"):
        self.most, self.attn = width, attn
        self.fixed = device.type == "cuda"
        self.width = width if self.fixed else 0  # tokens that a slot has room for
        self.length = torch.zeros(rows, dtype=torch.long, device=device)
        self.ahead = torch.zeros_like(self.length)  # how far positions run before lengths
        self.longest = 0  # an upper bound of the lengths
        self.kernel: Callable[..., Tensor] | None = None
        self.cache: dict[int, list[Tensor]] = {}  # (B, K, W, d); fixed: (B, W, K, d)

    @property
    def position(self) -> Tensor:
        """(B,) position of every row's new token (an image's tokens share some)."""
        return self.length + self.ahead

    def put(self, at: Tensor, prefill: Packed, owner: Tensor, length: Tensor, first: Tensor):
        """Slots `at` (n,) become copies of the prompts `owner` (n,) of a prefill whose prompts
        have `length` (P,) tokens and position `first` (P,) for the first new one."""
        self.longest = max(self.longest, int(length.max()))
        self._widen()
        for layer, pair in (prefill.cache or {}).items():
            if layer not in self.cache:
                self.cache[layer] = [self._room(x) for x in pair]
            for full, prompt in zip(self._heads_first(layer), pair, strict=True):
                full[at, :, : prompt.shape[2]] = prompt.index_select(0, owner)
        self.length[at] = length[owner]
        self.ahead[at] = (first - length)[owner]
        self.longest = int(self.length.max())

    def _room(self, like: Tensor) -> Tensor:
        """Zeros: an unseen NaN would still spread."""
        heads = (like.shape[1], self.width)
        size = (len(self.length), *(reversed(heads) if self.fixed else heads), like.shape[3])
        return like.new_zeros(size)

    def _widen(self) -> None:
        """Room for the longest row and its next token."""
        if self.longest < self.width or self.width == self.most:
            return
        before, self.width = self.width, min(self.most, self.longest + GROW)
        for layer, pair in self.cache.items():
            self.cache[layer] = [self._room(x) for x in pair]
            for wide, narrow in zip(self.cache[layer], pair, strict=True):
                wide[:, :, :before] = narrow

    def _heads_first(self, layer: int) -> list[Tensor]:
        return [x.transpose(1, 2) if self.fixed else x for x in self.cache[layer]]

    def place(self) -> None:
        """Before a step: where its keys go and what its queries see."""
        self._widen()
        if self.fixed:
            columns = torch.arange(self.width, device=self.length.device)
            self.sees = (columns <= self.length[:, None])[:, None, None, :]
            self.used = (self.length + 1).int()

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q (H, B, d), k and v (K, B, d) -> (B, H, d)."""
        keys, values = self._heads_first(layer)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        if not self.fixed:
            self.kernel = self.kernel or _kernel(q, keys)
            return self.kernel(q, k, v, keys, values, self.length, scaling)
        for cache, new in ((keys, k), (values, v)):
            slot = self.length[:, None, None, None]
            slot = slot.expand(-1, cache.shape[1], 1, cache.shape[3])
            cache.scatter_(2, slot, new[:, :, None].to(cache.dtype))
        q = q.to(keys.dtype)
        if self.attn != "sdpa" and flash.missing(q) is None:
            by_token = (x.transpose(1, 2) for x in (keys, values))
            return flash.attend_slots(q, *by_token, used=self.used, scaling=scaling)
        return attend(q[:, :, None], keys, values, self.sees, scaling)[:, :, 0]

    def step(self, going: Tensor) -> None:
        """The rows that go on (B,) hold one token more."""
        self.length += going
        self.longest += 1

    def keep(self, rows: Tensor) -> None:
        """Only these slots, in this order."""
        for layer, pair in self.cache.items():
            self.cache[layer] = [x.index_select(0, rows) for x in pair]
        self.length, self.ahead = self.length[rows], self.ahead[rows]
        self.longest = int(self.length.max())


def _kernel(q: Tensor, keys: Tensor) -> Callable[..., Tensor]:
    """The native one itself where it takes these, since every layer of every token calls it."""
    try:
        if q.dtype != torch.float64 != keys.dtype:
            return native("slot_attention")
    except KernelUnavailable:
        pass  # `run` says which one it takes instead
    return partial(run, "slot_attention", "auto")


def slot_attention(
    q: Tensor,  # (B, H, d)
    k: Tensor,  # (B, K, d)
    v: Tensor,  # (B, K, d)
    keys: Tensor,  # (B, K, W, d), written in place
    values: Tensor,  # (B, K, W, d), written in place
    length: Tensor,  # (B,) int64
    scaling: float,
    *,
    impl: str = "auto",
) -> Tensor:  # (B, H, d), in the slots' dtype
    """Places k and v behind the `length` tokens that a row's slot holds, then attends to them all:
    softmax(scaling q K^T) V. What stands further on may be anything. No gradient."""
    checks.dtype("keys", keys, checks.ANY_FLOAT)
    if keys.dim() != 4 or not keys.is_contiguous():
        raise ValueError(f"keys must be (B, K, W, d) and contiguous, got {tuple(keys.shape)}")
    rows, heads, width, size = keys.shape
    checks.tensor("values", values, keys.shape, "(B, K, W, d)", (keys.dtype,), keys.device)
    if not values.is_contiguous():
        raise ValueError("values must be contiguous: they are written in place")
    checks.dtype("q", q, checks.ANY_FLOAT)
    if q.dim() != 3 or (q.shape[0], q.shape[2]) != (rows, size) or heads and q.shape[1] % heads:
        raise ValueError(
            f"q must be (B, H, d) = ({rows}, a multiple of {heads}, {size}), got {tuple(q.shape)}"
        )
    for name, new in (("k", k), ("v", v)):
        checks.tensor(name, new, (rows, heads, size), "(B, K, d)", checks.ANY_FLOAT, keys.device)
    checks.tensor("length", length, (rows,), "(B,)", (torch.int64,), keys.device)
    length = checks.integers("length", length, 0, width)
    return run("slot_attention", impl, q, k, v, keys, values, length, scaling)
