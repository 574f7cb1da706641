"""A warm process that forks attempts at a command and lets each die by SIGKILL, or meet a full
disk, where it is told.

    python kill_server.py        one JSON object a line in, one out

    {"arguments": ["train", ...], "folder": RUN, "kill": KILL}   ->   {"status": 0, "events": 412}

    KILL  null                        no kill
          {"event": 17}               before event 17: a file operation in RUN, a flush to the disk,
                                      the beginning of a phase
          {"event": 17, "torn": true} the same; a file opened for writing there holds half a write
          {"after": 0.2}              from outside, that many seconds after the start
          {"event": 17, "full": true} no kill: from event 17 on no space is left
          {"path": "evals", "times": 2, "full": true}    from the second such file opened to write
    "ranks": 2                        so many processes; KILL has a "rank": 0, 1 or null for both,
                                      "status" is a list, "seconds" what the survivor took to end
    "room": BYTES                     in all, on the file system of the run, a tmpfs of ours

A forked attempt has torch and transformers already, so it costs a few tenths of a second and not
four. It leads a process group of its own, and the group is killed.
"""

from __future__ import annotations

import errno
import json
import math
import os
import random
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import pyarrow
import torch

from reasonrl import cli, log, models

cli._quiet_libraries()
import reasonrl.train  # noqa: E402, F401 - heavy, and before the first fork

TOUCHES = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}
BOUND = 60  # seconds in which the ranks that were not killed must end
HANGS = -99
HALF = b'{"step": 1, "rew'


class Fate:
    """Counts the events of this process and ends it before the one that was drawn."""

    def __init__(self, folder: str, kill: dict[str, Any], count: int):
        self.folder, self.at = os.path.abspath(folder), kill.get("event", 0)
        self.torn, self.full = kill.get("torn", False), kill.get("full", False)
        self.path, self.times = kill.get("path"), kill.get("times", 0)
        self.count, self.tally = 0, count  # and a descriptor that gets the count at the end

    def watch(self) -> None:
        sync, phase = os.fsync, log.RunLog.phase

        def synced(handle: int) -> None:
            self.event(writes=True)
            sync(handle)

        def marked(run: Any, name: str) -> Any:
            self.event()
            return phase(run, name)

        os.fsync = synced
        log.RunLog.phase = marked  # type: ignore[method-assign]
        sys.addaudithook(self.audit)

    def audit(self, name: str, given: tuple[Any, ...]) -> None:
        if name in TOUCHES and isinstance(given[0], str | bytes | os.PathLike):
            path = os.path.abspath(os.fsdecode(given[0]))
            if path.startswith(self.folder):
                opened = path if name == "open" else ""
                self.event(opened, given[1:], name == "os.mkdir" or written(name, given[1:]))

    def event(self, opened: str = "", how: tuple[Any, ...] = (), writes: bool = False) -> None:
        self.count += 1
        if self.path and writes and self.path in opened:
            self.times -= 1
            self.at = self.count if self.times == 0 else self.at
        if self.full and writes and 0 < self.at <= self.count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), opened or None)
        if self.full or self.count != self.at:
            return
        if self.torn and opened and isinstance(how[0], str) and how[0][:1] in "wa":
            kind = os.O_TRUNC if how[0].startswith("w") else os.O_APPEND
            handle = os.open(opened, os.O_WRONLY | os.O_CREAT | kind)
            os.write(handle, HALF)
        os.kill(0, signal.SIGKILL)


def written(name: str, how: tuple[Any, ...]) -> bool:
    """Whether a file is opened for writing: by a mode of open or the flags of os.open."""
    if name != "open":
        return False
    mode, flags = how
    return any(c in mode for c in "wax+") if isinstance(mode, str) else bool(flags & os.O_CREAT)


def attempt(order: dict[str, Any], count: int) -> None:
    """In the child: run the command; never returns."""
    os.setsid()
    random.seed(0)  # Python seeds it anew in a forked process; a checkpoint keeps its state
    with open(order["log"], "ab") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    fate = Fate(order["folder"], order["kill"] or {}, count)
    fate.watch()
    try:
        status = cli.main(order["arguments"])
    except BaseException:
        traceback.print_exc()  # whoever forked this ends it before anybody else could
        raise
    os.write(count, str(fate.count).encode())
    sys.stderr.flush()
    os._exit(status)


def group(order: dict[str, Any]) -> dict[str, Any]:
    """The same for the ranks of a run: one is killed, or all; the others must end by themselves."""
    kill, size = order["kill"] or {}, order["ranks"]
    doomed = range(size) if kill.get("rank") is None else [kill["rank"]]
    pipes, port = [os.pipe() for _ in range(size)], _free_port()
    ranks = {r: _rank(order, r, kill if r == doomed[0] else {}, port, pipes) for r in range(size)}
    status, began, hit = [HANGS] * size, time.monotonic(), None
    while ranks and (hit is None or time.monotonic() - hit < BOUND):
        time.sleep(0.01)
        for rank, child in list(ranks.items()):
            ended, code = os.waitpid(child, os.WNOHANG)
            if ended:
                status[rank] = os.waitstatus_to_exitcode(code)
                del ranks[rank]
        late = time.monotonic() - began >= kill.get("after", math.inf)
        if hit is None and (late or any(s not in (0, HANGS) for s in status)):
            hit = time.monotonic()
            for rank in ranks.keys() & set(doomed):
                _killed(ranks[rank])
    took = 0.0 if hit is None else time.monotonic() - hit
    for child in ranks.values():
        _killed(child)
        os.waitpid(child, 0)
    for _, writing in pipes:
        os.close(writing)
    events = [int(os.read(reading, 20) or 0) for reading, _ in pipes]
    for reading, _ in pipes:
        os.close(reading)
    return {"status": status, "events": events, "seconds": took}


def _rank(order: dict[str, Any], rank: int, kill: dict, port: int, pipes: list) -> int:
    """Start one rank; its process."""
    child = os.fork()
    if child == 0:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["ranks"]}
        place |= {"MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
        os.environ.update({name: str(value) for name, value in place.items()})
        try:
            attempt(order | {"kill": kill, "log": f"{order['log']}.{rank}"}, pipes[rank][1])
        finally:
            os._exit(99)
    return child


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def forked(order: dict[str, Any]) -> dict[str, Any]:
    """Start an attempt, kill it if it must be killed from outside, say how it ended."""
    if "room" in order:
        size = f"remount,size={order['room']}"
        subprocess.run(["mount", "-o", size, os.path.dirname(order["folder"])], check=True)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            attempt(order, writing)
        finally:
            os._exit(99)  # an error that no status stands for
    os.close(writing)
    after = (order["kill"] or {}).get("after")
    if after is not None:
        handle = os.pidfd_open(child)
        ended, _, _ = select.select([handle], [], [], after)
        os.close(handle)
        if not ended:
            _killed(child)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    told = os.read(reading, 20)
    os.close(reading)
    return {"status": status, "events": int(told or 0)}


def _killed(child: int) -> None:
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # not yet the leader of its group
        os.kill(child, signal.SIGKILL)


def warmed() -> None:
    """Import what a run imports when it first needs it: hosts of models, tables."""
    pyarrow.array(["x"])
    with tempfile.TemporaryDirectory() as folder:
        models.load("tiny", width=32, layers=1, heads=2).save(Path(folder))
        models.load(folder)


def main() -> None:
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries talk
    warmed()
    for line in sys.stdin:
        order = json.loads(line)
        ended = group(order) if "ranks" in order else forked(order)
        print(json.dumps(ended), file=answers, flush=True)


if __name__ == "__main__":
    main()
