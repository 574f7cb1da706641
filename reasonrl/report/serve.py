"""The run page of a run that goes on: a server on this machine only, which reads the files anew.

The page asks for `/data.json?at=...` every few seconds while it is open and is sent what is new
since then; it keeps what is selected and goes on when the run ends, starts again or is gone for a
while. Requests under another name than this machine's are refused, so that no page of the web can
read a run. Left out: access from other machines (use a tunnel), and anything that writes.
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from reasonrl.records import InputError
from reasonrl.report.gather import Cache, gather
from reasonrl.report.page import page

HOSTS = ("127.0.0.1", "localhost")
EVERY = 5.0  # seconds between two questions of the page


class Feed:
    """What a page that was answered at `at` does not have yet."""

    def __init__(self, runs: Sequence[str | Path]):
        self.runs, self.cache, self.lock = runs, Cache(), threading.Lock()
        self.name = secrets.token_hex(4)  # another server's pages begin anew
        self.count = 0
        self.seen: dict[Any, tuple[Any, int]] = {}  # a step or image -> its stamp, when it came

    def news(self, at: str = "") -> dict[str, Any]:
        """The page's data; steps and images that it has are named without their content."""
        name, _, number = at.partition(".")
        since = int(number) if name == self.name and number.isdecimal() else -1
        with self.lock:
            data = gather(self.runs, cache=self.cache)
            there = {(i, s["step"]) for i, r in enumerate(data["runs"]) for s in r["steps"]}
            there |= {(i, name) for i, r in enumerate(data["runs"]) for name in r["images"]}
            for gone in self.seen.keys() - there:  # sent again, should it come back
                del self.seen[gone]
            for i, run in enumerate(data["runs"]):
                run["steps"] = [
                    step if self._new((i, step["step"]), step["stamp"], since) else self._held(step)
                    for step in run["steps"]
                ]
                run["images"] = {
                    name: url if self._new((i, name), url, since) else None
                    for name, url in run["images"].items()
                }
            return data | {"at": f"{self.name}.{self.count}"}

    def _new(self, key: Any, stamp: Any, since: int) -> bool:
        if self.seen.get(key, ("", 0))[0] != stamp:
            self.count += 1
            self.seen[key] = stamp, self.count
        return self.seen[key][1] > since

    @staticmethod
    def _held(step: dict[str, Any]) -> dict[str, Any]:
        return {k: v for k, v in step.items() if k != "groups"}


def serve(
    runs: Sequence[str | Path], port: int = 8090, every: float = EVERY
) -> ThreadingHTTPServer:
    """A server bound to 127.0.0.1 (port 0: any free one); the caller runs `serve_forever`."""
    gather(runs)  # a folder without a run is refused now
    feed = Feed(runs)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = urlsplit(self.path)
            host = (self.headers.get("Host") or "").rpartition(":")
            try:
                if (host[0] or host[2]) not in HOSTS:
                    self._send(403, "text/plain", "only for this machine\n")
                elif asked.path == "/":
                    data = feed.news() | {"every": 1000 * every}
                    self._send(200, "text/html; charset=utf-8", page(data, live=True))
                elif asked.path == "/data.json":
                    at = parse_qs(asked.query).get("at", [""])[0]
                    self._send(200, "application/json", json.dumps(feed.news(at)))
                else:
                    self._send(404, "text/plain", "not found\n")
            except InputError as error:
                self._send(503, "text/plain; charset=utf-8", f"{error}\n")
            except ConnectionError:
                pass  # the page was closed

        def _send(self, status: int, kind: str, text: str) -> None:
            data = text.encode("utf-8", "replace")
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            """No line for every request."""

    try:
        return ThreadingHTTPServer(("127.0.0.1", port), Handler)
    except OSError as error:
        raise InputError(
            f"--port {port}: cannot listen there ({error.strerror}); try --port 0, any free one"
        ) from None
