"""Attention over packed tokens in which a group's prompt stands once.

A plan travels as a keyword argument through any transformers decoder whose attention goes through
`ALL_ATTENTION_FUNCTIONS`; the layers themselves stay transformers' own. Two plans:

* `Packed`: [prompt | completion 1 | completion 2 | ...] per group, L tokens in all. A completion
  attends to its prompt and to itself, never to a sibling. Exact: the same numbers as G separate
  sequences, for P + G*R instead of G*(P+R) tokens.
* `slots.Slots`: one new token for each of B rows, keys and values kept in a static cache.

Left out: sliding windows, attention sinks and dropout, which are refused rather than ignored.
Shapes: H query heads, K key/value heads, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from reasonrl import calls, checks, flash, places
from reasonrl.implementations import run
from reasonrl.records import InputError
from reasonrl.watchdog import beat

NAME = "reasonrl"
KINDS = ("auto", "flash", "sdpa")
SMALL = 1 << 24  # score elements up to which the plain path keeps its fp32 scores (64 MiB)


def attention(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """transformers' attention signature: q (1, H, L, d), k and v (1, K, L, d) -> (1, L, H, d)."""
    beat()
    plan = kwargs.get("plan")
    if plan is None:
        raise ValueError("the 'reasonrl' attention needs plan=, got none")
    for option in ("sliding_window", "softcap", "s_aux"):
        if kwargs.get(option) is not None:
            raise ValueError(f"attention option {option} is not supported by the packed path")
    if dropout:
        raise ValueError(f"attention dropout must be 0 in the packed path, got {dropout}")
    return plan.attend(module.layer_idx, query[0], key[0], value[0], scaling)[None], None


