"""How the implicit reward model learns: reading again, the memory, what one update is."""

import pytest
import torch
from test_prime import Alone, Graded, begun, graded, made_up, tiny

from reasonrl.algos import Prime
from reasonrl.algos.base import Start, make
from reasonrl.lora import trainable
from reasonrl.records import InputError
from reasonrl.rewards.implicit import ImplicitPRM


def test_more_updates_read_the_past_again_and_only_then_cost_a_reference():
    rollouts = [graded(made_up(seed=s)) for s in range(3)]
    once, often = begun(tiny(0)), begun(tiny(0), prm_updates=4, prm_replay=2)
    losses = []
    for algo in (once, often):
        for rollout in rollouts:
            rewards = algo.score(rollout)
            metrics = algo.update(rollout, rewards)
        losses.append(algo.score(rollouts[-1]).metrics["process/prm_loss"])
        assert ("process/prm_replay_loss" in metrics) == (algo is often)
    assert losses[1] < losses[0]
    assert len(once.held.learning.memory) == 0
    kept = [one.rollout for one in often.held.learning.memory]
    assert kept == [rollouts[2], rollouts[2]]  # the last two that were read


def test_one_update_a_step_is_the_paper_whatever_the_memory_is_called():
    """The first update of many is the only one of the plain way: bit for bit."""
    rollout = graded(made_up())
    plain, many = begun(tiny(0)), begun(tiny(0), prm_updates=2)
    for algo in (plain, many):
        algo.score(rollout)
    many.held.learning.updates = 1
    plain.update(rollout, None)
    many.update(rollout, None)
    for a, b in zip(plain.held.prm(rollout).token, many.held.prm(rollout).token, strict=True):
        assert torch.equal(a, b)


def test_rereading_takes_the_gradient_of_the_past_labels():
    """One re-read rollout, checked against steps of torch's AdamW on the same losses."""
    rollout = graded(made_up())
    algo = begun(tiny(0), prm_updates=3)
    rewards = algo.score(rollout)
    algo.update(rollout, rewards)
    prm = ImplicitPRM(trainable(tiny(0)), tiny(0))
    parameters = list(prm.prm.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    outcome = torch.tensor([s.value for s in rollout.outcome])
    for _ in range(3):
        prm.learn(rollout, outcome, outcome >= 0, 6.0)
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        optimizer.zero_grad()
    for a, b in zip(algo.held.prm(rollout).token, prm(rollout).token, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_a_memory_is_refused_with_several_processes():
    class Pair(Alone):
        num_processes = 2

    algo = make(Prime, Graded(), tiny(0), {"prm_updates": 2, "prm_replay": 2})
    with pytest.raises(InputError, match="algo.prm_replay"):
        algo.begin(Start(tiny(0).frozen(), False, Pair(), 4096))  # type: ignore[arg-type]
