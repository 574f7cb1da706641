"""What a person sees of a run: a live panel on a terminal, plain lines elsewhere, or nothing.

NO_COLOR is honoured. Text that a model wrote is shown without its control characters, so that it
cannot steer the terminal.
"""

from __future__ import annotations

import atexit
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from reasonrl.progress import Progress, duration, watched

SHOWN = (  # metrics worth a place, in this order; those a row lacks are left out
    "reward",
    "process/prefix_correct",
    "process/step_reward_mean",
    "monitor/agreement",
    "monitor/gap",
    "monitor/compressed",
    "monitor/odd_steps",
    "monitor/addressed",
    "canary/verifier",
    "canary/prm",
    "canary/judge",
    "canary/thinking",
    "loss",
    "completions/mean_length",
    "entropy",
    "kl",
    "grad_norm",
    "learning_rate",
    "step_time",
)
SAMPLE_LINES = 8
SAMPLE_WIDTH = 400  # characters


class View:
    """Shows nothing: the quiet view, and the base of the others."""

    def phase(self, name: str) -> None: ...

    def step(
        self, part: str, step: int, total: int, row: Mapping[str, Any], sample: str
    ) -> None: ...

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self, complete: bool, out: Path) -> None: ...


class Lines(View):
    """One plain line a step, for files and pipes."""

    def __init__(self, stream: IO[str]):
        self.stream = stream
        self.pace = Pace()

    def step(self, part: str, step: int, total: int, row: Mapping[str, Any], sample: str) -> None:
        values = [f"{name} {text}" for name, text in shown(row)]
        pace = self.pace.words(part, step, total, row)
        self.note("  ".join([f"{part} {step}/{total}", *values, *pace]))

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = "  ".join(f"{name} {number(value)}" for name, value in metrics.items())
        self.note(f"evaluation at step {step}  {values}")

    def note(self, text: str) -> None:
        print(printable(text), file=self.stream, flush=True)

    def close(self, complete: bool, out: Path) -> None:
        self.note(f"done: {out}" if complete else f"stopped: {out} goes on with --resume")


class Panels(View):
    """A panel that redraws itself: progress, phase and how far it is, tokens a second, time left,
    last metrics, one completion."""

    def __init__(self, console: Console):
        self.console = console
        self.pace = Pace()
        self.now, self.part, self.done, self.total = "start", "", 0, 0
        self.row: Mapping[str, Any] = {}
        self.evaluated = self.sample = ""
        self.inside, self.under = Progress(), ExitStack()  # the phases of a step
        self.under.enter_context(watched(self.inside))
        self.live = Live(console=console, get_renderable=self._shown, refresh_per_second=2)
        self.live.start()
        atexit.register(self.live.stop)  # a crash must not leave the cursor hidden

    def phase(self, name: str) -> None:
        self.now = name
        self._draw()

    def step(self, part: str, step: int, total: int, row: Mapping[str, Any], sample: str) -> None:
        self.part, self.done, self.total = part, step, total
        self.row, self.sample = row, sample or self.sample
        self._pace = self.pace.words(part, step, total, row)
        self._draw()

    _pace: Sequence[str] = ()

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        values = "  ".join(f"{name} {number(value)}" for name, value in metrics.items())
        self.evaluated = f"step {step}: {values}"
        self._draw()

    def note(self, text: str) -> None:
        self.console.print(Text(printable(text)))

    def close(self, complete: bool, out: Path) -> None:
        self.now = "done" if complete else "stopped; go on with --resume"
        self._draw()
        self.live.stop()
        self.under.close()
        atexit.unregister(self.live.stop)

    def _draw(self) -> None:
        self.live.refresh()

    def _shown(self) -> Group:
        head = Text(f"{self.part} {self.done}/{self.total}  {self.now}")
        if self.inside.phases:
            head.append(f" ({self.inside.text()})")
        if self._pace:
            head.append(f"  {'  '.join(self._pace)}", style="dim")
        table = Table.grid(padding=(0, 2))
        for name, text in shown(self.row):
            table.add_row(Text(name, style="dim"), Text(text, style="bold"))
        bar = Table.grid(expand=True)  # a bare bar does not end its line
        bar.add_row(ProgressBar(total=max(self.total, 1), completed=self.done))
        parts: list[Any] = [head, bar, table]
        if self.evaluated:
            parts.append(Text(printable(self.evaluated), style="green"))
        if self.sample:
            lines = printable(self.sample[:SAMPLE_WIDTH]).split("\n")[:SAMPLE_LINES]
            parts.append(Panel(Text("\n".join(lines)), title="a completion", style="dim"))
        return Group(*parts)


class Pace:
    """How fast, and for how long yet: tokens a second of the last step, time left at the pace of
    the last steps of the same part."""

    def __init__(self) -> None:
        self.part, self.tokens = "", 0.0
        self.ticks: deque[tuple[int, float]] = deque(maxlen=20)

    def words(self, part: str, step: int, total: int, row: Mapping[str, Any]) -> list[str]:
        """What is known after a step."""
        if part != self.part:
            self.part, self.tokens = part, 0.0
            self.ticks.clear()
        fresh = step == 1 or bool(self.ticks)  # else resumed: the row counts tokens of before, too
        self.ticks.append((step, time.monotonic()))
        (first, began), (last, now) = self.ticks[0], self.ticks[-1]
        so_far, seconds = row.get("num_tokens"), row.get("step_time")
        done = row.get("tokens")  # of an update alone: the cold start's
        if so_far is not None:
            done, self.tokens = so_far - self.tokens if fresh else None, so_far
        out = [f"{done / seconds:.0f} tokens/s"] if done and seconds else []
        if last > first:
            out.append(f"left {duration((now - began) / (last - first) * (total - step))}")
        return out


def view(quiet: bool, stream: IO[str]) -> View:
    """The view for a stream."""
    if quiet:
        return View()
    console = Console(file=stream)
    return (
        Panels(console) if console.is_terminal and not console.is_dumb_terminal else Lines(stream)
    )


def shown(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name, number(row[name])) for name in SHOWN if name in row]


def number(value: Any) -> str:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else str(value)
    return printable(str(value))


def printable(text: str) -> str:
    """The text with every control character but newline shown as a middle dot."""
    return "".join(c if c == "\n" or c.isprintable() else "\u00b7" for c in text)
