"""Two gloo ranks of which one, or both, die at drawn moments: whoever is left ends with a named
error in bounded time, and what the run comes to is what an unbroken run of two ranks leaves.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_distributed import launch
from test_kill import KINDS, PATIENCE, equal, kept, left, server  # noqa: F401 - a fixture

from reasonrl.checkpoint import checkpoints
from reasonrl.ranks import named_loss
from reasonrl.records import NonFiniteStop, RankLost
from reasonrl.tasks.base import Draws

KIND = "the policy's own reference"  # a filter, two updates; a memory is refused with two ranks
BOUND = 40  # seconds a survivor may take: half a second; `stall` where the other never came


def draw(draws: Draws, events: list[int]) -> dict:
    rank = draws.choice((0, 1, None))
    if draws.below(3) == 0:
        return {"after": draws.below(1500) / 1000, "rank": rank}
    total = events[rank or 0]
    return {"event": 1 + draws.below(total if draws.below(3) == 0 else total // 3), "rank": rank}


def survivor(log: Path) -> str:
    """Its last line."""
    lines = [line for line in log.read_text().splitlines() if line.startswith("reasonrl: ")]
    return lines[-1] if lines else log.read_text()


def proof(server, folder: Path, kills: int) -> None:  # noqa: F811
    draws, ends = Draws("ranks", kills), Counter()
    out = folder / "whole"
    whole = server.attempt(out, KIND, None, False, "stall=20", ranks=2)
    assert whole["status"] == [0, 0], (survivor(Path(f"{out}.log.0")), whole)
    wanted, slowest = left(out), 0.0
    assert [r["step"] for r in wanted["rows"]["metrics.jsonl"]] == [1, 2, 3, 4, 5]
    while ends.total() < kills:
        out, step = folder / f"broken {ends.total()}", -1
        for tried in range(PATIENCE + 1):
            kill = draw(draws, whole["events"]) if tried < PATIENCE else None
            resume = bool(checkpoints(out))
            end = server.attempt(out, KIND, kill, resume, "stall=20", ranks=2)
            if end["status"] == [0, 0]:
                break
            assert kill is not None, end
            slowest = max(slowest, end["seconds"])
            ends[f"rank {kill['rank']}"] += 1
            for rank, status in enumerate(end["status"]):
                if kill["rank"] in (rank, None):
                    assert status in (-9, 0, 5), end  # 0, 5: it was through before its turn came
                    continue
                if status == 0:  # the other died behind the last collective
                    assert checkpoints(out)[0][0] == 5, end
                    continue
                said = survivor(Path(f"{out}.log.{rank}"))
                assert status == 5 and "another rank is gone" in said, (end, said)
                assert "start all ranks again with --resume" in said
            step = kept(out, wanted, step) if out.exists() else step
        equal(left(out), wanted)
        shutil.rmtree(out)
    print(dict(ends), f"slowest {slowest:.1f} s")
    assert slowest < BOUND


def test_6_kills_of_two_ranks(server, tmp_path):  # noqa: F811
    proof(server, tmp_path, 6)


@pytest.mark.torture
def test_200_kills_of_two_ranks(server, tmp_path):  # noqa: F811
    proof(server, tmp_path, 200)


def test_a_rank_that_never_comes(server, tmp_path):  # noqa: F811
    kill = {"after": 0.0, "rank": 1}
    end = server.attempt(tmp_path / "run", KIND, kill, False, "stall=4", ranks=2)
    assert end["status"] == [5, -9] and end["seconds"] < BOUND
    said = survivor(tmp_path / "run.log.0")
    assert "another rank is gone or silent; start all ranks again with --resume" in said


@pytest.mark.parametrize("rank", [0, 1])
def test_the_command_itself_ends_with_status_5(rank, tmp_path):
    """Real processes, without the server that forks them."""
    ranks = launch(tmp_path, "long")
    run = tmp_path / "long"
    deadline = time.monotonic() + 120
    while not (run / "checkpoint-2").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(ranks[rank].pid, signal.SIGKILL)
    try:
        status = ranks[1 - rank].wait(BOUND)
    finally:
        for process in ranks:
            process.kill()
    said = (tmp_path / f"long-{1 - rank}.log").read_text()
    assert status == 5, said
    assert re.search(rf"reasonrl: {run}: another rank is gone or silent; .*--resume", said)
    assert "Traceback" not in said


def test_only_what_a_collective_says_of_a_peer_is_taken_for_a_lost_rank(tmp_path):
    for error in (ValueError("socket"), NonFiniteStop("connection closed"), RuntimeError("shape")):
        with pytest.raises(type(error)) as caught, named_loss(tmp_path):
            raise error
        assert caught.value is error
    for error in (
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer"),
        RuntimeError("Timed out waiting 1800000ms for recv operation to complete"),
        torch.distributed.DistBackendError("NCCL communicator was aborted"),
        torch.distributed.DistNetworkError("The client socket has timed out"),
    ):
        with pytest.raises(RankLost, match="another rank is gone"), named_loss(tmp_path):
            raise error
