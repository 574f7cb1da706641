"""MeRF: the policy is told its reward in the prompt; reward and GRPO stay as they are.

arXiv 2506.18485. The motivation text is rendered from the same `RewardSpec` that grades, so the two
cannot drift. All completions of a group see the same prompt, and so do the sampling, the loss, the
old and the reference log-probabilities; evaluation uses the plain prompt, and reports the
motivated one beside it. `motivated` and `motivated_end` are the share of prompts that carry the
text at the first and the last step (linear between); a hash of the problem decides which ones.
Variants: full, score (numbers without conditions), correctness_only (the suboptimal one),
adverse (every value negated). `text`: words, or the spec's short line for models of single
characters, which read only what their cold start taught them (tasks/marks.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from reasonrl.algos.base import GRPO
from reasonrl.prompts import render
from reasonrl.records import InputError, Problem
from reasonrl.tasks.base import content_share


@dataclass(frozen=True)
class Merf(GRPO):
    variant: Literal["full", "score", "correctness_only", "adverse"] = "full"
    text: Literal["words", "short"] = "words"
    motivated: float = 1.0
    motivated_end: float | None = None

    def __post_init__(self) -> None:
        for knob in ("motivated", "motivated_end"):
            share = getattr(self, knob)
            if share is not None and not 0 <= share <= 1:
                raise InputError(f"algo.{knob}: expected a share from 0 to 1, got {share}")
        if self.task.reward_spec() is None:
            raise InputError(f"algorithm merf: task {self.task.name} cannot state its reward")
        self.motivation()  # a spec without a short form is refused before the run

    def prompt(self, problems: Sequence[Problem]) -> list[list[int]]:
        share = self.share()
        text = self.motivation()
        return [
            render(
                self.policy.tokenizer,
                problem.prompt,
                system=text if content_share(f"motivated {problem.id}") < share else None,
                images=len(problem.images),
            )
            for problem in problems
        ]

    def motivation(self) -> str:
        """The text: how a completion is scored."""
        spec = self.task.reward_spec()
        assert spec is not None  # checked when built
        return spec.render(self.variant, short=self.text == "short")

    def share(self) -> float:
        """The share of prompts that carry the text at this step."""
        if self.motivated_end is None or self.clock.steps < 2:
            return self.motivated
        done = max(0, self.clock.step - 1) / (self.clock.steps - 1)
        return self.motivated + done * (self.motivated_end - self.motivated)
