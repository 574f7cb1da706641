"""Every algorithm on two gloo ranks: the losses and weights of one process, also where a run begins
on two and goes on with one, or begins on one and goes on with two."""

from __future__ import annotations

import importlib.util
import math
import shutil
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the cases are what the ranks run, too

import algorithm_cases as cases
from test_distributed import launch, results, unchanged

from reasonrl.algos import ALGOS
from reasonrl.loss import NAMED

CLOSE = 1e-5
KINDS = ("zero1", "zero2", "zero3", "fsdp2")


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
    same(name, out)


def same(name: str, out: Path) -> None:
    """Go on with out/shrunk alone; it and out/grown have the losses and weights of out/one."""
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


@pytest.fixture(scope="module")
def shards(tmp_path_factory, require):
    found = importlib.util.find_spec("deepspeed")
    require("deepspeed", None if found else "pip install 'reasonrl[deepspeed]'")
    out = tmp_path_factory.mktemp("shards")
    cases.alone(out / KINDS[0], cases.SHARDED)
    for kind in KINDS[1:]:
        shutil.copytree(out / KINDS[0], out / kind)
    extra = {"DS_ACCELERATOR": "cpu", "ACCELERATE_USE_DEEPSPEED": "true"}
    return out, results(out, "shards", launch(out, "shards", **extra))


@pytest.mark.parametrize("kind", KINDS)
def test_shards_give_the_run_of_one(kind, shards):
    out, ranks = shards
    backend = "FSDP" if kind == "fsdp2" else "DEEPSPEED"  # accelerate may quietly do without it
    assert [rank[kind]["backend"] for rank in ranks] == [backend] * 2
    for name in cases.SHARDED:
        same(name, out / kind)
        (a, whole), (b, _) = (rank[kind]["held"][name] for rank in ranks)
        cut = kind in ("zero3", "fsdp2")
        assert (a, a + b) == ((whole // 2, whole) if cut else (whole, 2 * whole))


@pytest.mark.parametrize("kind", KINDS)
def test_shards_stay_where_a_step_has_nothing_to_learn_from(kind, shards):
    for rank in shards[1]:
        before, after, norm = rank[kind]["nan"]
        assert unchanged(before, after) and not math.isfinite(norm)
        assert unchanged(*rank[kind]["dead"])
