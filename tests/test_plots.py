"""Pictures: their numbers against ones worked out here, what is refused, what is drawn."""

from __future__ import annotations

import json
import math

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from reasonrl import InputError
from reasonrl.cli import main
from reasonrl.config import Config
from reasonrl.plot_data import (
    T95,
    Line,
    Panel,
    curves,
    expand,
    history,
    mean_lines,
    spread95,
    trailing_error,
    trailing_mean,
)
from reasonrl.plot_scores import best_of_n, calibration, credit, reliability, selection, statistics
from reasonrl.plots import COLOURS, draw


def make_run(path, rewards, evals=(), **config):
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(Config(**config).to_yaml())
    rows = [{"step": i, "reward": r, "kl": 0.1 * i} for i, r in enumerate(rewards, 1)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = [{"step": s, "eval/accuracy": a, "eval/accuracy_se": 0.01} for s, a in evals]
    (path / "evals.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def status(*words) -> int:
    return main(["plot", *map(str, words)])


def student_quantile(freedom: int) -> float:
    """The 97.5 % point by integrating Student's density from 0 until .475 are there."""
    x = np.linspace(0, 14, 1_400_001)
    density = (1 + x * x / freedom) ** (-(freedom + 1) / 2)
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2))
    density *= scale / math.sqrt(freedom * math.pi)
    area = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)]) * (x[1] - x[0])
    return float(np.interp(0.475, area, x))


@pytest.mark.parametrize("freedom", [1, 2, 7, 30])
def test_intervals_use_students_quantiles(freedom):
    assert T95[freedom - 1] == pytest.approx(student_quantile(freedom), abs=2e-3)


def test_an_interval_by_hand():
    mean, half = spread95([1.0, 2.0, 3.0])  # std 1, so 4.303 / sqrt(3)
    assert (mean, half) == pytest.approx((2.0, 2.4843), abs=1e-3)
    assert math.isnan(spread95([1.0])[1])


def test_a_trailing_mean_passes_over_gaps():
    found = trailing_mean([2.0, math.nan, 4.0, 6.0], 2)
    assert found == [2.0, 2.0, 4.0, 5.0]
    errors = trailing_error([0.3, 0.4, math.nan, 0.1], 2)  # of a mean of two: sqrt(.09 + .16) / 2
    assert errors == pytest.approx([0.3, 0.25, 0.4, 0.1])
    assert math.isnan(trailing_error([math.nan], 2)[0])


