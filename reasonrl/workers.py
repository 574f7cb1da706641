"""Warm worker processes that may be killed at any moment, for text that must not be trusted.

Each worker is the leader of its own process group and speaks JSON lines over pipes. A task's
deadline counts from the moment the worker gets it; past it the whole group gets SIGKILL and a fresh
worker takes the place. No signal handler, no fork of this process, no thread of ours: a call waits
for its own workers with a selector, so it may come from any thread, and from asyncio through
`asyncio.to_thread`. Results are matched by id, never by order.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from reasonrl.watchdog import beat

STARTUP = 60.0  # seconds a worker may take to import what it needs


class Worker:
    def __init__(self, script: Path, memory: int):
        known = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TMPDIR")
        env = {name: os.environ[name] for name in known if name in os.environ}
        self.process = subprocess.Popen(
            [sys.executable, "-B", str(script), str(memory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=env,
            start_new_session=True,
        )
        self.done = 0
        self.task: dict[str, Any] | None = None
        self.ready = False
        self.deadline = time.monotonic() + STARTUP
        self.buffer = b""
        os.set_blocking(self.process.stdout.fileno(), False)  # type: ignore[union-attr]

    def give(self, task: dict[str, Any]) -> None:
        self.task = task
        self.deadline = time.monotonic() + (task["timeout"] if self.ready else STARTUP)
        if self.ready:
            self._write()

    def _write(self) -> None:
        line = json.dumps(self.task).encode() + b"\n"
        try:
            self.process.stdin.write(line)  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # it died while idle; reading from it will show that

    def receive(self) -> list[dict[str, Any]] | None:
        """The replies that have come, or None at its death. The first one says it is ready."""
        try:
            data = os.read(self.process.stdout.fileno(), 1 << 16)  # type: ignore[union-attr]
        except BlockingIOError:
            return []
        if not data:
            return None
        *lines, self.buffer = (self.buffer + data).split(b"\n")
        replies = [json.loads(line) for line in lines]
        if replies and not self.ready:
            self.ready = True
            replies.pop(0)
            if self.task is not None:
                self.deadline = time.monotonic() + self.task["timeout"]
                self._write()
        return replies

    def kill(self) -> None:
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()  # type: ignore[union-attr]
            except BrokenPipeError:
                pass
        self.process.wait()


class Pool:
    """At most `size` workers; started on demand, replaced after `recycle` tasks."""

    def __init__(self, script: Path, size: int, memory: int = 2 << 30, recycle: int = 1000):
        self.script, self.size, self.memory, self.recycle = script, size, memory, recycle
        self.idle: list[Worker] = []
        self.all: set[Worker] = set()
        self.out, self.closed = 0, False
        self.changed = threading.Condition()
        self.owner = os.getpid()
        atexit.register(self.close)

    def run(self, tasks: Sequence[dict[str, Any]]) -> dict[int, dict[str, Any]]:
        """{task id: reply}; a reply with "failed" says why there is no verdict."""
        waiting, results = list(reversed(tasks)), {}
        workers = self._borrow(len(waiting))
        busy: set[Worker] = set()
        try:
            while waiting or busy:
                for worker in [w for w in workers if w not in busy][: len(waiting)]:
                    worker.give(waiting.pop())
                    busy.add(worker)
                for worker, reply in self._wait(busy):
                    beat()
                    busy.discard(worker)
                    results[reply["id"]] = reply
                    worn = worker.done >= self.recycle
                    if "failed" in reply or worn:
                        workers.remove(worker)
                        self._drop(worker)
                        workers.append(self._start())
        finally:
            self._return(workers, busy)
        assert results.keys() == {task["id"] for task in tasks}, "every task has one result"
        return results

    def _wait(self, busy: Iterable[Worker]) -> list[tuple[Worker, dict[str, Any]]]:
        """Wait until a busy worker replies, dies or runs past its deadline."""
        ended = []
        with selectors.DefaultSelector() as selector:
            for worker in busy:
                selector.register(worker.process.stdout, selectors.EVENT_READ, worker)  # type: ignore[arg-type]
            first = min(worker.deadline for worker in busy)
            for key, _ in selector.select(max(0.0, first - time.monotonic())):
                if (reply := self._reply(key.data)) is not None:
                    ended.append((key.data, reply))
        replied = {id(worker) for worker, _ in ended}
        for worker in busy:
            if id(worker) not in replied and time.monotonic() >= worker.deadline:
                limit = worker.task["timeout"] if worker.ready else STARTUP  # type: ignore[index]
                what = "timeout" if worker.ready else "timeout at start"
                ended.append((worker, _failed(worker, f"{what} after {limit:g} s")))
        return ended

    def _reply(self, worker: Worker) -> dict[str, Any] | None:
        replies = worker.receive()
        if replies is None:
            return _failed(worker, "the worker died" if worker.ready else "no worker could start")
        if not replies:
            return None
        worker.done += 1
        wanted = worker.task["id"]  # type: ignore[index]
        if len(replies) != 1 or replies[0]["id"] != wanted:
            return _failed(worker, "the worker answered another task")
        return replies[0]

    def _borrow(self, wanted: int) -> list[Worker]:
        """One worker at least, waiting for it; more as long as there are any."""
        if wanted == 0:
            return []
        if os.getpid() != self.owner:
            raise RuntimeError("a worker pool cannot be used by a forked child")
        with self.changed:
            while self.out >= self.size:
                self.changed.wait()
            got = min(wanted, self.size - self.out)
            self.out += got
            taken = [self.idle.pop() for _ in range(min(got, len(self.idle)))]
        return taken + [self._start() for _ in range(got - len(taken))]

    def _return(self, workers: list[Worker], busy: set[Worker]) -> None:
        for worker in busy & set(workers):  # only after an exception: its task is unknown
            self._drop(worker)
        with self.changed:
            self.idle += [worker for worker in workers if worker not in busy]
            self.out -= len(workers)
            self.changed.notify_all()

    def _start(self) -> Worker:
        with self.changed:
            if self.closed:
                raise RuntimeError("the worker pool is closed")
            worker = Worker(self.script, self.memory)
            self.all.add(worker)
        return worker

    def _drop(self, worker: Worker) -> None:
        worker.kill()
        with self.changed:
            self.all.discard(worker)

    def close(self) -> None:
        """Kill every worker for good; whoever waits for one gets a failed task."""
        if os.getpid() != self.owner:
            return
        with self.changed:
            self.closed, self.idle = True, []
            workers = list(self.all)
        for worker in workers:
            self._drop(worker)


def _failed(worker: Worker, reason: str) -> dict[str, Any]:
    return {"id": worker.task["id"], "failed": reason}  # type: ignore[index]
