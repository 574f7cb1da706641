"""Algorithms: worked examples by hand, and the table's promise that knobs are checked."""

import pytest
import torch

from reasonrl import models
from reasonrl.algos import ALGOS, GRPO, SFT, Process
from reasonrl.algos.base import make
from reasonrl.algos.process import step_ids
from reasonrl.records import InputError, Problem, Rewards, Rollout, Step, infra, scored
from reasonrl.tasks import make_task


@pytest.fixture(scope="module")
def policy():
    return models.load("tiny", dtype="fp32", width=32, layers=1)


@pytest.fixture(scope="module")
def task():
    return make_task("arithmetic", style="compact")


def rollout(texts, groups):
    """Character-level completions: token t is character t."""
    return Rollout(
        problems=[Problem(str(g), "") for g in range(max(groups) + 1)],
        prompt_ids=[[5]] * (max(groups) + 1),
        group=torch.tensor(groups),
        completion_ids=[[9] * len(t) for t in texts],
        text=texts,
        finished=[True] * len(texts),
        logp=[torch.zeros(len(t)) for t in texts],
        pieces=[list(range(len(t) + 1)) for t in texts],
    )


def test_grpo_spreads_the_normalised_outcome_over_its_tokens(task, policy):
    ro = rollout(["ab", "abc", "a", ""], [0, 0, 0, 0])
    rewards = Rewards([scored(1), scored(0), scored(0), scored(0)])
    a = GRPO(task, policy).advantage(rewards, ro)
    # mean .25, unbiased std .5: 1.5 for the right one, -.5 for the others
    assert torch.allclose(a, torch.tensor([1.5, 1.5, -0.5, -0.5, -0.5, -0.5]), atol=1e-5)


def test_an_unknown_outcome_is_outside_the_statistics(task, policy):
    ro = rollout(["a", "b", "c"], [0, 0, 0])
    a = GRPO(task, policy).advantage(Rewards([scored(1), infra("down"), scored(0)]), ro)
    assert torch.allclose(a, torch.tensor([0.70710678, 0.0, -0.70710678]), atol=1e-5)


def test_process_credit_by_step_and_by_return(task, policy):
    ro = rollout(["xxyy", "xy"], [0, 0])
    steps = [[Step(0, 2, 1.0), Step(2, 4, 0.0)], [Step(0, 1, 1.0), Step(1, 2, 1.0)]]
    rewards = Rewards([scored(0), scored(1)], steps=steps)
    assert step_ids(rewards, ro).tolist() == [0, 0, 1, 1, 2, 3]
    # steps 1 0 1 1: mean .75, unbiased std .5 -> .5 -1.5 .5 .5; outcome -+.70710678
    o = 0.70710678
    local = Process(task, policy, credit="step").advantage(rewards, ro)
    assert torch.allclose(
        local,
        torch.tensor([0.5, 0.5, -1.5, -1.5, 0.5, 0.5]) + torch.tensor([-o] * 4 + [o] * 2),
        atol=1e-5,
    )
    only = Process(task, policy, credit="return", outcome_weight=0.0, step_weight=2.0)
    expected = 2 * torch.tensor([-1.0, -1.0, -1.5, -1.5, 1.0, 0.5])
    assert torch.allclose(only.advantage(rewards, ro), expected, atol=1e-5)


def test_process_compares_steps_at_the_same_place(task, policy):
    ro = rollout(["xxyyz", "xy"], [0, 0])
    steps = [
        [Step(0, 2, 1.0), Step(2, 4, 0.0), Step(4, 5, 1.0)],
        [Step(0, 1, 1.0), Step(1, 2, 1.0)],
    ]
    rewards = Rewards([scored(0), scored(0)], steps=steps)
    a = Process(task, policy, credit="step", baseline="position").advantage(rewards, ro)
    # first steps are alike, the second ones differ, the third has no peer
    expected = torch.tensor([0.0, 0.0, -0.70710678, -0.70710678, 0.0, 0.0, 0.70710678])
    assert torch.allclose(a, expected, atol=1e-5)


def test_process_without_step_rules_is_grpo_and_says_so_once(task, policy, caplog):
    ro = rollout(["a", "b"], [0, 0])
    rewards = Rewards([scored(1), scored(0)])
    for _ in range(2):
        a = Process(task, policy).advantage(rewards, ro)
    assert torch.equal(a, GRPO(task, policy).advantage(rewards, ro))
    assert caplog.text.count("has no rule for its steps; outcome only") == 1


def test_sft_learns_the_worked_completion_and_ends_it(task, policy):
    sft = SFT(task, policy)
    problems = task.problems("sft", 0, 3)
    ro = sft.rollout(problems, 1, None, 0)
    assert [t for t in ro.text] == [task.worked(p) for p in problems]
    assert all(ids[-1] == policy.tokenizer.eos_token_id for ids in ro.completion_ids)
    assert sft.advantage(sft.score(ro), ro).unique().tolist() == [1.0]


def test_base_scores_with_the_tasks_rules(task, policy):
    (problem,) = task.problems("train", 0, 1)
    worked = task.worked(problem)
    ro = Rollout(
        problems=[problem],
        prompt_ids=[[5]],
        group=torch.tensor([0, 0]),
        completion_ids=[[9], [9]],
        text=[worked, "nonsense"],
        finished=[True, True],
        logp=[],
        pieces=[],
    )
    rewards = GRPO(task, policy).score(ro)
    assert [s.value for s in rewards.outcome] == [1.0, 0.0]
    assert [s.reward for s in rewards.steps[0]] == [1.0] * 4


def test_knobs_are_checked_and_named(task, policy):
    assert make(ALGOS["process"], task, policy, {"step_weight": 2}).step_weight == 2.0
    with pytest.raises(
        InputError, match="algo.step_wieght: unknown knob; did you mean 'step_weight'"
    ):
        make(ALGOS["process"], task, policy, {"step_wieght": 2.0})
    with pytest.raises(InputError, match="algo.credit: .*got 'token'"):
        make(ALGOS["process"], task, policy, {"credit": "token"})
