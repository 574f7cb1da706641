"""Tokens of a completion for the page: where each stands, its log-probability, its ratio, clipped.

A run stores them as columns (reasonrl/seen.py); older runs have none. The page counts characters
in UTF-16 units, as browsers do, and numbers are sent as small integers: -100 times the
log-probability, 1000 times the ratio, null where the row was left out of the update. Ratios that
are all 1 (one update a step) are sent as 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

LIMIT = 10**9  # numbers beyond are damage


def tokens(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    """{"tokens": {"n": lengths, "l": ..., "r": ..., "c": ...}} of a row, {} where it has none."""
    starts, logp = (_numbers(row.get(name)) for name in ("token_starts", "token_logps"))
    if not starts or len(starts) != len(logp) or sorted(starts) != starts or starts[-1] > len(text):
        return {}
    edges = [0, *(int(at) for at in starts[1:]), len(text)]
    out: dict[str, Any] = {
        "n": [_units(text[a:b]) for a, b in zip(edges, edges[1:], strict=False)],
        "l": [round(-100 * value) for value in logp],
    }
    ratio, clipped = row.get("token_ratios"), row.get("token_clipped")
    if isinstance(ratio, list) and len(ratio) == len(starts):
        sent = [round(1000 * v) if _numbers([v]) else None for v in ratio]
        out["r"] = 1 if all(value == 1000 for value in sent) else sent
    if isinstance(clipped, list) and len(clipped) == len(starts):
        out["c"] = [i for i, value in enumerate(clipped) if value is True]
    return {"tokens": out}


def _units(text: str) -> int:
    return len(text) + sum(ord(c) > 0xFFFF for c in text)


def _numbers(value: Any) -> Sequence[float]:
    """The numbers of a list; none where one of them is no number."""
    if not isinstance(value, list):
        return []
    fine = all(type(v) in (int, float) and math.isfinite(v) and abs(v) < LIMIT for v in value)
    return value if fine else []
