"""`bench loop`: its gate sees another text, its numbers come from the rounds, and it runs."""

import json
from dataclasses import replace

import pytest

from bench import loop
from bench.__main__ import main
from bench.step_ours import Ours, Settings

SMALL = "--model tiny --prompts 1 --group 2 --tokens 4 --prompt-tokens 8 --repeats 1 --dtype fp32"


def test_all_parts_but_memory(tmp_path, capsys):
    words = [*SMALL.split(), "--parts", "rollout", "decode", "update", "growth"]
    assert main(["loop", *words, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("loop-*.json")
    parts = json.loads(path.read_text())["parts"]
    shown = capsys.readouterr().out
    for part in ("rollout", "decode", "update"):
        low, high = parts[part]["range"]
        assert low <= parts[part]["ratio"] <= high
        assert f"{part}: {parts[part]['ratio']:.2f}" in shown
    assert list(parts["growth"]["completions"]) == ["2", "4", "8"]
    assert list(parts["growth"]["length"]) == ["4", "8", "16"]


def test_another_text_is_a_red_gate(monkeypatch, capsys):
    plain = loop.generate
    monkeypatch.setattr(loop, "generate", lambda *a, **k: plain(*a, **k) + 1)
    assert main(["loop", *SMALL.split(), "--parts", "rollout"]) == 1
    out = capsys.readouterr().out
    assert out.startswith("red: prompt 0: greedy [") and "times generate" not in out


def test_the_bare_products_are_those_of_all_linear_layers():
    ours = Ours(replace(Settings(model="tiny"), repeats=0), "fp32")
    layers = loop.linears(ours.policy.model)
    assert ours.policy.head in layers
    assert len(layers) == 7 * ours.policy.model.config.num_hidden_layers + 1


def test_the_memory_of_an_update_is_that_of_a_process(capsys):
    assert main(["loop", *SMALL.split(), "--alone"]) == 0
    assert int(capsys.readouterr().out) > 100  # MiB


def test_ratios_are_paired_by_round():
    found = loop.ratio([2.0, 3.0, 8.0], [1.0, 3.0, 2.0])
    assert found == {"ratio": 2.0, "range": [1.0, 4.0], "seconds": [3.0, 2.0]}


def test_a_part_that_does_not_exist():
    with pytest.raises(SystemExit):
        main(["loop", "--parts", "sampling"])