def test_a_reward_with_its_standard_error_is_a_band(tmp_path):
    run = make_run(tmp_path / "a", [])
    rows = [{"step": s, "reward": 0.5, "reward_se": 0.3 + s / 10} for s in (0, 1)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (line,) = curves([history(run)], ["reward"])[0].lines
    assert line.high == pytest.approx([0.5 + 1.96 * 0.3, 0.5 + 1.96 * 0.4], abs=1e-4)
    (line,) = curves([history(run)], ["reward"], smooth=2)[0].lines
    assert line.low == pytest.approx([0.5 - 1.96 * 0.3, 0.5 - 1.96 * 0.25], abs=1e-4)


def test_a_run_is_a_line_and_evaluations_have_their_standard_error(tmp_path):
    run = history(make_run(tmp_path / "a", [0.1, 0.3, 0.5], [(0, 0.2), (3, 0.4)]))
    reward, accuracy = curves([run], ["reward", "eval/accuracy"], smooth=2)
    assert reward.ylabel == "reward, mean of 2" and accuracy.ylabel == "eval/accuracy"
    (line,) = reward.lines
    assert line.label == "a" and line.x == [1, 2, 3] and line.low is None
    assert line.y == pytest.approx([0.1, 0.2, 0.4])
    (line,) = accuracy.lines
    assert line.x == [0, 3] and line.y == [0.2, 0.4]
    assert line.low == pytest.approx([0.1804, 0.3804]) and line.high[1] == pytest.approx(0.4196)


def test_runs_that_differ_in_the_seed_are_their_mean(tmp_path):
    for seed, rewards in ((1, [0.0, 0.2, 0.9]), (2, [0.2, 0.4]), (3, [0.4, 0.6, 0.8])):
        make_run(tmp_path / f"a-{seed}", rewards, seed=seed)
    make_run(tmp_path / "b", [0.5, 0.5], seed=1, algorithm="process")
    runs = [history(p) for p in expand([f"{tmp_path}/a-*", f"{tmp_path}/b"])]
    (panel,) = curves(runs, ["reward"], by=["algorithm"])
    grpo, process = panel.lines
    assert grpo.label == "algorithm=grpo (3 runs)" and process.label == "algorithm=process"
    assert grpo.x == [1, 2]  # the steps that all three have
    assert grpo.y == pytest.approx([0.2, 0.4])
    half = 4.303 * 0.2 / math.sqrt(3)
    assert grpo.low == pytest.approx([0.2 - half, 0.4 - half])
    assert process.low is None


def test_runs_that_differ_in_more_are_not_averaged(tmp_path):
    runs = [
        history(make_run(tmp_path / "a", [0.1], seed=1, learning_rate=1e-5)),
        history(make_run(tmp_path / "b", [0.3], seed=2, learning_rate=1e-4)),
    ]
    with pytest.raises(InputError, match="differ in 'learning_rate' as well"):
        curves(runs, ["reward"], by=["algorithm"])
    over = ["seed", "learning_rate"]
    (panel,) = curves(runs, ["reward"], by=["algorithm"], over=over)
    assert panel.lines[0].y == pytest.approx([0.2])
    (panel,) = curves(runs, ["reward"], by=["learning_rate"])
    assert [line.label for line in panel.lines] == ["learning_rate=1e-05", "learning_rate=0.0001"]
    with pytest.raises(InputError, match="no such config key"):
        curves(runs, ["reward"], by=["lr"])


def test_refusals_say_what_there_is(tmp_path, capsys):
    run = make_run(tmp_path / "a", [0.1, 0.2], [(0, 0.5)])
    empty = make_run(tmp_path / "empty", [])
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "notes.txt").write_text("")
    out = tmp_path / "x.png"
    cases = [
        ((run, "--metrics", "nope", "--out", out), ["'nope'", "eval/accuracy", "kl, reward"]),
        ((empty, "--out", out), ["metrics.jsonl", "at least one whole step"]),
        ((bare, "--out", out), ["metrics.jsonl", "notes.txt"]),
        ((tmp_path / "no", "--out", out), ["no such run folder"]),
        ((f"{tmp_path}/none-*", "--out", out), ["matches nothing"]),
        ((run, "--out", tmp_path / "x.jpeg"), [".png, .svg or .pdf", ".jpeg"]),
        ((run, "--out", tmp_path / "x"), ["no suffix"]),
        ((run, "--metrics", "reward,,kl", "--out", out), ["--metrics"]),
        ((run, "--smooth", "0", "--out", out), ["--smooth"]),
        ((run, "--over", "seed", "--out", out), ["--by"]),
        ((run, "--level", "step", "--out", out), ["--level", "calibration"]),
        ((run, "--kind", "credit", "--metrics", "kl", "--out", out), ["--metrics", "curves"]),
        ((run, "--kind", "credit", "--out", out), ["completions_*.parquet"]),
        ((run / "config.yaml", "--kind", "best-of-n", "--out", out), ["config.yaml"]),
    ]
    for words, expected in cases:
        assert status(*words) == 2, words
        line = capsys.readouterr().err
        assert line.count("\n") == 1 and all(e in line for e in expected), line
    assert not out.exists()


def test_a_torn_last_row_is_said_and_left_out(tmp_path, capsys):
    run = make_run(tmp_path / "a", [0.1, 0.2])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    found = history(run)
    assert found.values["reward"] == {1: 0.1, 2: 0.2} and "torn" in found.notes[0]
    assert status(run, "--out", tmp_path / "x.svg") == 0
    assert "metrics.jsonl: the last row is torn" in capsys.readouterr().err
    (run / "metrics.jsonl").write_text('{"step": 1, "re')  # nothing whole is left
    assert status(run, "--out", tmp_path / "y.svg") == 2
    (run / "metrics.jsonl").write_text('{"step": 1, "re\n{"step": 2}\n')  # torn inside
    assert status(run, "--out", tmp_path / "y.svg") == 2
    assert "row 1" in capsys.readouterr().err


