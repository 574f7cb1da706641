"""A run that hangs ends with status 5 and its stacks; one that moves or was stopped does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reasonrl import attention, watchdog
from reasonrl.attention import Packed
from reasonrl.log import RunLog
from reasonrl.rewards import verify_math
from reasonrl.watchdog import Watchdog, beat

HANGS = """
import sys, threading
from reasonrl import cli
from reasonrl.algos import GRPO

def hang_here(self, rollout):
    if len(list(out.glob("checkpoint-*"))) > 0:
        threading.Event().wait()
    return score(self, rollout)

from pathlib import Path
out = Path(sys.argv[1])
score, GRPO.score = GRPO.score, hang_here
words = "train tiny steps=3 cold_start_steps=0 eval_problems=0 prompts_per_step=2 group=2"
words += " save.every=1 threads=1 stall=3 --quiet --out"
sys.exit(cli.main([*words.split(), str(out)]))
"""


def test_silence_adds_up_and_any_beat_ends_it(tmp_path):
    dog = Watchdog(20.0, tmp_path)
    assert dog.every == 5.0
    assert [dog.late(5.0) for _ in range(3)] == [False] * 3
    beat()
    assert [dog.late(5.0) for _ in range(4)] == [False] * 4  # the first look only sees the beat
    assert dog.late(5.0)


def test_time_in_which_the_process_was_stopped_does_not_count(tmp_path):
    dog = Watchdog(20.0, tmp_path)
    assert not dog.late(100_000.0)
    assert dog.late(100_000.0)  # each look counts two intervals at most


def test_zero_watches_nothing(tmp_path):
    with Watchdog(0.0, tmp_path) as dog:
        assert not dog.thread.is_alive()


def test_layers_and_phases_are_progress(tmp_path):
    from reasonrl.config import Config

    before = watchdog._beats
    plan, x = Packed([(0, 3, [2])], "cpu"), torch.randn(1, 2, 5, 8)
    module = type("Layer", (), {"layer_idx": 0})
    attention.attention(module, x, x, x, None, 0.3, plan=plan)
    assert watchdog._beats == before + 1
    with RunLog(tmp_path / "run", Config(model="tiny", task="arithmetic"), quiet=True).phase(
        "score"
    ):
        assert watchdog._beats == before + 2
    assert watchdog._beats == before + 3


def test_verdicts_are_progress():
    before = watchdog._beats
    verify_math([r"\\boxed{1}", r"\\boxed{2}", "3"], ["1", "5", "3"])
    assert watchdog._beats > before


def test_a_run_that_hangs(tmp_path):
    out = tmp_path / "run"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HANGS, str(out)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == watchdog.STATUS == 5, run.stderr
    assert "stalled: nothing has gone on for" in run.stderr and "resume with --resume" in run.stderr
    stacks = (out / "stalled.txt").read_text()
    assert "hang_here" in stacks and "in _step\n" in stacks
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-1"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path, capsys):
    dog = Watchdog(1.0, tmp_path / "nowhere", end=lambda status: None)
    dog._tell()
    assert (
        "nowhere/stalled.txt cannot be written (No such file or directory)"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("value", ["-1", "soon"])
def test_bad_values(value, tmp_path, capsys):
    from reasonrl.cli import main

    assert main(["train", "tiny", f"stall={value}", "--out", str(tmp_path / "run")]) == 2
    assert "stall" in capsys.readouterr().err
    assert not Path(tmp_path / "run").exists()
