"""One token a row from its logits, and the random numbers that choose it.

Every completion has a stream of its own, made from (seed, row), so a text does not depend on its
neighbours' lengths. Legend: B rows (completions), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from reasonrl.implementations import native
from reasonrl.records import KernelUnavailable

# logits (B, V), uniform (B,), temperature -> token, logp (B,)
Draw = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BLOCK = 256  # vocabulary entries summed together by the two-level inverse transform


@dataclass(frozen=True)
class Sampling:
    """temperature 0 is greedy; top_k 0 and top_p 1 leave the distribution whole."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    @property
    def truncates(self) -> bool:
        return self.temperature > 0 and (self.top_p < 1 or self.top_k > 0)


def streams(seed: int, first_row: int, rows: int, tokens: int) -> Tensor:
    """(rows, tokens) float64 in [0, 1): one independent stream a row."""
    out = torch.empty(rows, tokens, dtype=torch.float64)
    generator = torch.Generator()
    for b, row in enumerate(out.unbind(), first_row):
        generator.manual_seed(own_seed(seed, b))
        row.uniform_(generator=generator)
    return out


def own_seed(seed: int, row: int, bits: int = 63) -> int:
    """Splitmix64 of the pair, so that neighbouring seeds give unrelated streams."""
    z = (seed * 0x9E3779B97F4A7C15 + row * 0xD1342543DE82EF95 + 1) & (2**64 - 1)
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return z >> (64 - bits)


def choose(
    logits: Tensor, uniform: Tensor, sampling: Sampling, kernel: Draw | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """One token a row: logits (B, V), uniform (B,) -> token, logp, logp as sampled, all (B,).
    kernel: draws where nothing is truncated; None: one of ours on a CPU, plain torch elsewhere."""
    whole = sampling.temperature > 0 and not sampling.truncates and _drawn(logits)
    if whole and (draw := kernel or _native(logits)):
        token, logp = draw(logits, uniform.contiguous(), sampling.temperature)
        return token, logp, logp
    scores = logits.float()
    if sampling.temperature not in (0.0, 1.0):
        scores = scores / sampling.temperature
    top = scores.amax(-1, keepdim=True)
    if sampling.temperature == 0:
        token = scores.argmax(-1)
        logp = (scores.gather(-1, token[:, None]) - scores.logsumexp(-1, keepdim=True))[:, 0]
        return token, logp, torch.zeros_like(logp)
    mine = scores is not logits  # and may be written into
    weight = (scores.sub_(top) if mine else scores - top).exp_()
    total = weight.sum(-1)
    kept = _truncate(weight, total, sampling)
    token, mass = _inverse(kept, uniform)
    picked = weight.gather(-1, token[:, None])[:, 0].log()
    return token, picked - total.log(), picked - mass.log()


def _native(logits: Tensor) -> Draw | None:
    """The kernel for such logits, where there is one."""
    return _kernel() if logits.is_cpu else None


def _drawn(logits: Tensor) -> bool:
    """Whether kernels draw from such logits."""
    return type(logits) is Tensor and logits.dtype in DTYPES and logits.is_contiguous()


@cache
def _kernel() -> Draw | None:
    try:
        return native("draw")
    except KernelUnavailable:
        return None


def _truncate(weight: Tensor, total: Tensor, sampling: Sampling) -> Tensor:
    """Weights outside the top k, or outside the smallest set of mass top_p, become 0."""
    kept = weight
    if 0 < sampling.top_k < weight.shape[-1]:
        floor = weight.topk(sampling.top_k, dim=-1).values[:, -1:]
        kept = kept.where(kept >= floor, 0)
        total = kept.sum(-1)
    if sampling.top_p < 1:
        ordered = kept.sort(-1, descending=True).values
        before = ordered.cumsum(-1) - ordered
        inside = before < sampling.top_p * total[:, None]  # the first is always inside
        floor = ordered.where(inside, torch.inf).amin(-1, keepdim=True)
        kept = kept.where(kept >= floor, 0)
    return kept


def _inverse(weight: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Inverse transform in two levels: the block by its mass, then the entry inside it."""
    rows, vocabulary = weight.shape
    odd = vocabulary % BLOCK  # a padding of nothing would still copy
    padded = torch.nn.functional.pad(weight, (0, BLOCK - odd)) if odd else weight
    blocks = padded.view(rows, -1, BLOCK)
    mass = blocks.sum(-1).double()
    ends = mass.cumsum(-1)
    aim = uniform[:, None] * ends[:, -1:]
    block = _first(ends, mass, aim)
    before = torch.nn.functional.pad(ends, (1, 0)).gather(1, block)
    inner = blocks.gather(1, block[:, :, None].expand(-1, 1, BLOCK))[:, 0].double()
    at = _first(inner.cumsum(-1), inner, aim - before)
    return (block * BLOCK + at)[:, 0], ends[:, -1].float()


def _first(ends: Tensor, mass: Tensor, aim: Tensor) -> Tensor:
    """(B, N), (B, N), (B, 1) -> (B, 1): the first entry of any mass whose end passes the aim, or
    where rounding aims past them all the last of any mass. A GPU's scan is a tree, whose ends may
    fall by a rounding, and rise where there is no mass."""
    columns, some = torch.arange(ends.shape[1], device=ends.device), mass > 0
    last = columns.where(some, 0).amax(-1, keepdim=True)
    past = columns.where(some & (ends > aim), ends.shape[1]).amin(-1, keepdim=True)
    return torch.minimum(past, last)
