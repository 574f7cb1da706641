"""A server of ours in a thread of the tests, with scorers that tests script."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
import time

from reasonrl.records import scored
from reasonrl.serve import App, Limits, run
from reasonrl.serve.queue import Queue
from reasonrl.serve.scorers import Scorer


class Served:
    """A server in a thread; `port`; stopped at the end of its block, `lost` then says how."""

    def __init__(self, *scorers: Scorer, unscored: float | None = None, **limits):
        self.app, self.limits = App(scorers, unscored), Limits(**limits)
        self.up, self.lost = threading.Event(), -1
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        def started(listener, stop) -> None:
            self.listener, self.event = listener, stop
            self.port, self.loop = listener.port, asyncio.get_running_loop()
            self.up.set()

        self.lost = run(self.app, ("127.0.0.1", 0), self.limits, started)

    def __enter__(self) -> Served:
        self.thread.start()
        assert self.up.wait(30)
        return self

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.event.set)

    def __exit__(self, *_: object) -> None:
        if self.thread.is_alive():
            self.stop()
        self.thread.join(60)
        assert not self.thread.is_alive() and self.lost == 0

    def call(self, path: str, body=None, method: str | None = None, **headers):
        """(status, headers, JSON or text) of one request on a connection of its own."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
            link.request(method or ("GET" if body is None else "POST"), path, data, headers)
            reply = link.getresponse()
            text = reply.read().decode()
            kind = reply.headers.get_content_type()
            return (
                reply.status,
                reply.headers,
                json.loads(text) if text and "json" in kind else text,
            )
        finally:
            link.close()

    def until(self, ready) -> None:
        for _ in range(6000):
            if ready():
                return
            time.sleep(0.005)
        raise AssertionError("it did not happen in 30 s")


def scripted(score=lambda rows: [scored(1.0)] * len(rows), name="math", **queue) -> Scorer:
    return Scorer(name, Queue(score, **({"size": 8} | queue)))


def rows(*completions: str, label="4", prompt="2+2?"):
    queries = [prompt + c for c in completions]
    return {"query": queries, "prompts": [prompt] * len(queries), "labels": [label] * len(queries)}
