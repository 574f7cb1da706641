"""Selection: what is kept, and what the report says of the rest."""

from __future__ import annotations

import json
import math

import pytest

from reasonrl import InputError, models
from reasonrl.cli import main
from reasonrl.curate import select
from reasonrl.prm import PRM, Reading
from reasonrl.stepwise import Trace


def pool():
    texts = ["a1", "a2", "a1", "b1", "b2", "c1"]
    finals = [1.0, 0.0, 1.0, None, 1.0, 0.0]
    return [
        Trace(str(i), t[0], [t], final=f)
        for i, (t, f) in enumerate(zip(texts, finals, strict=True))
    ]


SCORES = [0.9, 0.8, 0.9, 0.7, math.nan, 0.1]
REASONS = ["", "", "", "", "too long", ""]


def test_the_best_are_kept_and_the_rest_accounted_for():
    kept, report = select(pool(), SCORES, REASONS, 3)
    assert kept == [0, 1, 3]
    assert report["duplicates"] == [{"id": "2", "same_as": "0"}]
    assert report["unscored"] == [{"id": "4", "reason": "too long"}]
    assert report["lowest_kept"] == 0.7 and report["prompts_kept"] == 2
    assert report["share_right"] == {"pool": pytest.approx(1 / 3), "kept": 0.5}
    assert sum(b["pool"] for b in report["histogram"]) == 4
    assert sum(b["kept"] for b in report["histogram"]) == 3
    assert report["histogram"][-1]["kept"] == 1 and report["histogram"][0]["pool"] == 1


def test_one_of_each_prompt():
    kept, report = select(pool(), SCORES, REASONS, 3, per_prompt=1)
    assert kept == [0, 3, 5] and report["beyond_per_prompt"] == 1
    with pytest.raises(InputError, match="4 asked for, 3 can be kept of 6 answers .1 duplicates"):
        select(pool(), SCORES, REASONS, 4, per_prompt=1)


def test_the_command_writes_data_that_sft_reads(tmp_path, capsys):
    policy = models.load("tiny", layers=1, width=32, heads=2)
    PRM.new(policy, Reading()).save(tmp_path / "prm")
    data = tmp_path / "pool.jsonl"
    rows = [{"prompt": f"{i}+1:", "completion": f"{i + 1}", "answer": str(i + 1)} for i in range(9)]
    data.write_text("".join(json.dumps(r) + "\n" for r in rows))
    out, report = tmp_path / "best.jsonl", tmp_path / "report.json"
    command = ["select", str(tmp_path / "prm"), str(data), "--keep", "4", "--out", str(out)]
    assert main([*command, "--report", str(report), "--how", "mean"]) == 0
    assert "4 of 9 answers" in capsys.readouterr().out
    best = [json.loads(s) for s in out.read_text().splitlines()]
    assert [r["rank"] for r in best] == [1, 2, 3, 4]
    assert [r["score"] for r in best] == sorted((r["score"] for r in best), reverse=True)
    assert all(r["worked"] == "".join(r["completions"]) for r in best)
    assert json.loads(report.read_text())["kept"] == 4
    keys = ["cold_start_steps=2", "cold_start.batch=2", "eval_problems=1"]
    keys += ["task_options={dev: 0.0, test: 0.2}", "model_options={layers: 1, width: 32, heads: 2}"]
    run = ["train", "sft", f"task={out}", "model=tiny", *keys, "--out", str(tmp_path / "run")]
    assert main([*run, "--quiet"]) == 0
    assert main([*command[:-3], "0", "--out", str(out)]) == 2
    assert "--keep: expected >= 1, got 0" in capsys.readouterr().err
