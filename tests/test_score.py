"""Best-of-N curves, the two benchmarks, and the commands that use a process reward model."""

from __future__ import annotations

import json

import pytest

from reasonrl import InputError, benchmarks, models
from reasonrl.cli import main
from reasonrl.curves import candidate, curves, difference
from reasonrl.prm import PRM, Reading, Scored

SMALL = {"layers": 1, "width": 32, "heads": 2}


def test_curves_by_hand():
    """Two problems, four completions each; lots of one, two and four are decided apart."""
    first = [
        candidate("#1", False, [0.9, 0.2], 0.9),  # min .2
        candidate("#2", True, [0.6, 0.5], 0.5),  # min .5
        candidate("#1", False, [0.4, 0.4], 0.4),
        candidate("#2", True, [0.1, 0.1], 0.1),
    ]
    second = [candidate("#3", True, [], float("nan"))] + [candidate("#4", False, [0.1], 0.1)] * 3
    found = curves([first, second], ["min", "total"], "min")
    assert found["n"] == [1, 2, 4] and found["problems"] == 2
    points = {name: [p["accuracy"] for p in c] for name, c in found["curves"].items()}
    assert points["prm_min"] == pytest.approx([(0.5 + 0.25) / 2, (0.5 + 0) / 2, 0.5])
    assert points["prm_total"] == pytest.approx([0.375, 0.0, 0.0])
    # first: 1 and 2 tie in each pair and at four, the earlier wins; second: 3 ties 4, then loses
    assert points["majority"] == pytest.approx([0.375, 0.25, 0.0])
    assert points["weighted"] == pytest.approx([0.375, 0.25, 0.0])
    assert points["oracle"] == pytest.approx([0.375, 0.75, 1.0])
    for curve in found["curves"].values():
        assert all(p["low"] <= p["accuracy"] <= p["high"] for p in curve)
    # a problem with fewer completions is decided on all it has
    found = curves([first, second[:3]], ["min"], "min")
    assert found["n"] == [1, 2, 4] and found["curves"]["oracle"][2]["accuracy"] == 1.0
    gap = difference([first, second], "min", 4)
    assert gap["accuracy"] == 0.5 and gap["low"] == 0.0 and gap["high"] == 1.0
    with pytest.raises(InputError, match="at least one problem"):
        curves([], ["min"], "min")


class Fixed:
    """A model that gives every trace the scores written in its steps."""

    def score(self, traces, tokens=0):
        out = []
        for trace in traces:
            known = [float(s) for s in trace.steps if s.strip() != "?"]
            whole = len(known) == len(trace.steps)
            out.append(Scored(known, None) if whole else Scored([], None, "not read"))
        return out


def lines(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_processbench(tmp_path, monkeypatch):
    rows = [
        {"id": "a", "problem": "p", "steps": ["0.9", "0.3"], "label": 1},
        {"id": "b", "problem": "p", "steps": ["0.9", "0.8"], "label": -1},
        {"id": "c", "problem": "p", "steps": ["0.45", "0.9"], "label": -1},
        {"id": "d", "problem": "p", "steps": ["0.2", "0.1"], "label": 1},
        {"id": "e", "problem": "p", "steps": ["?"], "label": 0},
    ]
    # a and c choose the threshold: .31 is the first that gets both right
    monkeypatch.setattr(benchmarks, "content_share", lambda id: 0.0 if id in "ac" else 1.0)
    found = benchmarks.run(Fixed(), "processbench", lines(tmp_path / "b.jsonl", rows))
    assert found["threshold"] == 0.31 and not found["same_rows"]
    # judged on b (right: no step below) and d (wrong: points at step 0, the error is at 1)
    assert (found["error_accuracy"], found["correct_accuracy"], found["f1"]) == (0.0, 1.0, 0.0)
    assert found["unscored"] == 1 and found["reasons"] == ["row 5: not read"]
    monkeypatch.setattr(benchmarks, "content_share", lambda id: 0.0 if id in "bd" else 1.0)
    found = benchmarks.run(Fixed(), "processbench", lines(tmp_path / "b.jsonl", rows))
    # from .11 on d's first low step is the wrong one; there a's error is not seen
    assert found["threshold"] == 0.11 and found["correct_accuracy"] == 1.0 and found["f1"] == 0.0
    nine = found["calibration"]["bins"][9]
    assert nine["steps"] == 3 and nine["right"] == 1.0 and nine["score"] == pytest.approx(0.9)


def test_prmbench(tmp_path):
    rows = [
        {"question": "q", "modified_process": ["0.9", "0.4", "0.8"], "error_steps": [2, 3]},
        {"question": "q", "modified_process": ["0.3"], "error_steps": [], "classification": "x"},
    ]
    found = benchmarks.run(Fixed(), "prmbench", lines(tmp_path / "b.jsonl", rows))
    # steps: right .9 (hit), .3 (missed); wrong .4 (hit), .8 (missed)
    assert found["f1"] == 0.5 and found["negative_f1"] == 0.5 and found["prm_score"] == 0.5
    assert found["step_accuracy"] == 0.5
    assert found["classes"]["all"]["negative_f1"] == pytest.approx(2 / 3)
    assert found["classes"]["x"]["prm_score"] == 0.0


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        ("processbench", {"problem": "p", "steps": ["a"], "label": 1}, "'label': expected -1..0"),
        ("processbench", {"problem": "p", "steps": ["a"]}, "'label': expected -1..0, got None"),
        ("processbench", {"steps": ["a"], "label": 0}, "'problem': expected a value"),
        ("processbench", {"problem": "p", "steps": ["a", ""], "label": 0}, "step 1: expected"),
        (
            "prmbench",
            {"question": "p", "modified_process": ["a"], "error_steps": [0]},
            "1..1, got 0",
        ),
        ("judgebench", {"a": 1}, "expected processbench or prmbench, got 'judgebench'"),
    ],
)
def test_benchmark_rows_are_checked(tmp_path, name, row, says):
    with pytest.raises(InputError, match=says):
        benchmarks.run(Fixed(), name, lines(tmp_path / "b.jsonl", [row]))


