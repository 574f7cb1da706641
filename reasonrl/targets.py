"""The trajectory-aware targets of ReasonFlux-PRM, as pure functions of numbers and texts.

A trace has thinking steps s_1..s_T and a response in steps a_1..a_M (arXiv 2506.18896, section 3).
Three scores a step, mixed by `systems.reasonflux_step_target`:

    align_t      cos(s_t, a_t); where the response is much shorter, max_j cos(s_t, a_j)
    quality_t    a judge's number (quality.py)
    coherence_t  how much nearer s_t is to s_{t-1} than steps of unrelated traces are; s_0 is the
                 question: log[ exp(cos(s_{t-1}, s_t)/tau) / sum over it and the others ]

The paper leaves the denominator, tau and the scale open: the step itself stands in the denominator
here, so that exp of it lies in (0, 1]. Raw logs nearly drop out of the softmax over the scores.
Left out: who embeds the texts (encoder.py). T steps, M response steps, D wide, K others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

Coherence = Literal["cosine", "infonce", "log"]


def match(steps: Sequence[str], response: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """Steps and response steps of equal number, and True; or, where M < T / 2, both as they were
    and False.

    Surplus steps are merged into the one before them (the authors' answer), on either side.
    """
    if not steps or not response:
        raise ValueError(f"expected some steps and a response, got {len(steps)}, {len(response)}")
    if 2 * len(response) < len(steps):
        return list(steps), list(response), False
    count = min(len(steps), len(response))
    return _merged(steps, count), _merged(response, count), True


def alignment(
    steps: Tensor,  # (T, D)
    response: Tensor,  # (M, D)
    paired: bool,
) -> Tensor:  # (T,) in [-1, 1]
    """cos(s_t, a_t), or the largest over the response's steps."""
    own, other = _unit(steps), _unit(response)
    if paired:
        if own.shape != other.shape:
            raise ValueError(f"response must be {tuple(own.shape)}, got {tuple(other.shape)}")
        return (own * other).sum(-1)
    return (own @ other.T).amax(-1)


def neighbours(
    question: Tensor,  # (D,)
    steps: Tensor,  # (T, D)
    others: Tensor,  # (K, D) steps of unrelated traces
) -> tuple[Tensor, Tensor]:  # (T,) and (T, K)
    """cos(s_{t-1}, s_t), and cos(s_{t-1}, s') of every other step; s_0 is the question."""
    own = _unit(steps)
    before = torch.cat([_unit(question[None]), own[:-1]])
    return (before * own).sum(-1), before @ _unit(others).T


def coherence(
    positive: Tensor,  # (T,) cosines
    others: Tensor,  # (T, K)
    *,
    how: Coherence = "cosine",
    tau: float = 0.1,
) -> Tensor:  # (T,)
    """`cosine`: (1 + cos) / 2. `log`: the log above, at most 0. `infonce`: exp of it."""
    if how not in get_args(Coherence):
        raise ValueError(f"how must be one of {', '.join(get_args(Coherence))}, got {how!r}")
    if how == "cosine":
        return (1 + positive) / 2
    if not tau > 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    if others.shape[:1] != positive.shape or not others.shape[-1]:
        raise ValueError(f"others must be ({len(positive)}, K >= 1), got {tuple(others.shape)}")
    every = torch.cat([positive[:, None], others], -1) / tau
    log = positive / tau - every.logsumexp(-1)
    return log if how == "log" else log.exp()


def _merged(parts: Sequence[str], count: int) -> list[str]:
    return [*parts[: count - 1], "".join(parts[count - 1 :])]


def _unit(x: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x.double(), dim=-1)
