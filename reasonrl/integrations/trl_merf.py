"""MeRF in TRL's trainer: training prompts that say how they are graded, by the object that grades.

    told = Motivation(spec=task.reward_spec())
    GRPOTrainer(..., reward_funcs=spec_reward(told.spec), motivation=told)   # while it trains, or
    GRPOTrainer(..., reward_funcs=spec_reward(told.spec), train_dataset=told.map(rows))     # before

Messages get a system turn (or their own is extended), a text the words in front of it. A group is
one row, so all of it is told or none (arXiv 2506.18485 never mixes them). The trainer leaves
evaluation prompts as they are; `map` is for the training rows alone. Only with `motivation=` can
the share move with the steps (`motivated_end`), since rows are mapped before the run. What the row
said stays in its column `plain_prompt`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reasonrl.algos.merf import Telling
from reasonrl.integrations.trl_rows import PLAIN, clock
from reasonrl.prompts import plain, with_system
from reasonrl.records import InputError
from reasonrl.reward_spec import RewardSpec


@dataclass(frozen=True)
class Motivation(Telling):
    """The words of a spec and whom they are told; variant, text and share as in `Merf`."""

    spec: RewardSpec = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.spec, RewardSpec):
            raise InputError(f"spec: expected a RewardSpec, got {type(self.spec).__name__}")
        self.words(self.spec)  # a spec without a short form is refused before the run

    def map(self, dataset: Any) -> Any:
        """A data set of TRL's, its prompts told; ValueError for more than one split."""
        if self.motivated_end is not None:
            raise ValueError(
                "motivated_end: a share that moves needs GRPOTrainer(motivation=...), rows are"
                " mapped before the run"
            )
        if isinstance(dataset, Mapping):
            known = ", ".join(map(str, dataset))
            raise ValueError(f"dataset: expected one split to train on, got several ({known})")
        return dataset.map(self.row)

    def row(self, row: Mapping[str, Any], step: int = 0, steps: int = 0) -> dict[str, Any]:
        """A row at a step of the run; InputError where it was told before."""
        if PLAIN in row:
            raise InputError(f"prompt: it has been told already (the row has a {PLAIN})")
        prompt = row["prompt"]
        told = self._told(prompt) if self.tells(plain(prompt), step, steps) else prompt
        return {**row, "prompt": told, PLAIN: prompt}

    def rows(self, trainer: Any, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The rows of one generation, which TRL's metrics count."""
        told = [self.row(row, *clock(trainer)) for row in rows]
        share = sum(row["prompt"] != row[PLAIN] for row in told) / len(told)
        trainer._log_metric("process/motivated", share)  # its mean over all processes
        return told

    def _told(self, prompt: Any) -> Any:
        words = self.words(self.spec)
        if isinstance(prompt, str):
            return f"{words}\n{prompt}"
        head, *rest = with_system(prompt, words)
        if any(not isinstance(message["content"], str) for message in prompt):
            head = {**head, "content": [{"type": "text", "text": head["content"]}]}  # one type
        return [head, *rest]