def test_what_was_not_finite_is_a_gap(tmp_path):
    run = make_run(tmp_path / "a", [0.1])
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 2, "reward": None, "nonfinite_metrics": ["reward"]}) + "\n")
    assert math.isnan(history(run).values["reward"][2])


def completions(path, step, rows):
    folder = path / "completions"
    folder.mkdir(exist_ok=True)
    columns = ("step_rewards", "step_advantages", "outcome")
    table = [dict(zip(columns, row, strict=True)) for row in rows]
    file = folder / f"completions_{step:05d}.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), file)


def test_step_credit(tmp_path, capsys):
    run = make_run(tmp_path / "a", [0.1] * 4)
    for step in range(1, 5):
        rows = [([1.0, 0.0], [0.5, 0.25], 1.0), ([step / 4, 0.0], [-1.0, -1.0], 0.0)]
        completions(run, step, rows)
    (rewards, advantages), table = credit([run])
    first, last = rewards.lines
    assert first.label == "a, step 1" and last.label == "a, step 4"
    assert first.x == [1, 2] and first.y == pytest.approx([0.625, 0.0])
    assert last.y == pytest.approx([1.0, 0.0])
    assert advantages.lines[0].y == pytest.approx([-0.25, -0.375])
    # step 1: one right step (paid), three wrong ones, one of them paid; the right answer is lucky
    numbers = {k: v for k, v in table[0].items() if k not in ("run", "steps")}
    assert numbers == pytest.approx(
        {
            "completions": 2,
            "steps_mean": 2.0,
            "reward_mean": 0.3125,
            "right_but_blamed": 0.0,
            "wrong_but_paid": 1 / 3,
            "lucky": 1.0,
        }
    )
    assert table[1]["right_but_blamed"] == 0.5  # at step 4 the second completion's first is right
    assert status(run, "--kind", "credit", "--out", tmp_path / "c.pdf") == 0
    assert "| a | step 4 |" in capsys.readouterr().out


def test_places_seen_once_and_unknown_rewards_stay_out():
    line = mean_lines("x", [[1.0, None, 5.0], [3.0, 4.0], [2.0, 6.0]])
    assert line.x == [1, 2] and line.y == pytest.approx([2.0, 5.0])
    unknown = [{"step_rewards": [None], "step_advantages": [1.0], "outcome": None}]
    assert math.isnan(statistics(unknown)["lucky"])


def test_calibration_by_hand():
    # bin [.2, .3): scores .2 and .28, one right; bin [.9, 1]: 1.0 right and .9 wrong
    found = reliability([(0.2, 1.0), (0.28, 0.0), (1.0, 1.0), (0.9, 0.0)])
    assert [b["n"] for b in found["bins"]] == [2, 2]
    assert found["ece"] == pytest.approx(0.5 * abs(0.5 - 0.24) + 0.5 * abs(0.5 - 0.95))


def scored(path, rows):
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def score_row(i, scores, labels, final, **more):
    row = {"id": str(i), "prompt": f"p{i // 2}", "completions": ["a"] * len(labels)}
    row |= {"labels": labels, "final": final, "step_scores": scores}
    return row | {"score": None if scores is None else sum(scores)} | more


def test_calibration_of_scored_rows(tmp_path, capsys):
    rows = [
        score_row(0, [0.95, 0.15], [True, False], 0.0),
        score_row(1, [0.95, 0.85], [True, True], 1.0),
        score_row(2, None, [True], 1.0),
    ]
    path = scored(tmp_path / "s.jsonl", rows)
    curve, shares = calibration([path], "step")
    assert curve.lines[0].x == pytest.approx([0.15, 0.85, 0.95]) and curve.lines[0].y == [0, 1, 1]
    # 1/4 |0 - .15| + 1/4 |1 - .85| + 2/4 |1 - .95|
    assert curve.lines[0].label == "s: ECE 0.100, n = 4, 1 unscored"
    right, wrong = shares.lines
    assert wrong.dashed and sum(wrong.y) == 1 and right.y[9] == pytest.approx(2 / 3)
    curve, _ = calibration([path], "answer", "min")
    assert curve.lines[0].x == pytest.approx([0.15, 0.85])
    out = tmp_path / "c.png"
    assert status(path, "--kind", "calibration", "--level", "answer", "--out", out) == 0
    bad = [score_row(0, [1.5], [True], 1.0)]
    for rows, said in (
        (bad, "in 0..1, got 1.5"),
        ([score_row(0, None, [True], 1.0)], "no row has a score"),
        ([{k: v for k, v in score_row(0, [0.5], [True], 1.0).items() if k != "labels"}], "labels"),
        ([{"prompt": "p", "completions": ["a"], "labels": [True]}], "step_scores"),
    ):
        bad_path = scored(tmp_path / "bad.jsonl", rows)
        assert status(bad_path, "--kind", "calibration", "--out", out) == 2
        assert said in capsys.readouterr().err


