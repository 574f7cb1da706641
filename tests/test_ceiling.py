"""A run that learns from nothing stops with the reason, after a checkpoint, exit status 4."""

from __future__ import annotations

import pytest

from reasonrl.ceiling import Watch
from reasonrl.checkpoint import checkpoints
from reasonrl.cli import main
from reasonrl.config import Ceiling
from reasonrl.records import Rewards, infra, scored, unscorable
from reasonrl.tasks.arithmetic import Arithmetic

KEYS = [
    "steps=6", "cold_start_steps=1", "prompts_per_step=2", "group=2", "eval_problems=2",
    "threads=1", "cold_start.batch=4", "max_completion_length=8",
    "model_options={width: 32, layers: 1}",
]  # fmt: skip


def rewards(known: int, *missing) -> Rewards:
    return Rewards([*([scored(1.0)] * known), *missing])


def test_only_steps_in_a_row_count():
    watch = Watch(Ceiling(unknown=0.5, patience=3))
    gone, odd = infra("the judge is down"), unscorable("no verdict")
    assert not watch.see(rewards(1, gone, gone))
    assert not watch.see(rewards(0, gone, odd))
    assert not watch.see(rewards(1, gone))  # half is not more than half
    assert not watch.see(rewards(0, odd))
    assert not watch.see(rewards(0, gone, gone, gone))
    said = watch.see(rewards(0, gone, odd))
    assert said.startswith("100 % of a step's rewards are unknown, 3 steps in a row")
    assert said.endswith("most often (4 of 6): infra: the judge is down")
    assert not Watch(Ceiling(unknown=1.0, patience=1)).see(rewards(0, gone))
    assert not Watch(Ceiling(patience=1)).see(rewards(0))


@pytest.mark.parametrize("limit, steps", [("{unknown: 0.4, patience: 2}", 2), ("{patience: 7}", 6)])
def test_a_run_stops_saved_and_goes_on_when_the_cause_is_gone(
    limit, steps, tmp_path, capsys, monkeypatch
):
    out = str(tmp_path / "run")
    words = ["train", "tiny", *KEYS, f"ceiling={limit}", "--out", out, "--quiet"]
    with monkeypatch.context() as broken:
        broken.setattr(
            Arithmetic, "grade", lambda self, problem, text: unscorable("the key is lost")
        )
        status = main([*words, "algorithm=grpo", "algo={}"])
    said = capsys.readouterr().err
    assert checkpoints(out)[0][0] == steps
    if steps == 6:
        assert status == 0
        return
    assert status == 4
    assert "2 steps in a row" in said and "unscorable: the key is lost" in said
    assert main([*words, "algorithm=grpo", "algo={}", "--resume"]) == 0
    assert checkpoints(out)[0][0] == 6


def test_a_resumed_run_counts_on(tmp_path, capsys, monkeypatch):
    """Stopped after every step, it still ends where an unbroken one does, with the same words."""
    monkeypatch.setattr(Arithmetic, "grade", lambda *_: unscorable("the key is lost"))
    said = []
    for name, stops in (("whole", ("steps=6",)), ("broken", ("steps=1", "steps=2", "steps=6"))):
        out = str(tmp_path / name)
        words = ["train", "tiny", *KEYS, "ceiling.patience=4", "algorithm=grpo", "algo={}"]
        for at, steps in enumerate(stops):
            resumed = ["--resume"] if at else []
            status = main([*words, steps, "--out", out, "--quiet", *resumed])
        assert status == 4 and checkpoints(out)[0][0] == 4
        said.append(capsys.readouterr().err)
    assert "4 steps in a row" in said[0] and "16 of 16" in said[0] and said[0] == said[1]
