"""Numbers that are not finite, put into one place of a training step: the table, and one step.

logit: the hidden state that predicts a token.  ref, old: the reference's and the sampling policy's
log-probability of a token.  reward: the credit of a token.  gradient: of one parameter.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import distributed_worker as worker
import torch
from accelerate import Accelerator
from torch import Tensor

from reasonrl import models
from reasonrl.loss import NAMED, LossSpec
from reasonrl.models import Policy
from reasonrl.update import Learner

VALUES = (math.nan, math.inf, -math.inf)
TOKENS = ("logit", "ref", "old", "reward")  # what makes one token unusable
PLACES = (*TOKENS, "gradient")
TOKEN = 6  # of the rank's tokens: inside the first group


@dataclass(frozen=True)
class Bad:
    """One injection; rank None: there is one process."""

    loss: str
    place: str
    value: float
    rank: int | None = None


ALONE = [Bad(*row) for row in product(NAMED, PLACES, VALUES)]
RANKS = [Bad(*row) for row in product(("dapo", "gspo"), PLACES, VALUES, (0, 1))]


@cache
def policies() -> list[tuple[Policy, dict[str, Tensor]]]:
    """A policy and a reference with their first weights: made once, they take most of the time."""
    made = [models.load("tiny", dtype="fp32", seed=s, width=32, layers=2, heads=2) for s in (1, 2)]
    return [(p, {k: v.clone() for k, v in p.model.state_dict().items()}) for p in made]


def learner(case: worker.Case, accelerator: Accelerator) -> Learner:
    """A learner of the first weights."""
    (policy, first), (reference, _) = policies()
    policy.model.load_state_dict(first)
    config = worker.small("batch.tokens=4096", "optim.eps=1e-5")
    made = Learner(policy, config, accelerator)
    made.reference = reference if case.kl else None
    return made


@dataclass
class Done:
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    metrics: dict[str, float]
    skipped: int


def step(bad: Bad | None, loss: str, accelerator: Accelerator, quiet_token: bool = False) -> Done:
    """One step with the injection, or without one; quiet_token: the token has no credit."""
    rank, world = accelerator.process_index, accelerator.num_processes
    here = bad is not None and bad.rank in (None, rank)
    case = worker.Case(loss, tokens=4096, kl=0.5 if bad is not None and bad.place == "ref" else 0.0)
    made = learner(case, accelerator)
    rollout, advantage = worker.dealt(case, rank, world, made.policy)
    logp = list(made.logp(rollout, made.policy).split([len(c) for c in rollout.completion_ids]))
    if quiet_token:
        advantage[TOKEN] = 0.0
    if bad is not None and bad.place == "reward" and here:
        advantage[TOKEN] = bad.value
    if bad is not None and bad.place == "old":  # on every rank: an old policy wrote the rollout
        flat = torch.cat(logp)
        flat[TOKEN] = bad.value if here else flat[TOKEN]
        rollout = replace(rollout, stale=True, logp=flat.split([len(part) for part in logp]))
    extra = {"max_length": 12} if loss == "dr_grpo" else {}
    spec = LossSpec.named(loss, kl_coef=case.kl, **extra)
    before = worker.snapshot(made)
    with poisoned(bad if here else None, made):
        metrics = made.step(rollout, advantage, spec, 1e-3)
    done = Done(before, worker.snapshot(made), metrics, made.skipped)
    accelerator._models.clear()  # as free_memory does, without a collection each time
    accelerator._optimizers.clear()
    return done


@contextlib.contextmanager
def poisoned(bad: Bad | None, made: Learner) -> Iterator[None]:
    """Inside it the learner's policy, reference or gradient holds the bad value."""
    hook = None
    if bad is not None and bad.place == "gradient":
        parameter, value = next(iter(made.policy.model.parameters())), bad.value
        hook = parameter.register_hook(lambda grad: grad.index_fill(0, torch.tensor([0]), value))
    target = {"logit": made.policy, "ref": made.reference}.get(bad.place if bad else "")
    original = Policy.at_head

    def at_head(self: Policy, batch, function: Callable):
        if bad is None or self is not target:
            return original(self, batch, function)

        def changed(hidden: Tensor, head):
            rows = torch.arange(len(hidden))[:, None] == TOKEN
            return function(hidden.masked_fill(rows, bad.value), head)

        return original(self, batch, changed)

    Policy.at_head = at_head
    try:
        yield
    finally:
        Policy.at_head = original
        if hook is not None:
            hook.remove()


def ranks(accelerator: Accelerator) -> list[dict]:
    """What this rank saw of every injection into one rank of two."""
    out = []
    for bad in RANKS:
        done = step(bad, bad.loss, accelerator)
        out.append(vars(done))
    return out