def test_best_of_n_from_rows_and_from_json(tmp_path, capsys):
    # each problem: a wrong answer with the better score first, so N = 2 by min is always wrong
    rows = [score_row(i, [0.9 - 0.1 * (i % 2)], [True], float(i % 2)) for i in range(4)]
    (panel,) = best_of_n(scored(tmp_path / "s.jsonl", rows))
    lines = {line.label: line for line in panel.lines}
    assert lines["prm_min"].x == [1, 2] and lines["prm_min"].y == [50.0, 0.0]
    assert lines["oracle"].y == [50.0, 100.0] and lines["oracle"].dashed
    points = [{"accuracy": 0.5, "low": 0.4, "high": 0.6}]
    found = {"n": [4], "problems": 2, "curves": {"prm_min": points}}
    (tmp_path / "b.json").write_text(json.dumps(found))
    (panel,) = best_of_n(tmp_path / "b.json")
    assert panel.lines[0].low == [40.0] and panel.log2
    (tmp_path / "c.json").write_text("[]")
    for name in ("c.json", "none.json"):
        where, out = tmp_path / name, tmp_path / "x.png"
        assert status(where, "--kind", "best-of-n", "--out", out) == 2
        assert name in capsys.readouterr().err


def test_selection_counts(tmp_path):
    bins = [{"from": 0.0, "pool": 3, "kept": 0}, {"from": 0.5, "pool": 2, "kept": 2}]
    report = tmp_path / "r.json"
    report.write_text(json.dumps({"answers": 9, "kept": 2, "histogram": bins}))
    (panel,) = selection([report])
    assert panel.width == 0.5 and [line.label for line in panel.lines] == ["pool (5)", "kept (2)"]
    assert status(report, "--kind", "selection", "--out", tmp_path / "r.png") == 0
    report.write_text("{}")
    with pytest.raises(InputError, match="histogram"):
        selection([report])


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_equal_panels_give_equal_bytes(suffix, tmp_path):
    lines = [Line("_a $x_1$", [1, 2], [0.1, 0.2], [0.0, 0.1], [0.2, 0.3]), Line("b", [1], [0.2])]
    pair = [tmp_path / f"{name}.{suffix}" for name in "ab"]
    for path in pair:
        draw([Panel("step", "reward_$", lines)], path)
    assert pair[0].read_bytes() == pair[1].read_bytes()
    head = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert pair[0].read_bytes().startswith(head)


def test_labels_are_shown_as_written(tmp_path):
    """No mathematics in a `$`, and a leading underscore does not hide a line from the legend."""
    lines = [Line("_a $x_1$", [1, 2], [0.1, 0.2]), Line("b", [1, 2], [0.2, 0.1])]
    draw([Panel("step", "reward", lines)], tmp_path / "a.svg")
    plain = (tmp_path / "a.svg").read_text()
    assert plain.count(COLOURS[0].lower()) >= 2  # the line and its key
    assert "_a $x_1$" in plain


def test_colours_differ_in_lightness_or_hue_and_there_is_an_end_to_them(tmp_path):
    assert len(set(COLOURS)) == 7
    lines = [Line(str(i), [1], [i]) for i in range(22)]
    with pytest.raises(InputError, match="22 lines cannot be told apart"):
        draw([Panel("step", "y", lines)], tmp_path / "a.png")
