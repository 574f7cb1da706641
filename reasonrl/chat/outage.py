"""When a server fails: what counts as its fault, how often to try again, when to stop trying.

Statuses 408, 425, 429 and 5xx, failed connections and timeouts are the server's trouble (infra) and
worth another try; any other status is the configuration's fault and stops at once. Tries are
bounded three times over: for each request, by a budget that all requests share (a fifth of them, so
that retries never become the load), and by a circuit that opens after so many failures in a row.
While it is open nobody asks; then one small probe does, and its answer decides for all.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Literal

RETRIED = frozenset({408, 425, 429})
SHARE, RESERVE = 0.2, 20.0  # retries that a request pays for; what the budget starts from
LONGEST = 30.0  # seconds of the longest pause that nobody asked for


@dataclass(frozen=True)
class Patience:
    """What to do about a judge that fails; seconds.

    policy: `pause` waits up to `wait` for a server that is down, then raises ScorerDown; `mask`
    gives infra; `fail` raises ScorerDown as soon as one request has used up its tries.
    """

    policy: Literal["pause", "mask", "fail"] = "pause"
    wait: float = 600.0
    deadline: float = 180.0  # of a request, with its retries and pauses
    timeout: float = 60.0  # of one try
    pause: float = 0.5  # before the first retry; doubles with every further one
    retries: int = 4  # of one request
    trip: int = 10  # failures in a row that open the circuit

    def __post_init__(self) -> None:
        if self.policy not in ("pause", "mask", "fail"):
            raise ValueError(f"policy must be pause, mask or fail, got {self.policy!r}")
        for name in ("wait", "deadline", "timeout", "pause"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} must be a number of seconds > 0, got {value!r}")
        if self.retries < 0 or self.trip < 1:
            raise ValueError(f"retries must be >= 0 and trip >= 1, got {self.retries}, {self.trip}")


def is_trouble(status: int) -> bool:
    """Whether a status is the server's trouble, which may pass."""
    return status in RETRIED or 500 <= status < 600


def rest(first: float, attempt: int, retry_after: str | None, draws: random.Random) -> float:
    """Seconds between try number `attempt` and the next: an exponential pause, jittered so that
    clients do not come back together, or what the server asked for where that is longer."""
    longest = min(LONGEST, first * 2 ** min(attempt - 1, 30))
    own = draws.uniform(longest / 2, longest)
    return max(own, asked_for(retry_after))


def asked_for(retry_after: str | None) -> float:
    """Seconds of a Retry-After header: a number, or a date; 0 where it is neither."""
    if retry_after is None:
        return 0.0
    if retry_after.strip().isascii() and retry_after.strip().isdigit():
        return float(retry_after.strip()[:9])
    try:
        date = parsedate_to_datetime(retry_after)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


class Budget:
    """Retries that all requests of a client share."""

    def __init__(self) -> None:
        self.left = RESERVE

    def earn(self) -> None:
        self.left = min(self.left + SHARE, 10 * RESERVE)

    def spend(self) -> bool:
        if self.left < 1:
            return False
        self.left -= 1
        return True


class Circuit:
    """Closed: everybody asks. Open: nobody does before `until`, then one probe."""

    def __init__(self, trip: int, first: float):
        self.trip, self.row, self.reason = trip, 0, ""
        self.first, self.rest, self.until = first, first, 0.0

    @property
    def is_open(self) -> bool:
        return self.row >= self.trip

    def failed(self, reason: str) -> None:
        self.row, self.reason = self.row + 1, reason
        if self.row == self.trip:
            self._open()

    def probe_failed(self, reason: str) -> None:
        self.row, self.reason = max(self.row, self.trip), reason
        self._open()

    def answered(self) -> None:
        self.row, self.rest = 0, self.first

    def _open(self) -> None:
        self.rest = min(LONGEST, 2 * self.rest)
        self.until = time.monotonic() + self.rest
