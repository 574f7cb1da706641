"""The benchmark of trust: nested calls count once, secrets cost a step nothing, it has a gate."""

from __future__ import annotations

import sys
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench/ is no part of what is installed

from bench import trust

SMALL = [
    "model_options={width: 32, layers: 1, heads: 2}",
    "prompts_per_step=2",
    "group=4",
    "max_completion_length=8",
    "threads=1",
]


def test_a_call_inside_a_timed_one_is_part_of_it():
    owner = types.SimpleNamespace(inner=lambda: 1)
    owner.outer = lambda: owner.inner() + 1
    before, timer = dict(vars(owner)), trust.Timer()
    timer.watch("outer", owner, "outer")
    timer.watch("inner", owner, "inner")
    assert owner.outer() == 2 and owner.inner() == 1
    assert timer.calls == {"outer": 1, "inner": 1} and timer.seconds["outer"] > 0
    timer.stop()
    assert vars(owner) == before


def test_a_short_run_gives_its_row():
    row = trust.measure("tiny", SMALL, 2)
    assert row["same"] and row["steps"] == 2 and 0 < row["share"] < 1
    assert row["parts"]["rows, flushed to the disk"]["calls"] == 1.0
    assert row["parts"]["secrets"] == {"ms": 0.0, "calls": 0.0}
    assert 0 < row["save"]["safe_ms"] < row["save"]["ms"]
    assert "% for trust" in trust.shown(row)
