"""The run page of a run that goes on: a server on this machine only, which reads the files anew.

The page asks for `/data.json` every few seconds while it is open and keeps what is selected.
Left out: access from other machines (use a tunnel), and anything that writes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from reasonrl.records import InputError
from reasonrl.report.gather import gather
from reasonrl.report.page import page


def serve(runs: Sequence[str | Path], port: int = 8090) -> ThreadingHTTPServer:
    """A server bound to 127.0.0.1 (port 0: any free one); the caller runs `serve_forever`."""
    gather(runs)  # a folder without a run is refused now

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            try:
                if self.path == "/":
                    self._send(200, "text/html; charset=utf-8", page(gather(runs), live=True))
                elif self.path == "/data.json":
                    self._send(200, "application/json", json.dumps(gather(runs)))
                else:
                    self._send(404, "text/plain", "not found\n")
            except InputError as error:
                self._send(503, "text/plain", f"{error}\n")

        def _send(self, status: int, kind: str, text: str) -> None:
            data = text.encode()
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
        raise InputError(f"--port {port}: cannot listen there ({error.strerror})") from None
