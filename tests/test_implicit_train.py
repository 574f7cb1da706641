"""How the implicit reward model learns: reading again, the memory, what one update is."""

import pytest
import torch

from reasonrl import models
from reasonrl.implicit_train import Learning
from reasonrl.lora import trainable
from reasonrl.records import InputError, Problem, Rollout
from reasonrl.rewards.implicit import ImplicitPRM

ALL = torch.ones(6, dtype=torch.bool)


class Ranks:
    def __init__(self, count=1):
        self.num_processes = count


def tiny():
    return models.load("tiny", dtype="fp32", seed=0, width=32, layers=2)


def labelled(seed=0):
    """Six completions of two prompts, right where the first token is even."""
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(4, 90, (n,), generator=generator).tolist()  # noqa: E731
    completions = [ids(n) for n in (3, 5, 1, 4, 2, 2)]
    rollout = Rollout(
        problems=[Problem("0", ""), Problem("1", "")],
        prompt_ids=[ids(6), ids(6)],
        group=torch.tensor([0, 0, 0, 1, 1, 1]),
        completion_ids=completions,
        text=(),
        finished=(),
        logp=(),
        pieces=(),
    )
    return rollout, torch.tensor([float(c[0] % 2 == 0) for c in completions])


def learning(ranks=1, **options):
    prm = ImplicitPRM(trainable(tiny()), tiny())
    return Learning(prm, Ranks(ranks), rate=0.01, **options)  # type: ignore[arg-type]


def tokens(one, rollout):
    return torch.cat(list(one.prm(rollout).token or ()))


def test_updates_are_steps_of_adamw_on_the_labels_read_again():
    rollout, outcome = labelled()
    one = learning(updates=3)
    scores, loss, count = one.read(rollout, outcome, ALL)
    assert count == 6 and float(torch.cat(list(scores.token)).abs().max()) == 0.0  # before any step
    metrics = one.step()
    prm = ImplicitPRM(trainable(tiny()), tiny())
    parameters = list(prm.prm.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    losses = []
    for _ in range(3):
        losses.append(prm.learn(rollout, outcome, ALL, 6.0)[1])
        torch.nn.utils.clip_grad_norm_(parameters, 10.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss == pytest.approx(losses[0])
    assert metrics["process/prm_replay_loss"] == pytest.approx(sum(losses[1:]) / 2, rel=1e-5)
    assert torch.allclose(tokens(one, rollout), torch.cat(list(prm(rollout).token)), atol=1e-6)


def test_one_update_keeps_nothing_and_asks_the_reference_once():
    rollout, outcome = labelled()
    one = learning()
    one.read(rollout, outcome, ALL)
    assert "process/prm_replay_loss" not in one.step() and len(one.memory) == 0


def test_the_memory_holds_the_last_steps_and_learns_more_from_them():
    losses = {}
    for updates in (1, 5):
        one = learning(updates=updates, replay=2 if updates > 1 else 0)
        for seed in (0, 1, 2):
            one.read(*labelled(seed), ALL)
            one.step()
        losses[updates] = one.prm.learn(*labelled(2), ALL, 6.0)[1]
        if updates > 1:
            kept = [r.rollout.completion_ids for r in one.memory]
            assert kept == [labelled(seed)[0].completion_ids for seed in (1, 2)]
    assert losses[5] < losses[1]


def test_a_restored_memory_draws_and_learns_the_same(tmp_path):
    whole, broken = (learning(updates=4, replay=3) for _ in range(2))
    for seed in (0, 1):
        for one in (whole, broken):
            one.read(*labelled(seed), ALL)
            one.step()
    broken.save(tmp_path)
    fresh = learning(updates=4, replay=3)
    fresh.prm.prm.model.load_state_dict(broken.prm.prm.model.state_dict())
    fresh.restore(tmp_path)
    for seed in (2, 3):
        for one in (whole, fresh):
            one.read(*labelled(seed), ALL)
            one.step()
    rollout, _ = labelled(9)
    assert torch.equal(tokens(whole, rollout), tokens(fresh, rollout))


def test_the_skips_in_a_row_come_back(tmp_path):
    one = learning()
    one.read(*labelled(), ALL)
    one.parameters[0].grad.fill_(float("inf"))
    assert one.step()["process/prm_skipped"] == 1.0
    one.save(tmp_path)
    fresh = learning()
    fresh.restore(tmp_path)
    assert fresh.skipped == one.skipped == 1


def test_the_average_of_the_weights_pays_and_comes_back(tmp_path):
    rollout, outcome = labelled()
    one = learning(updates=2, average=0.75)
    start = [p.detach().clone() for p in one.prm.prm.model.parameters()]
    path = [start]
    for seed in (0, 1):
        one.read(*labelled(seed), ALL)
        apply = one._apply

        def kept(apply=apply):
            found = apply()
            path.append([p.detach().clone() for p in one.prm.prm.model.parameters()])
            return found

        one._apply = kept  # type: ignore[method-assign]
        one.step()
        one._apply = apply  # type: ignore[method-assign]
    assert len(path) == 5
    for at, mine in enumerate(one.mean.prm.model.parameters()):
        expected = path[0][at]
        for after in path[1:]:
            expected = 0.75 * expected + 0.25 * after[at]
        assert torch.allclose(mine, expected, atol=1e-6)
    paid = torch.cat(list(one.read(rollout, outcome, ALL)[0].token))
    assert torch.equal(paid, torch.cat(list(one.mean(rollout).token)))
    assert not torch.equal(paid, tokens(one, rollout))
    assert torch.equal(paid, torch.cat(list(one.score(rollout).token)))

    one.save(tmp_path)
    fresh = learning(updates=2, average=0.75)
    fresh.restore(tmp_path)
    assert torch.equal(torch.cat(list(fresh.score(rollout).token)), paid)


def test_a_memory_is_refused_with_several_processes():
    with pytest.raises(InputError, match="algo.prm_replay"):
        learning(ranks=2, updates=2, replay=2)
