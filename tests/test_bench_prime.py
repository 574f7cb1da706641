"""The PRIME benchmark: its loop is the specification's, a red gate leaves no number."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench/ is no part of what is installed

from bench import __main__ as bench
from bench import prime, prime_step


def test_the_loop_is_the_released_code_on_the_worked_example():
    """SYSTEMS' released numbers: raw log-ratios over their largest return, baseline, whitened."""
    q = torch.tensor([2.0, -1, 3, -2, -2, 1, 0, -1, -4, 0, 4]) / 5 / prime.BETA
    cu = torch.tensor([0, 3, 5, 9, 11])
    won, group = torch.tensor([1.0, 0, 0, 1]), torch.zeros(4, dtype=torch.long)
    expected = [1.108799, 0.816889, 0.981882, -0.858425, -0.541131]
    expected += [-0.883809, -1.023418, -1.010727, -0.845733, 1.121491, 1.134183]
    for way in (prime.loop, prime.ours):
        found = way(q, torch.zeros(11), won, group, cu)
        assert torch.allclose(found, torch.tensor(expected), atol=2e-5)


def test_the_command(tmp_path, require):
    require("native", None if _native() else "the native kernels are not built")
    small = "--rows 8 --length 16 --loop-rows 4 --repeats 1 --parts score --out"
    assert bench.main(["prime", *small.split(), str(tmp_path / "out.json")]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["score"]["gate"]["green"]


def test_the_report_and_the_red_gate(monkeypatch, require):
    require("native", None if _native() else "the native kernels are not built")
    report = prime.scores(rows=8, length=16, loop_rows=4, repeats=1)
    assert report["gate"]["green"] and report["gate"]["error"] < 1e-5
    assert report["tokens"] == 128
    assert set(report["fresh"]["median"]) == {"loop", "ours"}
    assert set(report["kept"]["median"]) == {"loop", "ours", "kernel", "copy"}
    assert "gate green" in prime.score_table(report)
    monkeypatch.setattr(prime, "ours", lambda *given: prime.loop(*given) * 1.01)
    report = prime.scores(rows=8, length=16, loop_rows=4, repeats=1)
    assert not report["gate"]["green"] and "fresh" not in report
    assert "no numbers" in prime.score_table(report)


def _native():
    from reasonrl.kernels import native

    return native.available() is None


@pytest.fixture(scope="module")
def steps():
    shape = prime_step.Settings(
        model="tiny", prompts=1, group=2, tokens=6, prompt_tokens=8, repeats=1, threads=1
    )
    return prime_step.measure(shape, "fp32", list(prime_step.SIDES))


def test_all_sides_sample_the_same_and_every_reward_model_moves(steps):
    assert prime_step.green(steps) and steps["tokens"] == 12
    assert [row["side"] for row in steps["rows"]] == list(prime_step.SIDES)
    outcome, *others = steps["rows"]
    assert outcome["over_outcome"] == 0 and outcome["phases"]["reward_update"] < 0.01
    assert all(row["phases"]["score"] > 0 for row in others)
    text = prime_step.table(steps)
    assert all(side in text for side in prime_step.SIDES)


def test_a_side_that_sampled_something_else_is_red(steps):
    broken = {"rows": [dict(steps["rows"][0], same_completions=False)]}
    assert not prime_step.green(broken)


def test_it_is_a_benchmark_by_name():
    assert "prime" in bench.NAMES
