"""A process reward model as a scorer: step rewards and a total for every completion of a rollout.

The completions are cut where the model's own delimiter says and read as text, so a policy with
another tokenizer is scored as well. All of them go through packed forwards together. The outcome is
the trajectory-aware total, mean of the steps + alpha * final (arXiv 2506.18896 eq. 11); what cannot
be read (no steps, longer than the context, a separator inside the text) is unscorable, not 0.
    rewards = PRMScorer("runs/prm")(rollout)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from reasonrl.prm import PRM, Scored
from reasonrl.prm_heads import load
from reasonrl.records import Rewards, Rollout, Score, Step, scored, unscorable
from reasonrl.segment import split_steps
from reasonrl.stepwise import Trace
from reasonrl.vision import refuse


class PRMScorer:
    """`scorer(rollout) -> Rewards`. alpha: weight of the trajectory's score; None: the model's."""

    def __init__(self, prm: PRM | str | Path, *, alpha: float | None = None, tokens: int = 8192):
        self.prm = load(prm) if isinstance(prm, str | Path) else prm
        self.alpha = self.prm.reading.alpha if alpha is None else alpha
        self.tokens = tokens
        if not math.isfinite(self.alpha):
            raise ValueError(f"alpha must be a finite number, got {alpha}")

    def __call__(self, rollout: Rollout) -> Rewards:
        refuse(rollout.problems, "a process reward model")
        steps = [split_steps(text, self.prm.reading.delimiter) for text in rollout.text]
        found = self.read(rollout, steps)
        known = [f for f in found if not f.reason]
        final = [f.final for f in known if f.final is not None]
        values = [v for f in known for v in f.steps]
        metrics = {"process/prm_unscorable": float(len(found) - len(known))}
        if values:
            metrics["process/prm_step_mean"] = math.fsum(values) / len(values)
        if final:
            metrics["process/prm_final_mean"] = math.fsum(final) / len(final)
        return Rewards(
            outcome=[self._total(f) for f in found],
            steps=[_rewarded(s, f) for s, f in zip(steps, found, strict=True)],
            metrics=metrics,
        )

    def read(self, rollout: Rollout, steps: Sequence[Sequence[Step]]) -> list[Scored]:
        """Scores of every completion, cut as given."""
        traces = []
        for b, (text, spans) in enumerate(zip(rollout.text, steps, strict=True)):
            prompt = rollout.problems[int(rollout.group[b])].prompt
            traces.append(Trace(str(b), prompt, [text[s.start : s.end] for s in spans]))
        return self.prm.score(traces, self.tokens)

    def _total(self, found: Scored) -> Score:
        if found.reason:
            return unscorable(found.reason)
        total = found.total(self.alpha)
        return scored(total) if math.isfinite(total) else unscorable(f"the score is {total}")


def _rewarded(steps: Sequence[Step], found: Scored) -> list[Step]:
    if found.reason:
        return list(steps)
    return [Step(s.start, s.end, v) for s, v in zip(steps, found.steps, strict=True)]
