"""A disk that is full while a run writes: metrics, tables, checkpoints, the reference, the batch
kept for replay. The run ends with status 2 and one line that names the path and says what to do,
loses no checkpoint, and goes on to what an unbroken run leaves, bit for bit.

Two kinds of full: a tmpfs with so many bytes for all (in a mount namespace, no root needed), and
ENOSPC from a drawn operation on, which reaches every file.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import test_replay
from test_kill import KINDS, Server, equal, kept, left, once

from reasonrl import checkpoint, models
from reasonrl.algos import GRPO
from reasonrl.checkpoint import checkpoints
from reasonrl.cli import main
from reasonrl.records import InputError
from reasonrl.tasks.base import Draws

KIND = list(KINDS)[0]
PLENTY = 1 << 28
MOUNT = 'mount -t tmpfs -o size=$1 full "$2" && shift 2 && exec "$@"'


def named(log: Path, out: str) -> str:
    """The last line of the log says where and what to do; for which kind of file."""
    line = log.read_text().strip().splitlines()[-1]
    assert line.startswith(f"reasonrl: {out}"), line
    assert "o space left" in line and "make room, then go on with --resume" in line
    assert "Traceback" not in log.read_text()
    kind = re.search(r"for (checkpoint)|([\w.]+): cannot", line)
    assert kind
    return re.sub("[0-9]+", "N", kind[1] or kind[2])


@pytest.fixture(scope="module")
def disk(require, tmp_path_factory):
    """A server whose runs lie on a tmpfs, and the folder as seen from here and from there."""
    folder = tmp_path_factory.mktemp("disk")
    within = ["unshare", "-rm", "sh", "-c", MOUNT, "sh", str(PLENTY), str(folder)]
    tried = subprocess.run([*within, "true"], capture_output=True, text=True)
    require("a mount namespace", tried.stderr if tried.returncode else None)
    server = Server(*within)
    server.attempt(folder / "warm", KIND, {"event": 1}, False, log=folder / "warm.log")
    yield server, folder, Path(f"/proc/{server.process.pid}/root{folder}")
    server.close()


def full_at(disk, tmp_path, trials: int) -> None:
    server, folder, seen = disk
    log = tmp_path / "log"
    assert server.attempt(folder / "whole", KIND, None, False, log=log)["status"] == 0
    wanted = left(seen / "whole")
    once(wanted)
    size = sum(p.stat().st_blocks * 512 for p in (seen / "whole").rglob("*"))
    shutil.rmtree(seen / "whole")
    draws, met = Draws("room", trials), Counter()
    for trial in range(trials):
        out, step = folder / f"run {trial}", -1
        room = (size * trial + draws.below(size)) // trials // 4096 * 4096 + 4096
        log.unlink()
        end = server.attempt(out, KIND, None, False, log=log, room=room)
        assert end["status"] == 2, log.read_text()
        met[named(log, str(out))] += 1
        if (seen / out.name).exists():
            step = kept(seen / out.name, wanted, step)
        resume = bool(checkpoints(seen / out.name))
        assert server.attempt(out, KIND, None, resume, log=log, room=PLENTY)["status"] == 0
        equal(left(seen / out.name), wanted)
        shutil.rmtree(seen / out.name)
    print(dict(met))


def injected(tmp_path, kills: list[dict]) -> None:
    server, met = Server(), Counter()
    try:
        whole, log = tmp_path / "whole", tmp_path / "log"
        assert server.attempt(whole, KIND, None, False, log=log)["status"] == 0
        wanted = left(whole)
        for trial, kill in enumerate(kills):
            out = tmp_path / f"run {trial}"
            log.unlink()
            end = server.attempt(out, KIND, kill | {"full": True}, False, log=log)
            assert end["status"] == 2 or ("event" in kill and end["status"] == 0), log.read_text()
            if end["status"] == 2:  # else all was written by then
                where = named(log, str(out))
                assert where == kill.get("kind", where)
                met[where] += 1
                if out.exists():
                    kept(out, wanted, -1)
                resume = bool(checkpoints(out))
                assert server.attempt(out, KIND, None, resume, log=log)["status"] == 0
            equal(left(out), wanted)
            shutil.rmtree(out)
    finally:
        server.close()
    print(dict(met))


FILES = [  # (part of a path, which of its writes, what the message names)
    ("metrics.jsonl", 3, "metrics.jsonl"),
    ("evals.jsonl", 2, "evals.jsonl"),
    ("cold_start.jsonl", 17, "cold_start.jsonl"),
    ("completions_00002", 1, "completions_N.parquet"),
    ("reference/tmp-", 1, "checkpoint"),
    ("tmp-2-", 3, "checkpoint"),
    ("config.yaml", 1, "N"),  # the folder itself, "run 6"
]


def test_a_small_disk_at_6_sizes(disk, tmp_path):
    full_at(disk, tmp_path, 6)


def test_no_space_from_each_kind_of_file_on(tmp_path):
    injected(tmp_path, [dict(zip(("path", "times", "kind"), row, strict=True)) for row in FILES])


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_no_space_for_a_file_that_another_library_writes(name, tmp_path):
    """Each of them says it in its own way; tokenizers by a bare Exception."""
    if not os.path.exists("/dev/full"):
        pytest.skip("SKIPPED: no /dev/full on this machine")
    policy = models.load("tiny", width=32, layers=1, heads=2)

    def write(folder):
        (folder / name).symlink_to("/dev/full")
        policy.save(folder)

    with pytest.raises(InputError, match="no space left for checkpoint-1"):
        checkpoint.save(tmp_path, 1, write, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torture
def test_a_small_disk_at_100_sizes(disk, tmp_path):
    full_at(disk, tmp_path, 100)


@pytest.mark.torture
def test_no_space_from_300_operations_on(tmp_path):
    draws = Draws("full")
    injected(tmp_path, [{"event": 1 + 2 * at + draws.below(2)} for at in range(300)])


def test_no_space_for_the_batch_that_is_kept_for_replay(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(GRPO, "advantage", test_replay.overflowing(3))
    words = test_replay.words(tmp_path / "whole")
    assert main(words) == 0
    out = tmp_path / "run"
    with monkeypatch.context() as full:
        write = checkpoint.Disk.write

        def refuse(self, path, data):
            if "nonfinite" in path.parts:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(self, path, data)

        full.setattr(checkpoint.Disk, "write", refuse)
        assert main(test_replay.words(out)) == 2
    said = capsys.readouterr().err
    assert f"{out}/nonfinite: no space left for checkpoint-3" in said and "make room" in said
    assert checkpoints(out)[0][0] == 2
    assert main([*test_replay.words(out), "--resume"]) == 0
    equal(left(out), left(tmp_path / "whole"))
