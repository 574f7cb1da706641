"""Tasks whose problems are rows of a file, divided into splits when it is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

from reasonrl import keys
from reasonrl.records import InputError, Problem
from reasonrl.tasks.base import Draws, Task, check_split

logger = keys.logger("reasonrl.tasks")


@dataclass(frozen=True)
class Divided(Task):
    """A subclass fills `_splits` ("train", "dev", "test") and names its file.

    "train" and "sft" walk through all their rows in an order drawn anew for every pass.
    """

    _splits: dict[str, list[Problem]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )
    _orders: dict[int, list[int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def source(self) -> str:
        """The file, for messages."""
        raise NotImplementedError

    def problem(self, split: str, index: int) -> Problem:
        rows = self._rows(split)
        if index < 0:
            raise InputError(f"task {self.source}: index must be >= 0, got {index}")
        if split in ("dev", "test"):
            if index >= len(rows):
                raise InputError(f"task {self.source}: {split} problem {index} of {len(rows)}")
            return rows[index]
        lap, at = divmod(index, len(rows))
        if lap not in self._orders:
            self._orders.clear()
            order = Draws("jsonl", self.seed, lap).shuffled(range(len(rows)))
            self._orders[lap] = order
        return rows[self._orders[lap][at]]

    def problems(self, split: str, start: int, count: int) -> list[Problem]:
        """Held-out splits give what they have, which may be fewer than `count`, and say so."""
        if split not in ("dev", "test"):
            return [self.problem(split, start + i) for i in range(count)]
        rows = self._rows(split)[start : start + count]
        if len(rows) < count:
            say_once(f"{self.source}: {len(rows)} {split} problems, {count} asked for")
        return rows

    def _rows(self, split: str) -> list[Problem]:
        check_split(split)
        rows = self._splits["train" if split == "sft" else split]
        if not rows:
            raise InputError(f"{self.source}: no row is left for split {split!r}; give more rows")
        return rows


@cache
def say_once(text: str) -> None:
    """A warning about a file, once in a process: a task is made, and asked, many times."""
    logger.warning("%s", text)


def check_shares(source: str, dev: float, test: float) -> None:
    """InputError where the held-out shares leave nothing for training."""
    if not (0 <= dev < 1 and 0 <= test < 1 and dev + test < 1):
        raise InputError(
            f"task {source}: dev, test: expected shares that leave some for training, "
            f"got {dev} and {test}"
        )
