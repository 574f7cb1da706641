"""Preference pairs from scored answers: a prompt's best against its worst, if far enough apart.

At most one pair a prompt, prompts without a spread are dropped (Libra's use of its judge, arXiv
2507.21645; DPO trains on the result: `reasonrl train dpo task=PAIRS`). An answer whose score is
unknown takes no part. Ties go to the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reasonrl.stepwise import Trace


def pairs(
    traces: Sequence[Trace], scores: Sequence[float | None], margin: float = 0.5
) -> list[dict[str, Any]]:
    """Rows with prompt, chosen, rejected, margin (and the answer, where rows have one)."""
    groups: dict[str, list[int]] = {}
    for i, (trace, score) in enumerate(zip(traces, scores, strict=True)):
        if score is not None:
            groups.setdefault(repr(trace.prompt), []).append(i)
    out = []
    for rows in groups.values():
        best = max(rows, key=lambda i: (scores[i], -i))
        worst = min(rows, key=lambda i: (scores[i], i))
        gap = (scores[best] or 0.0) - (scores[worst] or 0.0)
        if gap < margin or traces[best].text == traces[worst].text:
            continue
        row: dict[str, Any] = {
            "prompt": traces[best].prompt,
            "chosen": traces[best].text,
            "rejected": traces[worst].text,
            "margin": gap,
        }
        if (answer := traces[best].extra.get("answer")) is not None:
            row["answer"] = answer
        out.append(row)
    return out
