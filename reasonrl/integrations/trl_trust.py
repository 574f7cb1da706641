"""Trust-GRPO in TRL's trainer: outcomes from its reward functions, thinking from a scorer of ours.

    GRPOTrainer(..., reward_funcs=math_reward(), thinking=ThinkingScorer(PRMScorer("prm", alpha=0)))
    GRPOTrainer(..., thinking=scorer, trust=Trust(alpha=0.3, score_wrong=False))     # released code

TRL's weighted sum of its reward functions is the outcome (arXiv 2505.17018 puts it in [0, 1] and
calls 0.5 right). What the thinking adds stands beside them as one more function, `thinking`, so
TRL's statistics of the reward hold; step and T of the annealing are TRL's. Groups are put together
over all processes first. The advantage is `ops.trust_advantage`'s (`scale_rewards` "none": without
its std); with "batch" TRL normalises the same rewards. An evaluation counts outcomes alone and asks
nobody. Left out: `normalize_then_sum`, which would give the thinking a scale of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from reasonrl.algos.sophia import Paid, Trust
from reasonrl.batch import rows_of
from reasonrl.integrations.trl_rows import clock, rollout_of, tokenizer_of
from reasonrl.records import Rewards, Rollout, Score

ThinkingOf = Callable[[Rollout], Sequence[Score] | Rewards]
KIND = {"group": "grpo", "none": "dr_grpo"}  # what TRL's scale_rewards is called here


def thinking(completions: Sequence[Any], **_: Any) -> list[None]:
    """The place of the thinking among TRL's reward functions; `Thinking.pay` fills it in."""
    return [None] * len(completions)


class Thinking:
    """What a trainer needs to pay for thinking; made when the trainer is."""

    def __init__(self, trainer: Any, scorer: ThinkingOf, trust: Trust):
        if not callable(scorer):
            raise ValueError(f"thinking: expected a scorer, got {type(scorer).__name__}")
        if not isinstance(trust, Trust):
            raise ValueError(f"trust: expected a Trust, got {type(trust).__name__}")
        how = trainer.multi_objective_aggregation
        if how != "sum_then_normalize":
            raise ValueError(
                f"multi_objective_aggregation: thinking needs 'sum_then_normalize', got {how!r}"
            )
        self.scorer, self.trust = scorer, trust
        self.paid: Paid | None = None  # of the completions under way
        trainer.reward_funcs = [*trainer.reward_funcs, thinking]
        trainer.reward_func_names = [*trainer.reward_func_names, "thinking"]
        trainer.reward_processing_classes = [*trainer.reward_processing_classes, None]
        trainer.reward_weights = torch.cat([trainer.reward_weights, torch.ones(1)])

    def pay(self, trainer: Any, rows: Sequence[Any], ids: Sequence[Any], found: Tensor) -> Tensor:
        """TRL's rewards of all processes (B, functions), with those of the thinking."""
        self.paid = None
        if not trainer.model.training:
            self._show(trainer, [None] * len(found), [None] * len(found))
            return found
        given = found[:, :-1].cpu()
        known = ~given.isnan().all(1)
        outcome = (given * trainer.reward_weights[:-1].cpu()).nansum(1)  # as TRL sums them
        first = trainer.accelerator.process_index * len(rows)
        own = slice(first, first + len(rows))
        size = trainer.num_generations
        rollout = rollout_of(rows, ids, tokenizer_of(trainer), size, first)
        asked = self.trust.asked(outcome[own], known[own])
        scores: list[Score | None] = [None] * len(rows)
        for b, score in zip(asked, self._ask(rows_of(rollout, asked)), strict=True):
            scores[b] = score
        scores = gather_object(scores)
        group = torch.arange(len(outcome)) // size
        kind = KIND.get(trainer.scale_rewards, "grpo")
        paid = self.trust.pay(outcome, known, scores, group, *clock(trainer), kind=kind)
        for name, value in paid.metrics.items():
            trainer._metrics["train"][name].append(value)
        self._show(trainer, [s and s.value for s in scores], paid.gamma.tolist())
        self.paid = paid
        return torch.cat([found[:, :-1], (paid.reward - outcome).to(found)[:, None]], 1)

    def advantages(self, trainer: Any, theirs: Tensor) -> Tensor:
        """(B,) of this process, in the place of TRL's; its table of completions gets them too."""
        if self.paid is None or trainer.scale_rewards not in KIND:
            return theirs
        own = self.paid.advantage
        trainer._logs["advantages"].extend(own.tolist())  # a table of one generation: TRL's go
        first = trainer.accelerator.process_index * len(theirs)
        return own[first : first + len(theirs)].to(theirs)

    def _ask(self, rollout: Rollout) -> Sequence[Score]:
        count = len(rollout.text)
        found = self.scorer(rollout) if count else ()
        scores = found.outcome if isinstance(found, Rewards) else found
        if len(scores) != count:
            raise ValueError(f"thinking: the scorer must give {count} scores, got {len(scores)}")
        wrong = next((s for s in scores if not isinstance(s, Score)), None)
        if wrong is not None:
            raise ValueError(f"thinking: the scorer must give Scores, got {type(wrong).__name__}")
        return scores

    def _show(self, trainer: Any, scores: Sequence[Any], gamma: Sequence[Any]) -> None:
        trainer._logs["extra"]["thinking"].extend(scores)
        trainer._logs["extra"]["gamma"].extend(gamma)
