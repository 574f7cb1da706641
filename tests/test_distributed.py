"""Two gloo ranks on a CPU give the numbers of one process, agree on every decision, and never hang.

The ranks run tests/distributed_worker.py. Sharded weights: test_algorithm_ranks.py.
"""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))  # the worker is a script that we import from too

import distributed_worker as worker

from reasonrl import sharded
from reasonrl.ranks import joined
from reasonrl.records import InputError, Rewards, scored
from reasonrl.replay import again
from reasonrl.train import train

WORLD, TIMEOUT = 2, 300  # seconds; a quiet machine needs about ten
CASES = worker.CASES
TRAINS = [n for n, c in CASES.items() if c.nan_rank is None and n not in ("all dead",)]
TRAINS.remove("no token at all")


def launch(out: Path, kind: str, **extra: str) -> list[subprocess.Popen]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(WORLD):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": WORLD, "MASTER_PORT": port}
        env = os.environ | {k: str(v) for k, v in place.items()} | extra
        env |= {"MASTER_ADDR": "127.0.0.1", "PYTHONPATH": os.pathsep.join(sys.path)}
        env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, worker.__file__, str(out), kind]
        with open(out / f"{kind}-{rank}.log", "w") as log:
            ranks.append(subprocess.Popen(command, env=env, stdout=log, stderr=log))
    return ranks


def results(out: Path, kind: str, ranks: list[subprocess.Popen]) -> list[dict]:
    """What the ranks measured; a rank that fails or hangs fails the test with its log."""
    deadline = time.monotonic() + TIMEOUT
    try:
        while any(r.poll() is None for r in ranks) and not any(r.poll() for r in ranks):
            assert time.monotonic() < deadline, f"{kind}: a rank hangs"
            time.sleep(0.1)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
        logs = [(out / f"{kind}-{rank}.log").read_text()[-3000:] for rank in range(WORLD)]
        print("\n".join(logs))
    assert [r.returncode for r in ranks] == [0] * WORLD, logs
    return [torch.load(out / f"{kind}-{rank}.pt") for rank in range(WORLD)]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks with spaces")


@pytest.fixture(scope="module")
def ddp(out):
    train(worker.small("steps=2"), out / "alone", quiet=True)
    return results(out, "ddp", launch(out, "ddp"))


@pytest.fixture(scope="module")
def alone():
    return {name: worker.run(case, Accelerator(cpu=True)) for name, case in CASES.items()}


def compare(rank: dict, one: dict, tolerance: float) -> None:
    assert len(rank["steps"]) == len(one["steps"]) > 0
    for a, b in zip(rank["steps"], one["steps"], strict=True):
        for name in ("loss", "grad_norm", "tokens", "rows/live", "ratio/mean", "kl"):
            assert a[name] == pytest.approx(b[name], abs=tolerance, rel=tolerance), name
    for name, weight in one["weights"][-1].items():
        torch.testing.assert_close(rank["weights"][-1][name], weight, atol=tolerance, rtol=0)


def unchanged(before: dict, after: dict) -> bool:
    return all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.parametrize("name", TRAINS)
def test_ranks_give_the_step_of_one_process(name, ddp, alone):
    one = alone[name]
    assert not unchanged(one["weights"][0], one["weights"][-1])
    for rank in ddp:
        compare(rank[name], one, 1e-5)
    assert unchanged(ddp[0][name]["weights"][-1], ddp[1][name]["weights"][-1])


def test_the_cases_are_as_uneven_as_they_say(ddp):
    parts = {name: [rank[name]["parts"] for rank in ddp] for name in CASES}
    assert parts["grpo"][0] > parts["grpo"][1] > 1
    assert parts["no group on rank 1"][1] == parts["no token on rank 1"][1] == 0


@pytest.mark.parametrize("name", ["all dead", "no token at all"])
def test_a_step_without_a_live_row_is_a_no_op_on_every_rank(name, ddp, alone):
    for made in (alone[name], *(rank[name] for rank in ddp)):
        assert unchanged(made["weights"][0], made["weights"][-1])
        assert [s["grad_norm"] for s in made["steps"]] == [0.0, 0.0]


def test_momentum_does_not_move_a_step_without_a_live_row(ddp):
    for rank in ddp:
        assert unchanged(*rank["warm, then dead"])


