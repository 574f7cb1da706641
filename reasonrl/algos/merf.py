"""MeRF: the policy is told its reward in the prompt; reward and GRPO stay as they are.

arXiv 2506.18485. The motivation text is rendered from the same `RewardSpec` that grades, so the two
cannot drift. All completions of a group see the same prompt, and so do the sampling, the loss, the
old and the reference log-probabilities; evaluation uses the plain prompt, and reports the
motivated one beside it. `motivated` and `motivated_end` are the share of prompts that carry the
text at the first and the last step (linear between); a hash of the problem decides which ones.
Variants: full, score (numbers without conditions), correctness_only (the suboptimal one),
adverse (every value negated). `text`: words, or the spec's short line for models of single
characters, which read only what their cold start taught them (tasks/marks.py). `Telling` is what
is said to whom; other trainers use it alone (integrations/trl_merf.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from reasonrl.algos.base import GRPO
from reasonrl.prompts import render
from reasonrl.records import InputError, Problem
from reasonrl.reward_spec import DETAILS, Detail, RewardSpec
from reasonrl.tasks.base import content_share


@dataclass(frozen=True)
class Telling:
    """Which text is told, and to what share of the prompts."""

    variant: Detail = "full"
    text: Literal["words", "short"] = "words"
    motivated: float = 1.0
    motivated_end: float | None = None
    section: ClassVar[str] = ""  # what stands before a knob's name in a refusal

    def __post_init__(self) -> None:
        for knob, known in (("variant", DETAILS), ("text", ("words", "short"))):
            if (value := getattr(self, knob)) not in known:
                raise InputError(
                    f"{self.section}{knob}: expected one of {', '.join(known)}, got {value!r}"
                )
        for knob in ("motivated", "motivated_end"):
            share = getattr(self, knob)
            if share is not None and not 0 <= share <= 1:
                raise InputError(f"{self.section}{knob}: expected a share from 0 to 1, got {share}")

    def words(self, spec: RewardSpec) -> str:
        """The text: how a completion is scored."""
        return spec.render(self.variant, short=self.text == "short")

    def share_at(self, step: int, steps: int) -> float:
        """The share of prompts that carry the text at step `step` (from 1) of `steps`."""
        if self.motivated_end is None or steps < 2:
            return self.motivated
        done = max(0, step - 1) / (steps - 1)
        return self.motivated + done * (self.motivated_end - self.motivated)

    def tells(self, problem: str, step: int, steps: int) -> bool:
        """Whether the problem of this name is among them; one that left does not come back."""
        return content_share(f"motivated {problem}") < self.share_at(step, steps)


@dataclass(frozen=True)
class Merf(Telling, GRPO):
    section: ClassVar[str] = "algo."

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task.reward_spec() is None:
            raise InputError(f"algorithm merf: task {self.task.name} cannot state its reward")
        self.motivation()  # a spec without a short form is refused before the run

    def prompt(self, problems: Sequence[Problem]) -> list[list[int]]:
        now = (self.clock.step, self.clock.steps)
        text = self.motivation()
        return [
            render(
                self.policy.tokenizer,
                problem.prompt,
                system=text if self.tells(problem.id, *now) else None,
                images=len(problem.images),
            )
            for problem in problems
        ]

    def motivation(self) -> str:
        spec = self.task.reward_spec()
        assert spec is not None  # checked when built
        return self.words(spec)
