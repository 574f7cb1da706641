"""The reward file of OpenRLHF 0.11: hand its path to `--reward.remote_url`.

    --reward.remote_url "$(python -m reasonrl.integrations.openrlhf_reward)"        # maths

The host calls `reward_func(queries, prompts, labels)`; a query is the prompt with the completion
behind it. For programs against tests, or for a process reward model, write a file of two lines:
    from reasonrl.integrations.openrlhf_reward import reward_function
    reward_func = reward_function("code")        # or "prm=runs/prm", "judge=./judge"
OpenRLHF has no place for an unknown reward: without `unscored=` such a completion is a ValueError,
which the host logs; with it, that number is the reward and extra_logs["unscored"] counts it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from reasonrl.choice import texts
from reasonrl.records import Problem, Score
from reasonrl.rewards.code import verify_code
from reasonrl.rewards.verify import verify_math
from reasonrl.segment import completion_of

RewardFunc = Callable[..., dict[str, Any]]


def reward_function(
    kind: str = "math", *, unscored: float | None = None, timeout: float = 5.0
) -> RewardFunc:
    """`reward_func` by "math", "code", "prm=FOLDER" or "judge=MODEL"; ValueError for another."""
    name, _, what = kind.partition("=")
    if (name in ("math", "code")) == bool(what) or name not in ("math", "code", "prm", "judge"):
        raise ValueError(f"kind: expected math, code, prm=FOLDER or judge=MODEL, got {kind!r}")
    if unscored is not None and not math.isfinite(unscored):
        raise ValueError(f"unscored: expected a number, got {unscored}")
    scorer = _scorer(name, what) if what else None

    def reward_func(
        queries: Sequence[str], prompts: Sequence[str], labels: Sequence[Any], **_: object
    ) -> dict[str, Any]:
        """{"rewards": (B,), "scores": (B,) in [0, 1], "extra_logs": {"unscored": (B,)}}"""
        rows = zip(queries, prompts, strict=True)
        said = [completion_of(q, p) for q, p in rows]
        if scorer is not None:
            asked = [Problem(p, p) for p in prompts]
            scores = list(scorer(texts(asked, said)).outcome)
        elif name == "code":
            scores = verify_code(said, labels, timeout=timeout)
        else:
            scores = verify_math(said, [str(label) for label in labels], timeout=timeout)
        values = torch.tensor([_value(score, unscored) for score in scores])
        unknown = torch.tensor([float(score.value is None) for score in scores])
        logs = {"unscored": unknown}
        return {"rewards": values, "scores": values.clamp(0, 1), "extra_logs": logs}

    return reward_func


def _scorer(name: str, what: str):
    from reasonrl import models, prm_heads

    if name == "prm":
        from reasonrl.rewards.prm import PRMScorer

        return PRMScorer(prm_heads.load(what, device="auto"))
    from reasonrl.rewards.judge import Judge

    return Judge(models.load(what, device="auto"), temperature=0.0)


def _value(score: Score, unscored: float | None) -> float:
    if score.value is not None:
        return score.value
    if unscored is None:
        raise ValueError(f"reward: {score.kind}: {score.reason} (`unscored=` gives it a number)")
    return unscored


reward_func = reward_function()

if __name__ == "__main__":
    print(__file__)
