"""Every algorithm on two gloo ranks: the losses and weights of one process, also where a run begins
on two and goes on with one, or begins on one and goes on with two."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the cases are what the ranks run, too

import algorithm_cases as cases
from test_distributed import launch, results

from reasonrl.algos import ALGOS
from reasonrl.loss import NAMED

CLOSE = 1e-5


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("algorithms")
    cases.alone(out)
    results(out, "algorithms", launch(out, "algorithms"))
    return out


def test_no_algorithm_and_no_loss_is_left_out():
    changes = [change for case in cases.CASES.values() for change in case]
    used = {c.removeprefix("algorithm=") for c in changes if c.startswith("algorithm=")}
    assert used | {"grpo"} == set(ALGOS) and set(cases.NAMED) == set(NAMED)


@pytest.mark.parametrize("name", cases.CASES)
def test_two_ranks_give_the_run_of_one(name, out):
    cases.go(name, out, "shrunk", 4, resume=True)
    one = cases.rows(out / "one" / name)
    first, last = (cases.weights(out / "one" / name, step) for step in (2, 4))
    moved = {key.split()[0] for key in last if not torch.equal(first[key], last[key])}
    assert "model.safetensors" in moved
    assert any(file.startswith("prm") for file in moved) == name.startswith("prime")
    for kind in ("shrunk", "grown"):
        found = cases.rows(out / kind / name)
        assert [row["step"] for row in found] == [1, 2, 3, 4]
        for a, b in zip(found, one, strict=True):
            for key in ("loss", "grad_norm", "reward", "tokens", "num_tokens", "rows/live"):
                assert a[key] == pytest.approx(b[key], abs=CLOSE, rel=CLOSE), (kind, key)
        for step in (2, 4):
            wanted, got = (cases.weights(out / k / name, step) for k in ("one", kind))
            assert wanted.keys() == got.keys()
            for key, weight in wanted.items():
                torch.testing.assert_close(got[key], weight, atol=CLOSE, rtol=0)


def test_a_rank_was_left_empty_by_the_filter(out):
    found = cases.owners(out / "shrunk" / "grpo filter")[:2]
    found += cases.owners(out / "grown" / "grpo filter")[2:]
    assert any(len(ranks) == 1 for ranks in found) and {0, 1} in found
