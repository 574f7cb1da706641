"""Work in batches behind a bounded queue: many small requests in, few calls of a scorer out.

A lane is a thread that takes what has come, up to `size` rows that may go together, and works on
them at once; nothing waits for a batch to fill. What would make the queue longer than `waiting`
rows is refused. Work that has been taken in is always finished, also when the server stops.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple


class Full(Exception):
    """The queue has no room for these rows now."""


class TooMany(Exception):
    """The queue would have no room for these rows when it is empty."""


class _Job(NamedTuple):
    rows: Sequence[Any]
    kind: Hashable  # only jobs of one kind go together
    done: asyncio.Future[list[Any]]


class Queue:
    """`await queue.put(rows)` -> one result a row, in order; used in one event loop."""

    def __init__(
        self,
        work: Callable[[list[Any]], Sequence[Any]],  # blocking, called in a thread
        *,
        size: int,  # rows of a batch
        lanes: int = 1,  # batches at a time
        waiting: int = 1024,  # rows in the queue, at most
    ):
        self.work, self.size, self.waiting = work, size, waiting
        self.jobs: deque[_Job] = deque()
        self.queued = self.batches = 0
        self.free = lanes
        self.running: set[asyncio.Task[None]] = set()
        self.threads = ThreadPoolExecutor(lanes, thread_name_prefix="scorer")

    async def put(self, rows: Sequence[Any], kind: Hashable = None) -> list[Any]:
        """Results of the rows; Full, TooMany, or what the scorer raised."""
        if len(rows) > self.waiting:
            raise TooMany
        if self.queued + len(rows) > self.waiting:
            raise Full
        if not rows:
            return []
        job = _Job(rows, kind, asyncio.get_running_loop().create_future())
        self.jobs.append(job)
        self.queued += len(rows)
        self._start()
        return await job.done

    def close(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        while self.free and self.jobs:
            self.free -= 1
            task = asyncio.ensure_future(self._run(self._batch()))
            self.running.add(task)
            task.add_done_callback(self.running.discard)

    def _batch(self) -> list[_Job]:
        batch, rows = [self.jobs.popleft()], 0
        rows = len(batch[0].rows)
        while self.jobs and self.jobs[0].kind == batch[0].kind:
            if rows + len(self.jobs[0].rows) > self.size:
                break
            batch.append(self.jobs.popleft())
            rows += len(batch[-1].rows)
        self.queued -= rows
        return batch

    async def _run(self, batch: list[_Job]) -> None:
        rows = [row for job in batch for row in job.rows]
        loop = asyncio.get_running_loop()
        self.batches += 1
        try:
            results = list(await loop.run_in_executor(self.threads, self.work, rows))
            if len(results) != len(rows):
                raise RuntimeError(f"the scorer gave {len(results)} results for {len(rows)} rows")
        except BaseException as error:
            for job in batch:
                if not job.done.done():
                    job.done.set_exception(error)
            if not isinstance(error, Exception):
                raise
            return  # each request says what it was
        finally:
            self.free += 1
            self._start()
        at = 0
        for job in batch:
            if not job.done.done():
                job.done.set_result(results[at : at + len(job.rows)])
            at += len(job.rows)
