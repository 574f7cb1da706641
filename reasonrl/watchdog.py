"""A run that no longer moves ends itself with exit status 5, and says where it hangs.

    with Watchdog(3600.0, out): ...        beat() wherever work goes on

Work goes on when a layer attends, a phase begins or ends, a verifier or a judge answers, or a
server that is down is asked again. After `seconds` without any of that the stacks of all threads go
to RUN/stalled.txt and the process ends at once: the main thread may sit in a collective or a
driver, where no exception reaches it.
The last checkpoint stays; `--resume` goes on from it. Time in which the process itself was stopped
(SIGSTOP, a machine asleep) does not count. Every rank has its own.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

STATUS = 5
_beats = 0


def beat() -> None:
    """Work has gone on."""
    global _beats
    _beats += 1


class Watchdog:
    """Watches from a thread of its own; seconds = 0 watches nothing."""

    def __init__(self, seconds: float, out: Path, end: Callable[[int], object] = os._exit):
        self.seconds, self.out, self.end = seconds, out, end
        self.every = min(5.0, seconds / 4)
        self.quiet, self.seen, self.over = 0.0, _beats, threading.Event()
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self.seconds:
            self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        if self.seconds:
            self.thread.join()

    def late(self, elapsed: float) -> bool:
        """Whether nothing has gone on for too long, `elapsed` seconds after the last look."""
        if _beats != self.seen:
            self.quiet, self.seen = 0.0, _beats
        else:
            self.quiet += min(elapsed, 2 * self.every)
        return self.quiet >= self.seconds

    def _watch(self) -> None:
        before = time.monotonic()
        while not self.over.wait(self.every):
            now = time.monotonic()
            if self.late(now - before):
                self._tell()
                self.end(STATUS)
                return
            before = now

    def _tell(self) -> None:
        path = self.out / "stalled.txt"
        try:
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            where = f"stacks in {path}"
        except OSError as error:
            where = f"{path} cannot be written ({error.strerror})"
        line = f"reasonrl: stalled: nothing has gone on for {self.quiet:.0f} s (stall); {where}"
        print(f"{line}; resume with --resume", file=sys.stderr, flush=True)
