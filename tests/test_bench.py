"""The step benchmark: what its report holds, and that a red gate leaves no number."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench/ is no part of what is installed

from bench import __main__ as bench
from bench import machine, step
from bench.step_ours import Settings
from reasonrl.cli import main

ROOT = Path(__file__).parent.parent
SMALL = Settings(model="tiny", group=4, tokens=6, prompt_tokens=12, repeats=1, threads=1)
FACTS = {"cosine": 1.0, "norm_ratio": 1.0, "ours": (48, 96, True), "trl": (48, 96, True)}


def run(*words: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    command = [sys.executable, "-m", "bench", "step", *SMALL.words(), *words]
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=120)


def test_ours_against_trl(require, tmp_path):
    missing = [name for name in ("trl", "datasets") if not importlib.util.find_spec(name)]
    require("trl", f"no {missing[0]}; pip install 'reasonrl[trl]'" if missing else None)
    done = run("--dtype", "fp32", "--no-memory", "--out", str(tmp_path / "step.json"))
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "step.json").read_text())
    assert report["settings"]["tokens"] == 6 and report["machine"]["threads"] == 1
    assert {"torch", "trl", "transformers"} <= report["machine"]["versions"].keys()
    assert [(row["side"], row["dtype"]) for row in report["rows"]] == [
        ("ours", "fp32"),
        ("trl", "fp32"),
    ]
    for row in report["rows"]:
        assert row["gate"]["green"] and row["gate"]["cosine"] > 0.999999
        assert row["gate"]["norm_ratio"] == pytest.approx(1, abs=1e-5)
        assert len(row["seconds"]) == 1 and row["median"] > 0
        assert sum(row["phases"].values()) == pytest.approx(row["median"], rel=0.05)
        assert row["tokens_per_second"] == pytest.approx(2 * 4 * 6 / row["median"])
    assert "ours  fp32" in done.stdout and "trl   fp32" in done.stdout


def test_a_side_makes_some_steps_in_a_row(monkeypatch):
    """The warm-up is a turn of its own, no side has a step more than the other, each its dtype."""
    seen, asked = [], []

    class Side:
        tokens = prompt_tokens = 0
        changed = staticmethod(lambda: True)

        def __init__(self, settings, dtype, *folder):
            asked.append(dtype)
            self.steps = []

        def step(self, number):
            seen.append(("ours", number))
            return {"total": 1.0}

        def train(self, go_on):
            for number in range(SMALL.repeats + 5):
                if not go_on(number):
                    break
                seen.append(("trl", number))
                self.steps.append({"total": 1.0})

    monkeypatch.setattr(step, "Ours", Side)
    rival = SimpleNamespace(Rival=Side, agreement=lambda ours, rival: {})
    monkeypatch.setitem(sys.modules, "bench.step_trl", rival)
    settings = replace(SMALL, repeats=5)
    rows = step.run_pair(settings, ("bf16", "fp32"), step.SIDES, math.inf, turn=2)
    assert asked == [row["dtype"] for row in rows] == ["bf16", "fp32"]
    ours = [n for side, n in seen if side == "ours"]
    assert ours == [n for side, n in seen if side == "trl"] == [*range(6)]
    assert "".join(side[0] for side, _ in seen) == "ot" + "oott" * 2 + "ot"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--turn 0", "--turn: expected a number of steps >= 1, got 0"),
        (
            "--rival-dtype fp32",
            "--rival-dtype: expected with --dtype fp32 or bf16, got --dtype both",
        ),
    ],
)
def test_refused_options(words, reason, capsys):
    with pytest.raises(SystemExit):
        step.main(words.split())
    assert reason in capsys.readouterr().err


def test_peak_memory_is_that_of_a_process_of_its_own(tmp_path):
    done = run("--dtype", "fp32", "--sides", "ours", "--alone", "ours")
    assert done.returncode == 0, done.stderr
    memory = json.loads(done.stdout.splitlines()[-1])
    assert 100 < memory["start_mib"] < memory["peak_mib"] < 4096


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"cosine": 0.97}, "cosine 0.9700, expected >= 0.9999"),
        ({"cosine": float("nan")}, "cosine nan"),
        ({"norm_ratio": 2.0}, "norm ratio 2.000"),
        ({"ours": (47, 96, True)}, "ours: 47 completion tokens, expected 48"),
        ({"trl": (48, 80, True)}, "prompt tokens differ: [96, 80]"),
        ({"trl": (48, 96, False)}, "trl: the parameters did not change"),
    ],
)
def test_a_red_gate_leaves_the_row_and_no_number(change, reason):
    verdict = step.gate(SMALL, "fp32", FACTS | change)
    assert not verdict["green"] and reason in verdict["reason"]
    times = [{"rollout": 1.0, "score": 0.5, "update": 2.0, "total": 765.432}] * 2
    rows = [step._row(SMALL, side, "fp32", times, verdict) for side in step.SIDES]
    assert not any("median" in row or "seconds" in row for row in rows)
    printed = step.table(
        {
            "settings": vars(SMALL),
            "turn": 1,
            "machine": machine.machine() | {"load_after": (0.0,)},
            "rows": rows,
        }
    )
    assert printed.count(f"refused: {verdict['reason']}") == 2
    assert "765" not in printed and "of the time" not in printed


def test_a_green_gate_prints_also_where_we_lose():
    verdict = step.gate(SMALL, "fp32", FACTS)
    assert verdict == {"green": True, "reason": "", "cosine": 1.0, "norm_ratio": 1.0}
    phases = {"rollout": 1.0, "score": 0.0, "update": 2.0}
    slow, fast = ([phases | {"total": t}] * 2 for t in (6.0, 3.0))
    rows = [
        step._row(SMALL, "ours", "fp32", slow, verdict) | {"peak_mib": 300},
        step._row(SMALL, "trl", "fp32", fast, verdict) | {"peak_mib": 200},
    ]
    assert rows[0]["tokens_per_second"] == 8
    assert "takes 1/0.50 of the time of trl fp32, 1.50 of its peak memory" in "".join(
        step._verdict(rows)
    )


def test_wrong_usage_is_status_2(capsys, monkeypatch):
    assert bench.main(["stop"]) == 2
    assert "expected one of" in capsys.readouterr().err
    monkeypatch.setattr(step, "find_spec", lambda name: None)
    assert step.main(["--model", "tiny"]) == 2
    assert "pip install 'reasonrl[trl]'" in capsys.readouterr().err


def test_the_command_runs_bench_of_its_checkout(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # wherever it is called from
    assert main(["bench", "nope"]) == 2
    assert "expected one of ops" in capsys.readouterr().err
    monkeypatch.setattr("bench.__main__.main", lambda words: len(words))
    assert main(["bench", "ops", "--rounds", "3"]) == 3


def test_outside_of_a_checkout_the_command_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("reasonrl.__file__", str(tmp_path / "reasonrl" / "__init__.py"))
    assert main(["bench", "ops"]) == 2
    assert "needs a source checkout" in capsys.readouterr().err


def test_what_was_timed_stands_before_memory_is_measured(tmp_path, monkeypatch):
    def ended(*given):
        raise KeyboardInterrupt

    row = {"side": "ours", "dtype": "fp32", "gate": {"green": True}, "median": 1.0}
    monkeypatch.setattr(step, "run_pair", lambda *given: [row])
    monkeypatch.setattr(step, "_peak", ended)
    out = tmp_path / "step.json"
    with pytest.raises(KeyboardInterrupt):
        step.main(["--sides", "ours", "--dtype", "fp32", "--out", str(out)])
    assert json.loads(out.read_text())["rows"] == [row]
