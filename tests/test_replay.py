"""A loss or gradient that is not finite: skipped, kept, made again; never in a checkpoint."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

sys.path.insert(0, str(Path(__file__).parent))

import distributed_worker as worker
from nan_cases import learner
from test_nan import same

from reasonrl.algos import GRPO
from reasonrl.checkpoint import checkpoints, load
from reasonrl.cli import main
from reasonrl.log import read_rows
from reasonrl.loss import LossSpec
from reasonrl.replay import again, joined
from reasonrl.update import Share, Trainable

ADVANTAGE = GRPO.advantage


def words(out, *changes):
    kind = ["algorithm=grpo", "algo={}", "save.every=1", "steps=5", "cold_start_steps=2"]
    return ["train", "tiny", *worker.SMALL, *kind, *changes, "--out", str(out), "--quiet"]


def overflowing(*steps):
    """Credit that no gradient can hold, in some steps."""

    def advantage(self, rewards, rollout):
        value = ADVANTAGE(self, rewards, rollout)
        return value + 1e38 if self.clock.step in steps else value

    return advantage


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("updates=2", "batch.tokens=64"),
        ("lora.rank=2",),
        ("loss={name: gspo, kl_coef: 0.5}", "filter={low: 0, high: 0.99, rounds: 2}"),
    ],
)
def test_a_skipped_batch_is_kept_and_made_again(changes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GRPO, "advantage", overflowing(2, 4))
    out = tmp_path / "run"
    assert main(words(out, *changes)) == 0  # two in a row would be needed, and one more
    rows = read_rows(out / "metrics.jsonl")
    assert [row["grad_norm"] is None for row in rows] == [False, True, False, True, False]
    assert [path.name for path in (out / "nonfinite").iterdir()] == ["checkpoint-4"]
    load(out / "nonfinite/checkpoint-4")
    monkeypatch.setattr(GRPO, "advantage", ADVANTAGE)  # what is kept is enough
    assert main(["replay", str(out)]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])  # libraries talk
    assert found["step"] == 4 and found["grad_norm"] is None and len(found["bad"]) > 2
    if changes[:1] != ("updates=2",):  # there the row is the mean of two updates
        for name in ("tokens", "rows/live", "kl"):
            assert found[name] == rows[3][name], name


def test_the_kept_weights_are_those_that_the_update_read(tmp_path, monkeypatch):
    """A batch with a finite gradient, kept by hand: made again it gives the run's own numbers."""
    from reasonrl.update import Learner

    update = Learner.update

    def kept(self, share):
        self.keep(share)
        return update(self, share)

    monkeypatch.setattr(Learner, "update", kept)
    assert main(words(tmp_path / "run", "loss={name: dapo, kl_coef: 0.5}")) == 0
    monkeypatch.setattr(Learner, "update", update)
    row, found = read_rows(tmp_path / "run/metrics.jsonl")[-1], again(tmp_path / "run")
    assert found.pop("bad") == [] and found.pop("step") == 5
    assert row["grad_norm"] > 0
    assert {name: row[name] for name in found} == found


def test_a_row_of_skips_ends_the_run_and_leaves_the_first(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GRPO, "advantage", overflowing(2, 3, 4))
    out = tmp_path / "run"
    assert main(words(out)) == 3
    assert "not finite in 3 steps in a row (nan_patience)" in capsys.readouterr().err
    assert again(out)["step"] == 2 and checkpoints(out)[0][0] == 3
    assert main(["audit", str(out)]) in (0, 1)  # a folder more is no trouble
    monkeypatch.setattr(GRPO, "advantage", overflowing(4))
    assert main([*words(out), "--resume"]) == 3  # the row goes on where it was: 2, 3, and 4
    monkeypatch.setattr(GRPO, "advantage", ADVANTAGE)
    assert main([*words(out), "--resume"]) == 0


def test_the_ranks_shares_are_one_batch():
    accelerator, spec = Accelerator(cpu=True), LossSpec.named("dapo", kl_coef=0.5)
    case = worker.Case("dapo", tokens=4096, kl=0.5)
    made = learner(case, accelerator)
    before = worker.snapshot(made)

    def share(rank, world):
        rollout, advantage = worker.dealt(case, rank, world, made.policy)
        old, ref = (made.logp(rollout, p) for p in (made.policy, made.reference))
        rows = range(len(rollout.completion_ids))
        return Share(rollout, advantage, spec, rows, old, ref)

    together, whole = joined([share(0, 2), share(1, 2)]), share(0, 1)
    metrics = []
    for each in (together, whole):
        made = learner(case, accelerator)
        assert same(before, worker.snapshot(made))
        metrics.append(made.update(each))
    for name in ("loss", "grad_norm", "kl", "tokens"):
        assert metrics[0][name] == pytest.approx(metrics[1][name], rel=1e-5), name


def test_a_loss_that_is_not_finite_is_skipped_too(monkeypatch):
    """Its gradient may well be finite: a term without gradient."""
    forward = Trainable.forward

    def infinite(self, *given):
        loss, metrics = forward(self, *given)
        return loss + math.inf, metrics

    monkeypatch.setattr(Trainable, "forward", infinite)
    case, accelerator = worker.CASES["whole"], Accelerator(cpu=True)
    made = learner(case, accelerator)
    before = worker.snapshot(made)
    rollout, advantage = worker.dealt(case, 0, 1, made.policy)
    metrics = made.step(rollout, advantage, LossSpec.named("dapo"), 1e-3)
    assert metrics["grad_norm"] > 0 and math.isinf(metrics["loss"])
    assert same(before, worker.snapshot(made)) and made.skipped == 1


@pytest.mark.parametrize("place", ["weight", "moment", "the reward's"])
def test_nothing_that_is_not_finite_is_saved(place, tmp_path, monkeypatch, capsys):
    from reasonrl.train import Run

    step = Run._step

    def poisoned(self):
        step(self)
        if self.step == 2:
            learned = self.algo.held.learning if place == "the reward's" else self.learner
            parameter = next(p for g in learned.optimizer.param_groups for p in g["params"])
            moment = learned.optimizer.state[parameter]["exp_avg_sq"]
            with torch.no_grad():
                (moment if place == "moment" else parameter).view(-1)[0] = math.inf

    monkeypatch.setattr(Run, "_step", poisoned)
    out, kind = tmp_path / "run", ["algorithm=prime"] if place == "the reward's" else []
    assert main(words(out, *kind, "save.keep=9")) == 3
    said = capsys.readouterr().err
    assert "weights or moments are not finite, nothing is saved; the last checkpoint is" in said
    assert [at for at, _ in checkpoints(out)] == [1, 0]


def test_a_run_without_such_a_batch(tmp_path, capsys):
    assert main(["replay", str(tmp_path)]) == 2
    assert "holds no batch whose gradient was not finite" in capsys.readouterr().err