def test_all_ranks_skip_the_nan_of_one(ddp):
    for rank in ddp:
        made = rank["nan on rank 1"]
        assert unchanged(made["weights"][0], made["weights"][-1])
        assert made["stopped"] and len(made["steps"]) == 1  # nan_patience is 2
        assert not torch.tensor(made["steps"][0]["grad_norm"]).isfinite()


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def test_the_cold_start_of_two_ranks_gives_the_weights_of_one(ddp, out, tmp_path):
    config = worker.small("steps=0", "cold_start_steps=3", "optim.eps=1e-5")
    train(config, tmp_path / "cold", quiet=True)
    one, two = (load_file(p / "cold/checkpoint-0/model.safetensors") for p in (tmp_path, out))
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, atol=1e-5, rtol=0)
    for a, b in zip(*(rows(p / "cold", "cold_start.jsonl") for p in (tmp_path, out)), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.parametrize("name", ["run", "one prompt", "alone"])
def test_a_run_of_two_ranks_writes_one_log_and_one_checkpoint(name, ddp, out):
    assert [row["step"] for row in rows(out / name)] == [1, 2, 3]
    found = sorted(p.name for p in (out / name).glob("checkpoint-*"))
    assert found[-1] == "checkpoint-3" and (out / name / found[-1] / "manifest.json").is_file()
    assert not list((out / name).rglob("*.tmp*"))


def test_the_log_shows_the_completions_of_all_ranks(ddp, out):
    table = pyarrow.parquet.read_table(out / "run/completions/completions_00001.parquet")
    assert table.num_rows == 3 * 4 and len(set(table["problem_id"].to_pylist())) == 3
    row = rows(out / "run")[0]
    sizes = [len(ids) for ids in table["completion"].to_pylist()]  # a character is a token
    assert row["reward"] == pytest.approx(sum(table["reward"].to_pylist()) / 12)
    assert row["completions/max_length"] >= max(sizes) and row["tokens"] >= sum(sizes) > 0
    assert row["completions/mean_length"] == pytest.approx(row["tokens"] / 12)


def test_the_bad_batch_of_one_rank_is_kept_with_the_others(ddp, out):
    assert [row["grad_norm"] is None for row in rows(out / "overflow")] == [False, True, False]
    found = again(out / "overflow")
    assert found["step"] == 2 and not math.isfinite(found["grad_norm"]) and found["bad"]
    assert found["tokens"] == rows(out / "overflow")[1]["tokens"]


def test_all_ranks_stop_after_the_same_step(ddp, out):
    assert [row["step"] for row in rows(out / "stopped")] == [1, 2]
    assert (out / "stopped" / "checkpoint-2" / "manifest.json").is_file()


def test_the_first_fsdp_is_refused():
    kind, plugin = SimpleNamespace(value="FSDP"), SimpleNamespace(fsdp_version=1)
    state = SimpleNamespace(fsdp_plugin=plugin)
    with pytest.raises(InputError, match="use fsdp_version: 2"):
        sharded.set_up(SimpleNamespace(distributed_type=kind, state=state))


def test_joined_rollouts_keep_their_groups():
    (left, a), (right, b) = (worker.dealt(CASES["grpo"], rank, 2) for rank in (0, 1))
    none = Rewards([])
    scores = [Rewards([scored(1.0)] * len(r.text), metrics={"m": 2.0}) for r in (left, right)]
    empty = worker.dealt(CASES["no group on rank 1"], 1, 2)
    parts = [(left, scores[0], a), (empty[0], none, empty[1]), (right, scores[1], b)]
    rollout, rewards, advantage = joined(parts)
    assert [p.id for p in rollout.problems] == ["0", "2", "4", "1", "3"]
    owner = [rollout.problems[g].id for g in rollout.group.tolist()]
    assert owner == [*"000", "2", *"44", *"11", *"3333"]
    assert len(rewards.outcome) == len(rollout.text) == 12 and rewards.metrics == {"m": 2.0}
    assert torch.equal(advantage, torch.cat([a, b])) and rollout.sampling_logp is None


def test_a_run_of_two_ranks_goes_on_with_one(ddp, out):
    assert train(worker.small("steps=4"), out / "run", resume=True, quiet=True)
    assert [row["step"] for row in rows(out / "run")] == [1, 2, 3, 4]
