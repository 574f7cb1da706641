"""What the examples share: a tiny model, one group of completions, credit for every token, a loss.

A real run samples and scores; here completions are random characters, and a digit is worth 1.
"""

import torch
from torch.nn.functional import pad

import reasonrl as rr
from reasonrl import heads, tiny

SPEC = rr.LossSpec.named("dapo")
GROUP, LENGTH, STEPS, RATE = 8, 16, 12, 3e-3


def model() -> torch.nn.Module:
    made = tiny.build(seed=0, width=64, layers=2, heads=4)[0]
    heads.attach(made)  # model(..., head_call=f) = f(last hidden states, head), whatever wraps it
    return made


def batch(model: torch.nn.Module, rank: int = 0) -> dict[str, torch.Tensor]:
    """ids, mask, advantage and old_logp, each (B, T)."""
    made = torch.Generator().manual_seed(rank)
    ids = torch.randint(5, 99, (GROUP, LENGTH), generator=made)
    mask = torch.arange(LENGTH) < torch.randint(4, LENGTH, (GROUP, 1), generator=made)
    reward = ((ids >= 21) & (ids < 31)).float()  # the characters 0 to 9
    advantage = rr.prime_advantage(reward, torch.zeros(GROUP), torch.zeros(GROUP).long(), mask=mask)
    with torch.no_grad():
        old = model(input_ids=pad(ids, (1, 0), value=1), head_call=lambda hidden, head: (
            rr.linear_logp(hidden[:, :-1], head.weight, ids)))  # fmt: skip
    return {"ids": ids, "mask": mask, "advantage": advantage, "old_logp": old}


def loss(model: torch.nn.Module, b: dict[str, torch.Tensor], denominator=None) -> torch.Tensor:
    """Hidden states to the loss in one pass, no logits; denominator: tokens of all ranks."""
    return model(input_ids=pad(b["ids"], (1, 0), value=1), head_call=lambda hidden, head: (
        rr.linear_policy_loss(hidden[:, :-1], head.weight, b["ids"], b["old_logp"], b["advantage"],
                              SPEC, mask=b["mask"], denominator=denominator).loss))  # fmt: skip
