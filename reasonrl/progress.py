"""How far a command is, for whoever waits: on stderr, once two seconds have passed.

    with shown():                                                 a command, once
        with phase("sampling", 64, "completions") as part:        the work, where it is done
            part.add(8, tokens=512)

    sampling 40/64 completions, 512 tokens/s, left 12s

On a terminal that is one line in place, elsewhere a plain line now and then; without colours, so
NO_COLOR changes nothing. Phases lie in one another; one that counts what the phase around
it counts adds to that one, because whoever asked for the work knows how much there is. Where
nothing is shown a phase costs nothing. `train` has a view of its own (log_view.py) and shows the
phases of a step in it.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import IO

AFTER = 2.0  # seconds before anything is shown
EVERY = 20.0  # seconds between two plain lines
LOOK = 0.25  # seconds between two looks
CLEAR = "\r\x1b[2K"  # to the line's start, and nothing in it
_current: Progress | None = None


class Phase:
    """A part of the work: how much of it there is (0: nobody knows), and how much is done."""

    def __init__(self, name: str, total: int = 0, unit: str = "", began: float = 0.0):
        self.name, self.total, self.unit, self.began = name, total, unit, began
        self.done = self.tokens = 0

    def add(self, count: int = 1, tokens: int = 0) -> None:
        """So much more is done."""
        self.done += count
        self.tokens += tokens

    def text(self, now: float) -> str:
        """Name, count, pace and time left, as far as they are known."""
        spent = max(now - self.began, 1e-9)
        if not self.total:
            return f"{self.name}, {duration(spent)}"
        parts = [f"{self.name} {self.done}/{self.total} {self.unit}"]
        if self.tokens:
            parts.append(f"{self.tokens / spent:.0f} tokens/s")
        elif self.done:
            parts.append(f"{self.done / spent:.3g} {self.unit}/s")
        if 0 < self.done < self.total:
            parts.append(f"left {duration(spent / self.done * (self.total - self.done))}")
        return ", ".join(parts)


class Progress:
    """The phases under way, outermost first, and who shows them (no stream: somebody else)."""

    def __init__(self, stream: IO[str] | None = None, clock: Callable[[], float] = time.monotonic):
        self.stream, self.clock, self.lock = stream, clock, threading.Lock()
        self.began = clock()
        self.next = self.began + AFTER
        self.phases: list[Phase] = []
        self.drawn = False

    def text(self) -> str:
        """All phases in one line."""
        now = self.clock()
        under_way = list(self.phases) or [Phase("working", began=self.began)]
        return " · ".join(part.text(now) for part in under_way)

    def look(self) -> None:
        """Show what there is to show now."""
        if self.stream is None or self.clock() < self.next:
            return
        steerable = _steerable(self.stream)
        since = self.phases[0].began + AFTER if self.phases else self.began + EVERY
        if not steerable and self.clock() < since:
            return  # a line for good must say something
        with self.lock:
            if steerable:
                room = shutil.get_terminal_size().columns - 1
                print(f"{CLEAR}{self.text()[:room]}\r", end="", file=self.stream, flush=True)
                self.drawn = True
            else:
                self.next = self.clock() + EVERY
                print(self.text(), file=self.stream, flush=True)

    def clear(self) -> None:
        """Leave nothing on the terminal."""
        if self.drawn:
            print(CLEAR, end="", file=self.stream, flush=True)
            self.drawn = False


@contextmanager
def phase(name: str, total: int = 0, unit: str = "") -> Iterator[Phase]:
    """A part of the work while it goes on."""
    view = _current
    if view is None:
        yield Phase(name, total, unit)
        return
    around = view.phases[-1] if view.phases else None
    if around is not None and unit and around.unit == unit:
        yield around
        return
    own = Phase(name, total, unit, view.clock())
    view.phases.append(own)
    try:
        yield own
    finally:
        view.phases.remove(own)


@contextmanager
def shown(quiet: bool = False) -> Iterator[None]:
    """The phases inside are shown on stderr, unless quiet."""
    if quiet:
        yield
        return
    over = threading.Event()
    with watched(Progress(sys.stderr)) as view:

        def look() -> None:
            while not over.wait(LOOK):
                view.look()

        thread = threading.Thread(target=look, name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            view.clear()


@contextmanager
def watched(view: Progress) -> Iterator[Progress]:
    """The phases inside are this view's."""
    global _current
    former, _current = _current, view
    try:
        yield view
    finally:
        _current = former


def say(text: str) -> None:
    """Print a line, not into the one that shows progress."""
    view = _current
    with view.lock if view is not None else nullcontext():
        if view is not None:
            view.clear()
        print(text, flush=True)


def duration(seconds: float) -> str:
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _steerable(stream: IO[str]) -> bool:
    """Whether a line can be drawn in place."""
    return stream.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown", "")