TINY = ["task_options={terms: 3, ops: '+-', mod: 7, low: 0, high: 6, style: compact}"]
TINY += ["model_options={layers: 1, width: 32, heads: 2}", "max_completion_length=16", "dtype=fp32"]


def test_from_a_policy_to_curves_by_commands(tmp_path, capsys):
    """label -> prm train -> score -> best-of-n, as a newcomer would."""
    data, run, scores = tmp_path / "rows.jsonl", tmp_path / "prm", tmp_path / "scores.jsonl"
    label = ["prm", "label", "tiny", *TINY, "--problems", "6", "--group", "4"]
    assert main([*label, "--out", str(data)]) == 0
    rows = [json.loads(s) for s in data.read_text().splitlines()]
    assert rows and all(len(r["labels"]) == len(r["completions"]) for r in rows)
    assert {r["problem_id"] for r in rows} <= {f"arithmetic-1-train-{i}" for i in range(6)}
    assert main([*label, "--out", str(tmp_path / "again.jsonl")]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == data.read_bytes()
    whole = [r for r in rows if sum(x["problem_id"] == r["problem_id"] for x in rows) == 4]
    lines(data, whole)
    body = tmp_path / "body"
    policy = models.load("tiny", **SMALL)
    policy.model.save_pretrained(body)
    policy.tokenizer.save_pretrained(body)
    keys = [f"model={body}", "steps=3", "batch_traces=4", "delimiter=';'", "dtype=fp32"]
    assert main(["prm", "train", str(data), *keys, "--out", str(run), "--quiet"]) == 0
    assert "eval/step_accuracy" in capsys.readouterr().out
    assert main(["score", str(run), str(data), "--out", str(scores)]) == 0
    for row in map(json.loads, scores.read_text().splitlines()):
        assert len(row["step_scores"]) == len(row["completions"]) and row["reason"] is None
        mean = sum(row["step_scores"]) / len(row["step_scores"])
        assert row["score"] == pytest.approx(mean + row["final_score"])
    out, picture = tmp_path / "bon.json", tmp_path / "bon.png"
    command = ["best-of-n", str(run), str(data), "--out", str(out)]
    assert main(command) == 0
    found = json.loads(out.read_text())
    assert found["n"] == [1, 2, 4] and set(found["curves"]) >= {"prm_min", "majority", "oracle"}
    assert "| majority |" in capsys.readouterr().out
    assert main([*command, "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_bad_use_is_one_line(tmp_path, capsys):
    prm = PRM.new(models.load("tiny", **SMALL), Reading())
    prm.save(tmp_path / "prm")
    data = lines(tmp_path / "rows.jsonl", [{"prompt": "p", "completion": "a"}])
    for command, says in [
        (["score", str(tmp_path / "prm")], "expected a data file or --benchmark"),
        (["score", "/nowhere", str(data)], "prm /nowhere: no such folder"),
        (["best-of-n", str(tmp_path / "prm"), str(data)], "row 1: field 'final'"),
        (["prm", "train", str(data), "--out", str(tmp_path / "x")], "row 1: field 'labels'"),
        (["prm", "train", str(data), "stepz=3", "--out", "x"], "did you mean 'steps'"),
        (["prm", "label", "tiny", "--out", "x", "--problems", "0"], "--problems: expected >= 1"),
    ]:
        assert main(command) == 2, command
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1, error
