"""bench ops: no number without a green gate, goals told as found, every case at a small size."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import cases_reward, cases_token, growth, ops, race, tiles  # noqa: E402


def case(sides, **options):
    return race.Case(
        key="k", title="t", make=lambda: {"x": torch.linspace(-1, 1, 64)}, sides=sides,
        truth=lambda x: [x["x"].double().exp()], stock="torch", rounds=2, **options,
    )  # fmt: skip


def stock(x):
    return [x["x"].exp()]


@pytest.mark.parametrize(
    "wrong, text",
    [
        (lambda x: [x["x"].exp() * 1.1], "output 0: error"),
        (lambda x: [x["x"].exp().masked_fill(x["x"] > 0.9, torch.nan)], "output 0: error"),
    ],
)
def test_a_red_gate_leaves_no_number(wrong, text):
    row = race.run(case({"ours": wrong, "torch": stock}))
    ours, other = row["sides"]["ours"], row["sides"]["torch"]
    assert text in ours["reason"] and ours["median"] is None
    assert other["median"] > 0 and "ratio" not in other
    assert "red gate" in ops.text(row | {"goals": []})


def test_a_rival_that_does_not_run_is_named_and_ours_must_run():
    def broken(x):
        raise RuntimeError("no compiler\nlong story")

    row = race.run(case({"ours": stock, "torch": stock, "rival": broken}))
    assert row["sides"]["rival"]["reason"] == "did not run: RuntimeError: no compiler"
    assert row["sides"]["ours"]["median"] > 0
    with pytest.raises(RuntimeError, match="no compiler"):
        race.run(case({"ours": broken, "torch": stock}))


def test_a_wrong_rival_is_not_shown_and_zeros_prove_nothing():
    row = race.run(case({"ours": stock, "torch": stock, "rival": lambda x: [x["x"].exp() + 1]}))
    assert "relative error" in row["sides"]["rival"]["reason"]
    nothing = race.Case(
        "k", "t", lambda: {}, {"ours": zeros, "torch": zeros}, truth=zeros, rounds=1
    )
    assert "nothing but zeros" in race.run(nothing)["sides"]["ours"]["reason"]


def zeros(x):
    return [torch.zeros(3)]


def test_goals_are_told_as_they_were_found():
    goals = [
        race.Goal("far", race.against("torch"), ">=", 1e9),
        race.Goal("near", race.against("torch"), "<=", 1e9),
        race.Goal("absent", race.against("nobody"), ">=", 1.0),
    ]
    row = race.run(case({"ours": stock, "torch": stock}, goals=goals))
    assert [g["met"] for g in row["goals"]] == [False, True, None]
    told = ops.text(row)
    assert "MISSED" in told and "not measured absent" in told


def test_gradients_are_allowed_three_times_the_stock_error():
    def off(factor):
        return lambda x: [x["x"].exp() + factor * 1e-4]

    for factor, gradients, red in ((1.9, 0, False), (2.5, 0, True), (2.5, 1, False)):
        row = race.run(case({"ours": off(factor), "torch": off(1.0)}, gradients=gradients))
        assert bool(row["sides"]["ours"]["reason"]) is red, (factor, gradients)


def test_slope():
    sizes = [2**k for k in range(5, 12)]
    assert abs(growth.slope(sizes, [3e-9 * n for n in sizes]) - 1) < 1e-12
    assert abs(growth.slope(sizes, [1e-9 * n**2 for n in sizes]) - 2) < 1e-12


SMALL = [*cases_token.cases(small=True), *cases_reward.cases(small=True)]


@pytest.mark.parametrize("made", SMALL, ids=lambda c: c.key)
def test_every_token_case_is_green(made, require):
    from reasonrl.kernels import native

    require("native", native.available())
    verdicts = race.gates(made, made.make())
    known = {name: v["reason"] for name, v in verdicts.items()}
    if " " in sys.prefix:  # torch's compiler does not quote its own folders
        known.pop("torch.compile", None)
    assert not any(known.values()), known


MOVED = [c for c in SMALL if not c.key.endswith("/kernel")]  # those take pointers on a CPU


@pytest.mark.parametrize("made", MOVED, ids=lambda c: c.key)
def test_a_case_moved_to_a_device_is_the_same_case(made):
    """ "cpu:0" is not "cpu" by name: inputs are moved and sides run as they would on a GPU."""
    there, x = race.on_device(made, "cpu:0")
    assert not there.goals and set(there.sides) == set(made.sides)
    same = made.make()
    for name in ("ours", made.stock):
        for a, b in zip(there.sides[name](x), made.sides[name](same), strict=True):
            assert torch.equal(a, b)


def test_rounds_on_a_gpu_are_timed_by_do_bench(monkeypatch):
    monkeypatch.setattr(race, "where_of", lambda x: "cuda")
    monkeypatch.setattr(race, "gpu_seconds", lambda side, x: float(side(x)))
    found = race.race({"a": lambda x: 1.0, "b": lambda x: 2.0}, {}, 3, 0)
    assert found == {"a": [1.0] * 3, "b": [2.0] * 3}


def test_a_row_of_tiles_shows_a_ratio_or_what_is_wrong():
    row = {"rows": 512, "width": 64, "vocab": 4096, "keep": True, "chosen": False, "red": ""}
    row |= {"us": {"library": [30.0, 32.0, 90.0], "tiles": [20.0, 16.0, 30.0]}}
    row |= {"ratio": [1.5, 2.0, 3.0]}
    assert "32       20  2.00 (1.50 to 3.00)  (not chosen)" in tiles.shown(row)
    said = tiles.shown(row | {"red": "entropy"})
    assert said.endswith("RED: entropy") and "20" not in said


def test_credits_move_with_their_tensors():
    x = cases_token.core_case(8, 32).make()
    moved = race.placed(x, "meta")
    assert moved["credit"].step.device.type == "meta" and moved["credit"].kind == "grpo"
    assert race.where_of(moved) == "meta" and race.impl_of(moved["logp"]) == "auto"


def test_the_command_writes_what_it_found(tmp_path, require, capsys):
    from reasonrl.kernels import native

    require("native", native.available())
    words = ["--small", "--rounds", "1", "--only", "returns", "--no-memory", "--out", str(tmp_path)]
    assert ops.main(words) == 0
    (path,) = tmp_path.glob("ops-*.json")
    report = json.loads(path.read_text())
    assert [row["key"] for row in report["rows"]] == ["returns", "returns/kernel"]
    assert report["machine"]["threads"] == torch.get_num_threads()
    assert "goal:" in capsys.readouterr().out


def test_memory_is_that_of_a_process_of_its_own():
    options = ops.parser().parse_args(["--small", "--dtypes", "fp32"])
    chosen = cases_token.cases(small=True)[0]
    assert 0 <= ops.apart(options, chosen.key, "ours") < 500
