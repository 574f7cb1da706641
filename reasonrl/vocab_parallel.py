"""log p of tokens from an output head whose words are divided over ranks (tensor parallelism).

    logp = vocab_parallel_linear_logp(hidden, my_words, target, first=rank * len(my_words))

Every rank holds the same hidden states and targets and its own rows of the head. Forward: one
collective, in which a rank says four numbers a token (m_r, log S_r, H_r and, where the token's word
is its own, log p_r); all merge them in rank order, so all have the same bits:

    m = max m_r,  S = sum e^(m_r - m) S_r,  w_r = e^(m_r - m) S_r / S
    log p = (log p_r + log S_r + m_r - m) - log S,   H = sum w_r (H_r - log w_r)

(log p_r is s_y - m_r - log S_r, and no large number is ever subtracted from another.) Backward: one
sum of dX over the ranks; dW and db stay where the words are. 16 N R bytes forward, 4 N D backward.
A rank whose words all score -inf makes the row NaN, as a NaN does.
Legend: N tokens, D hidden, V words of a rank, R ranks.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from reasonrl import checks
from reasonrl.implementations import run

ELSEWHERE = torch.inf  # said for log p by ranks that do not hold the word: no log p is


def vocab_parallel_linear_logp(
    hidden: Tensor,  # (..., D), the same on every rank
    weight: Tensor,  # (V, D), words first .. first + V of the vocabulary
    target: Tensor,  # (...) int, of the whole vocabulary, the same on every rank
    *,
    first: int,
    group: Any = None,  # of ranks, the default one where None
    bias: Tensor | None = None,  # (V,)
    temperature: float = 1.0,
    softcap: float | None = None,
    entropy: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`linear_logp` of the whole head, fp32, the same on every rank and differentiable.

    All ranks call it together, and together go backward. ValueError: shapes and types as
    `linear_logp`; a target that no rank holds, by its row.
    """
    checks.dtype("hidden", hidden, checks.ANY_FLOAT)
    if hidden.dim() < 1:
        raise ValueError("hidden must be (..., D), got ()")
    shape = hidden.shape[:-1]
    checks.head(hidden, weight, bias)
    if weight.shape[0] < 1:
        raise ValueError("weight must hold at least one word of the vocabulary on every rank")
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise ValueError(f"first must be an int >= 0, got {first!r}")
    checks.tensor("target", target, shape, "(...)", checks.INTEGER, hidden.device)
    how = (*checks.scale(temperature, softcap), first, group, impl)
    rows = hidden.reshape(target.numel(), hidden.shape[-1])
    taken, ent = _Sharded.apply(rows, weight, bias, target.reshape(-1).long(), how)
    return (taken.reshape(shape), ent.reshape(shape)) if entropy else taken.reshape(shape)


class _Sharded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, target, how):
        temperature, softcap, first, group, impl = how
        own = (target >= first) & (target < first + weight.shape[0])
        local = torch.where(own, target - first, 0)
        args = (bias, temperature, softcap)
        taken, stats = run("vocab_stats", impl, hidden, weight, local, *args)
        mine = torch.where(own, taken, ELSEWHERE)
        every = _gathered(torch.stack([mine, *stats.unbind(-1)]), group)  # (R, 4, N)
        logp, whole = merged(every)
        if checks.values_checked(target) and bool((logp == ELSEWHERE).any()):
            row = int((logp == ELSEWHERE).nonzero()[0])
            raise ValueError(f"target: no rank holds word {int(target[row])} of row {row}")
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, bias, torch.where(own, local, -1), whole)
        ctx.how = how
        return logp, whole[:, 2].clone()

    @staticmethod
    def backward(ctx, g, h):  # type: ignore[override]
        hidden, weight, bias, target, whole = ctx.saved_tensors
        temperature, softcap, _, group, impl = ctx.how
        if g is None and h is None:
            return (None,) * 5
        g = torch.zeros_like(whole[:, 0]) if g is None else g
        args = (bias, temperature, softcap, whole, g, h)
        dx, dw, db = run("vocab_grads", impl, hidden, weight, target, *args)
        total = dx.to(torch.promote_types(dx.dtype, torch.float32))
        if _ranks(group) > 1:
            dist.all_reduce(total, group=group)
        return total.to(hidden.dtype), dw, db, None, None


def merged(every: Tensor) -> tuple[Tensor, Tensor]:
    """Of (R, 4, N) the whole vocabulary's log p (N,) and (max, log of the sum above it, entropy)
    (N, 3), in the type of `every`; merged in float64, in rank order."""
    taken, top, log_sum, entropy = every.double().unbind(1)  # (R, N) each
    m = top.amax(0)
    safe = torch.where(m == -torch.inf, 0.0, m)
    share = top - safe + log_sum  # log of a rank's part of S
    total = torch.logsumexp(share, 0)
    held = taken != ELSEWHERE
    logp = torch.where(held, taken + share, ELSEWHERE).amin(0) - total
    w = (share - total).exp()
    parts = torch.where(w > 0, w * (entropy - (share - total)), 0.0)
    broken = top.isnan().any(0) | total.isnan() | (total == -torch.inf)
    logp, h = (torch.where(broken, torch.nan, x) for x in (logp, parts.sum(0)))
    logp = torch.where(held.any(0), logp, ELSEWHERE)
    stats = torch.stack([torch.where(broken, torch.nan, m), total, h], -1)
    return logp.to(every.dtype), stats.to(every.dtype)


def _gathered(mine: Tensor, group: Any) -> Tensor:
    ranks = _ranks(group)
    if ranks == 1:
        return mine[None]
    every = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(every, mine.contiguous(), group=group)
    return torch.stack(every)


def _ranks(group: Any) -> int:
    known = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if known else 1
