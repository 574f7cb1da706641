"""The TRL benchmark: its gate, its rows, and that a red gate leaves no number."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench/ is no part of what is installed

from bench import trl as bench

WORDS = ("--model", "tiny", "--tokens", "6", "--repeats", "2", "--no-memory")


@pytest.fixture(autouse=True)
def host(require):
    missing = [name for name in ("trl", "datasets") if not importlib.util.find_spec(name)]
    require("trl", f"no {missing[0]}; pip install 'reasonrl[trl]'" if missing else None)


def test_both_phases_agree_and_are_timed(tmp_path, capsys):
    assert bench.main([*WORDS, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("trl-*.json")
    report = json.loads(path.read_text())
    assert report["gate"]["green"] and max(report["gate"]["worst"].values()) < 1e-5
    assert report["logits_mib"] == pytest.approx(16 * 6 * 100 * 4 / 2**20)
    for phase in ("step", "head"):
        assert all(len(report["rows"][phase][side]["seconds"]) == 2 for side in bench.SIDES)
    printed = capsys.readouterr().out
    assert "head   ours" in printed and "times as fast (at least 1.5" in printed


def test_a_red_gate_leaves_no_number(monkeypatch, capsys):
    real = bench.Pair.head

    def off(self, side):
        out = real(self, side)
        return {k: 1.01 * v for k, v in out.items()} if side == "ours" else out

    monkeypatch.setattr(bench.Pair, "head", off)
    assert bench.main(WORDS) == 1
    printed = capsys.readouterr().out
    assert "refused: expected at most" in printed and "times as fast" not in printed
    assert bench._gap(torch.tensor([1.01]), torch.tensor([1.0])) == pytest.approx(0.01, rel=1e-3)