class Packed:
    """The plan of one packed micro-batch; index tensors are made once and used by every layer.

    attn: `flash` (kernels without padding, `flash.py`), `sdpa` (blocks padded to the longest, with
    a mask), `auto`: flash where its kernels can run.
    """

    def __init__(
        self,
        layout: Sequence[tuple[int, int, Sequence[int]]],
        device,
        keep: bool = False,
        attn: str = "auto",
    ):
        self.cache: dict[int, tuple[Tensor, Tensor]] | None = {} if keep else None
        self.layout, self.device, self.attn = layout, device, attn

    @property
    def prompts(self) -> Tensor:
        """Positions of the prompts' tokens in the packing."""
        runs = [torch.arange(start, start + n) for start, n, _ in self.layout]
        return torch.cat(runs).to(self.device)

    @cached_property
    def spans(self) -> flash.Spans:
        return flash.spans(self.layout, self.device)

    @cached_property
    def calls(self) -> calls.Calls:
        return calls.calls(self.layout, self.device)

    @cached_property
    def blocks(self) -> Blocks:
        return Blocks(self.layout, self.device)

    @cached_property
    def places(self) -> Tensor:
        return places.packing(self.layout)

    def by_blocks(self) -> bool:
        """Whether it is a CPU's, and nothing is kept."""
        on_a_cpu = torch.device(self.device).type == "cpu"
        return self.cache is None and self.attn != "flash" and on_a_cpu

    def by_flash(self, dtype: torch.dtype, size: int) -> bool:
        """Whether heads of that size and type go by flash kernels here, and nothing is kept."""
        device = torch.device(self.device)
        known = self.cache is None and self.attn != "sdpa" and device.type == "cuda"
        return known and dtype in flash.HALF and flash.unfit(size, device) is None

    def keep(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Of k and v (L, K, d) those of the prompts, where they are to be kept."""
        if self.cache is not None:
            prompts = self.blocks.prompt, self.blocks.shape[0]
            self.cache[layer] = _blocks(k, *prompts), _blocks(v, *prompts)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q (H, L, d), k and v (K, L, d) -> (L, H, d)."""
        q, k, v = (x.to(v.dtype).transpose(0, 1) for x in (q, k, v))  # (L, heads, d)
        self.keep(layer, k, v)
        missing = "" if self.attn == "sdpa" else flash.missing(q)
        if missing is None:
            return flash.attend(q, k, v, self.spans, scaling)
        if self.attn == "flash":
            raise InputError(f"attn: flash needs {missing}")
        return self.blocks.attend(q, k, v, scaling)


class Blocks:
    """A packing as blocks padded to the longest prompt and the longest completion, with masks."""

    def __init__(self, layout: Sequence[tuple[int, int, Sequence[int]]], device):
        prompts = [range(start, start + length) for start, length, _ in layout]
        rows, owner, at = [], [], 0
        for g, (start, length, lengths) in enumerate(layout):
            at = start + length
            for n in filter(None, lengths):
                rows.append(range(at, at + n))
                owner.append(g)
                at += n
        p_len, r_len = [len(p) for p in prompts], [len(r) for r in rows]
        p_max, r_max = max(p_len, default=0), max(r_len, default=0)
        self.shape = (len(prompts), p_max), (len(rows), r_max)
        self.prompt = _padded(prompts, p_max, device)  # (P * Pmax,), position in the packing
        self.rows = _padded(rows, r_max, device)  # (B * Rmax,)
        self.owner = torch.tensor(owner, dtype=torch.long, device=device)
        self.home = _home(
            prompts, rows, p_max, r_max, device
        )  # (L,), where position l was computed
        self.causal = torch.ones(p_max, p_max, dtype=torch.bool, device=device).tril()[None, None]
        columns = torch.arange(p_max, device=device)
        seen = columns < torch.tensor(p_len, device=device)[:, None]  # (P, Pmax)
        if rows:
            own = torch.ones(r_max, r_max, dtype=torch.bool, device=device).tril()
            seen = seen[self.owner][:, None, None, :].expand(-1, 1, r_max, -1)
            self.sees = torch.cat([seen, own.expand(len(rows), 1, -1, -1)], dim=-1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
        """q (L, H, d), k and v (L, K, d) -> (L, H, d)."""
        qp, kp, vp = (_blocks(x, self.prompt, self.shape[0]) for x in (q, k, v))
        out = attend(qp, kp, vp, self.causal, scaling)
        out = out.transpose(1, 2).flatten(0, 1)
        if len(self.owner):
            qr, kr, vr = (_blocks(x, self.rows, self.shape[1]) for x in (q, k, v))
            kr = torch.cat([kp.index_select(0, self.owner), kr], dim=2)
            vr = torch.cat([vp.index_select(0, self.owner), vr], dim=2)
            o = attend(qr, kr, vr, self.sees, scaling)
            out = torch.cat([out, o.transpose(1, 2).flatten(0, 1)])
        return out.index_select(0, self.home)


def attend(q: Tensor, k: Tensor, v: Tensor, sees: Tensor, scaling: float) -> Tensor:
    """softmax(scaling * q k^T where seen) v: q (B, H, R, d), k and v (B, K, S, d) -> (B, H, R, d).

    Short rows on a CPU take three plain matrix products: the flash backward of torch 2.13 costs
    about 7x more there (RL completions of tens of tokens). Everything else is SDPA.
    """
    scores = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if q.device.type != "cpu" or scores > SMALL:
        gqa = q.shape[1] != k.shape[1]
        if gqa and q.shape[2] == 1:  # the heads of one key head as rows: the kernels know no groups
            rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
            out = scaled_dot_product_attention(rows, k, v, attn_mask=sees, scale=scaling)
            return out.reshape(q.shape)
        return scaled_dot_product_attention(q, k, v, attn_mask=sees, scale=scaling, enable_gqa=gqa)
    b, h, r, d = q.shape
    heads = k.shape[1]
    q = q.reshape(b, heads, h // heads * r, d)  # query heads of one key head stand together
    p = masked_softmax(q @ k.transpose(-1, -2), sees, scaling)
    return (p @ v).view(b, h, r, d)


def masked_softmax(
    scores: Tensor,  # (B, K, N, S), overwritten
    sees: Tensor,  # (B or 1, 1, R, S) bool, something in every row; N is a multiple of R
    scaling: float,
    *,
    impl: str = "auto",
) -> Tensor:  # (B, K, N, S)
    """softmax(scaling * scores where seen), the rows of N taking those of `sees` in turn: fp32
    inside, the scores' dtype outside, and nothing but the result kept for the gradient."""
    checks.dtype("scores", scores, checks.ANY_FLOAT)
    if scores.dim() != 4 or not scores.is_contiguous():
        raise ValueError(f"scores must be (B, K, N, S), contiguous, got {tuple(scores.shape)}")
    rows, _, queries, width = scores.shape
    batch, one, each, _ = sees.shape if sees.dim() == 4 else (0, 0, 0, 0)
    if batch not in (1, rows) or one != 1 or not each or queries % each:
        wanted = f"({rows} or 1, 1, a divisor of {queries}, {width})"
        raise ValueError(f"sees must be (B or 1, 1, R, S) = {wanted}, got {tuple(sees.shape)}")
    shape = (batch, 1, each, width)
    checks.tensor("sees", sees, shape, "(B or 1, 1, R, S)", (torch.bool,), scores.device)
    return run("masked_softmax", impl, scores, sees, scaling)


def _blocks(x: Tensor, at: Tensor, shape: tuple[int, int]) -> Tensor:
    """(L, heads, d) -> (rows, heads, width, d), right-padded with copies nobody attends to."""
    return x.index_select(0, at).unflatten(0, shape).transpose(1, 2)


def _padded(spans: Sequence[range], width: int, device) -> Tensor:
    # an empty prompt may stand at the very end, where there is no token
    rows = [i for s in spans for i in [*s, *([s.start if len(s) else 0] * (width - len(s)))]]
    return torch.tensor(rows, dtype=torch.long, device=device)


def _home(prompts, rows, p_max: int, r_max: int, device) -> Tensor:
    at = [(pos, g * p_max + i) for g, s in enumerate(prompts) for i, pos in enumerate(s)]
    base = len(prompts) * p_max
    at += [(pos, base + b * r_max + i) for b, s in enumerate(rows) for i, pos in enumerate(s)]
    return torch.tensor([slot for _, slot in sorted(at)], dtype=torch.long, device=device)
