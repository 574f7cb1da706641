"""What a scorer says of a completion as one reward for every token, the form dense trainers take.

A step's reward stands at its last token, so that returns spread it backwards; token rewards pass
through. A step whose reward is unknown makes its completion NaN, which the caller leaves out of the
group's statistics. Left out: advantages (`reasonrl.advantage`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from reasonrl import ops
from reasonrl.records import Rewards, Rollout
from reasonrl.segment import token_steps


def token_rewards(rewards: Rewards, rollout: Rollout) -> tuple[list[Tensor], list[list[float]]]:
    """B x (T_b,) token rewards, and B x S_b step rewards as a table shows them.

    ValueError where the scorer gave outcomes only.
    """
    if rewards.token is not None:
        return list(rewards.token), [[float(t.sum())] for t in rewards.token]
    if rewards.steps is None:
        raise ValueError("scorer: expected step or token rewards, got outcomes only")
    tokens, shown = [], []
    for steps, at in zip(rewards.steps, rollout.pieces, strict=True):
        nan = float("nan")
        values = [nan if step.reward is None else step.reward for step in steps]
        place = torch.tensor(token_steps(steps, at), dtype=torch.long)
        tokens.append(ops.step_expand(torch.tensor(values), place, where="last"))
        shown.append(values)
    return tokens, shown


def known(rewards: Rewards, tokens: list[Tensor]) -> Tensor:
    """(B,) bool: completions that were scored, every step of them."""
    scored = torch.tensor([s.kind == "scored" for s in rewards.outcome], dtype=torch.bool)
    return scored & torch.tensor([bool(t.isfinite().all()) for t in tokens], dtype=torch.bool)
