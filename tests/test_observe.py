"""The numbers of a step, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from reasonrl.observe import step_metrics
from reasonrl.records import Problem, Rewards, Rollout, infra, scored


def measured(*groups):
    """Metrics of a rollout with these outcomes, None = unknown."""
    flat = [(g, value) for g, group in enumerate(groups) for value in group]
    rollout = Rollout(
        problems=[Problem(str(g), "") for g in range(len(groups))],
        prompt_ids=[[1]] * len(groups),
        group=torch.tensor([g for g, _ in flat]),
        completion_ids=[[2]] * len(flat),
        text=["x"] * len(flat),
        finished=[True] * len(flat),
        logp=[torch.zeros(1)] * len(flat),
        pieces=[[0, 1]] * len(flat),
    )
    outcome = [infra("down") if value is None else scored(value) for _, value in flat]
    return step_metrics(rollout, Rewards(outcome=outcome), torch.zeros(len(flat)))


def test_the_standard_error_of_the_reward_is_over_prompts():
    found = measured([1.0, 1.0, 1.0], [0.0, 0.0, 0.0])
    assert found["reward"] == 0.5 and found["reward_se"] == pytest.approx(math.sqrt(0.5) / 2**0.5)
    assert measured([1.0, 0.0], [0.0, 1.0])["reward_se"] == 0.0  # no prompt is unlike another
    # means 1/2, 1, 0 of 2, 1 and 2 known: off by 0.2, 0.6, -0.8 from their mean 0.4
    found = measured([1.0, 0.0], [1.0, None], [0.0, 0.0])
    assert found["reward"] == pytest.approx(0.4)
    assert found["reward_se"] == pytest.approx(math.sqrt(3 / 2 * (0.04 + 0.36 + 0.64)) / 5)


def test_one_prompt_has_no_standard_error():
    assert "reward_se" not in measured([1.0, 0.0]) and "reward_se" not in measured([1.0], [None])
    assert math.isnan(measured([None], [None])["reward"])
