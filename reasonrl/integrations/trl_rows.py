"""TRL's rows as ours: problems, rollouts, and where its run stands.

    rollout_of(inputs, completion_ids, tokenizer, group=8)    # a scorer takes it

A group's completions stand next to each other, as TRL's sampler lays them, but one process may hold
a part of it. A row's `plain_prompt` is its prompt without a motivation (trl_merf.py): scorers and
reward functions are asked about that one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from reasonrl.records import Problem, Rollout
from reasonrl.segment import decode, pieces

PLAIN = "plain_prompt"


@dataclass(frozen=True)
class Picture:
    """A picture of a data set, as a problem carries it."""

    image: Any = field(compare=False)

    @property
    def key(self) -> str:
        shape = f"{self.image.mode} {self.image.size} ".encode()
        return hashlib.blake2b(shape + self.image.tobytes(), digest_size=8).hexdigest()

    def draw(self) -> Any:
        return self.image.convert("RGB")


def problem_of(name: str, row: Mapping[str, Any]) -> Problem:
    """A row as a problem; what TRL or we do not know of stays in `extra`."""
    rest = dict(row)
    prompt = rest.pop("prompt")
    answer = rest.pop("answer", None)
    seen = rest.pop("images", None) or [rest.pop("image", None)]
    return Problem(
        name,
        rest.pop(PLAIN, prompt),
        None if answer is None else str(answer),
        images=tuple(x if isinstance(x, str) else Picture(x) for x in seen if x is not None),
        extra=rest,
    )


def rollout_of(
    rows: Sequence[Mapping[str, Any]],
    completion_ids: Sequence[Sequence[int]],
    tokenizer: Any,
    group: int,
    first: int = 0,  # number of the first row among those of all processes
    prompt_ids: Sequence[Sequence[int]] | None = None,  # of every row
) -> Rollout:
    """The completions of this process."""
    place = [(first + b) // group - first // group for b in range(len(rows))]
    heads = [b for b in range(len(rows)) if not b or place[b] != place[b - 1]]
    ids = [list(row) for row in completion_ids]
    text = [decode(tokenizer, row) for row in ids]
    return Rollout(
        problems=[problem_of(str(g), rows[b]) for g, b in enumerate(heads)],
        prompt_ids=[() if prompt_ids is None else prompt_ids[b] for b in heads],
        group=torch.tensor(place, dtype=torch.int64),
        completion_ids=ids,
        text=text,
        finished=[bool(row) and row[-1] == tokenizer.eos_token_id for row in ids],
        logp=[torch.zeros(len(row)) for row in ids],
        pieces=[pieces(tokenizer, row, t) for row, t in zip(ids, text, strict=True)],
    )


def tokenizer_of(trainer: Any) -> Any:
    """The tokenizer, of a processor its own."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def clock(trainer: Any) -> tuple[int, int]:
    """The optimiser step under way, from 1, and how many there will be (0 before training)."""
    return trainer.state.global_step + 1, trainer.state.max_steps
