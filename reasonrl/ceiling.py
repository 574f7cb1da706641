"""A run whose rewards are mostly unknown learns from the few that are not, or from nothing: after a
while that is a fault with a name, not a slow run.

    watch = Watch(config.ceiling);  reason = watch.see(rewards)     # "" while the run may go on
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from reasonrl.config import Ceiling
from reasonrl.records import Rewards


class Watch:
    """Counts the steps in a row whose share of unknown rewards is above the limit."""

    def __init__(self, limit: Ceiling):
        self.limit = limit
        self.steps = 0
        self.why: Counter[str] = Counter()

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: a resumed run counts on."""
        return {"steps": self.steps, "why": dict(self.why)}

    def restore(self, state: dict[str, Any]) -> None:
        self.steps, self.why = state["steps"], Counter(state["why"])

    def see(self, rewards: Rewards) -> str:
        """What to say when the run must stop; empty while it need not."""
        missing = [score for score in rewards.outcome if score.value is None]
        share = len(missing) / max(1, len(rewards.outcome))
        if share <= self.limit.unknown:
            self.steps = 0
            self.why.clear()
            return ""
        self.steps += 1
        self.why.update(f"{score.kind}: {score.reason}" for score in missing)
        if self.steps < self.limit.patience:
            return ""
        (reason, count), total = self.why.most_common(1)[0], sum(self.why.values())
        return (
            f"{100 * share:.0f} % of a step's rewards are unknown, {self.steps} steps in a row"
            f" above ceiling.unknown={self.limit.unknown:g}; most often ({count} of {total}):"
            f" {reason}"
        )
