"""Is the answer right? Mathematical equality decided outside this process.

Model text is never evaluated here: `verify_math` hands two strings to a warm, limited, killable
worker. A wrong answer is scored 0.0, no answer is scored 0.0 with a reason, a gold answer that does
not parse is unscorable, and a worker that hangs or dies is infra. Nothing that went wrong becomes a
zero.
    verify_math([r"... \\boxed{\\frac12}"], ["0.5"])[0].value == 1.0
"""

from __future__ import annotations

import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

from reasonrl.answer import final_answer
from reasonrl.records import Score, infra, scored, unscorable
from reasonrl.workers import Pool

SPAN = 8192  # bytes of an answer that are looked at
REMEMBERED = 65_536
INTEGER = re.compile(r"[-+]?\d{1,18}")

Task = tuple[str, str, bool]  # what the completion says, the gold answer, is it free text
_lock = threading.Lock()
_cache: OrderedDict[Task, Score] = OrderedDict()
_pools: dict[int, Pool] = {}  # by process, so that a forked child gets its own


def verify_math(
    completions: Sequence[str], answers: Sequence[str], *, timeout: float = 5.0
) -> list[Score]:
    """Score each completion 1.0 or 0.0 by whether its final answer equals the bare answer string.

    The final answer is the last <answer> span, \\boxed{...} or "####" line, else what math-verify
    finds in the text. `timeout` is seconds of work on one pair, counted from its start. Blocking;
    safe from any thread.
    """
    if len(completions) != len(answers):
        raise ValueError(f"answers must be {len(completions)} strings, got {len(answers)}")
    if not timeout > 0:
        raise ValueError(f"timeout must be > 0, got {timeout!r}")
    prepared: list[Task | Score] = []
    for i, (completion, gold) in enumerate(zip(completions, answers, strict=True)):
        if not isinstance(completion, str):
            raise ValueError(f"completions[{i}] must be a string, got {type(completion).__name__}")
        prepared.append(_prepared(completion, gold))
    tasks = dict.fromkeys(task for task in prepared if not isinstance(task, Score))
    known = _judged(list(tasks), timeout)
    return [task if isinstance(task, Score) else known[task] for task in prepared]


def close() -> None:
    """End the workers of this process; the next call starts new ones."""
    with _lock:
        pool = _pools.pop(os.getpid(), None)
    if pool is not None:
        pool.close()


def _prepared(completion: str, gold: object) -> Task | Score:
    """What a worker must compare, or the score where no worker is needed."""
    if not isinstance(gold, str) or not gold.strip():
        return unscorable(f"the gold answer is empty: {gold!r}")
    if len(gold.encode(errors="replace")) > SPAN:
        return unscorable(f"the gold answer is longer than {SPAN} bytes")
    stated, gold = final_answer(completion), gold.strip()
    if stated is not None:
        if len(stated.encode(errors="replace")) > SPAN:
            return scored(0.0, f"the answer is longer than {SPAN} bytes")
        if INTEGER.fullmatch(gold) and INTEGER.fullmatch(stated):
            return scored(float(int(gold) == int(stated)))
        return stated, gold, False
    text = completion.rpartition("</think>")[2].strip().encode(errors="replace")
    return text[-SPAN:].decode(errors="ignore"), gold, True


def _judged(tasks: list[Task], timeout: float) -> dict[Task, Score]:
    with _lock:
        known = {task: _cache[task] for task in tasks if task in _cache}
    new = [task for task in tasks if task not in known]
    if not new:
        return known
    lines = [
        {"id": i, "pred": task[0], "gold": task[1], "free": task[2], "timeout": timeout}
        for i, task in enumerate(new)
    ]
    replies = _pool().run(lines)
    for i, task in enumerate(new):
        known[task] = _score(replies[i])
    with _lock:
        _cache.update({task: known[task] for task in new if known[task].kind != "infra"})
        while len(_cache) > REMEMBERED:
            _cache.popitem(last=False)
    return known


def _score(reply: dict) -> Score:
    if "failed" in reply:
        return infra(reply["failed"])
    return {
        "equal": scored(1.0),
        "different": scored(0.0),
        "no answer": scored(0.0, "no answer found in the completion"),
        "unread answer": scored(0.0, "the answer does not parse"),
        "no gold": unscorable("the gold answer does not parse"),
    }[reply["kind"]]


def _pool() -> Pool:
    with _lock:
        pool = _pools.get(os.getpid())
        if pool is None:
            size = max(1, min(8, len(os.sched_getaffinity(0))))
            pool = _pools[os.getpid()] = Pool(Path(__file__).with_name("_math_worker.py"), size)
        return pool
