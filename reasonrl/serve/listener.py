"""HTTP/1.1 connections of a small server, by h11 on plain sockets; everything has a bound.

Connections, bytes of a head, of a body and of all bodies together, and the seconds that a client
may take for each are limited: a slow client gets 408, a surplus one 503 with Retry-After, and no
number of them makes the server hang or grow. A stop loses no request: what has been accepted by
the kernel is taken in, requests that have begun are read and answered, and idle connections get a
moment in which a request that is already on its way still counts.
Left out: TLS (put a proxy in front), HTTP/2, streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import NamedTuple

import h11

from reasonrl import keys
from reasonrl.records import InputError
from reasonrl.serve.metrics import Metrics

logger = keys.logger("reasonrl.serve")
HEAD = 16 << 10  # bytes of request line and headers
CHUNK = 1 << 16
TURNED_AWAY = 256  # connections that are being told so, at most
LINGER = 0.5  # seconds a stopping server waits for requests on idle connections
FILES = 256  # open files that are not connections


@dataclass(frozen=True)
class Limits:
    connections: int = 512
    body: int = 8 << 20  # bytes
    memory: int = 256 << 20  # bytes of all bodies at one time
    read: float = 15.0  # seconds for a head, and again for a body
    idle: float = 75.0  # seconds between two requests
    write: float = 15.0  # seconds to take a reply
    grace: float = 120.0  # seconds to finish in a stop


class Request(NamedTuple):
    method: str
    path: str
    headers: Mapping[str, str]  # names in lower case
    body: bytes


class Response(NamedTuple):
    status: int
    body: bytes
    kind: str = "application/json"
    headers: tuple[tuple[str, str], ...] = ()


Answer = Callable[[Request], Awaitable[Response]]
Complaint = Callable[[int, str], Response]  # status, message


class _Refused(Exception):
    """The request ends here: (status, message)."""


class Listener:
    """A bound socket and its connections; `await run(stop)` serves until `stop` is set."""

    def __init__(
        self,
        answer: Answer,
        complain: Complaint,
        metrics: Metrics,
        address: tuple[str, int],  # port 0: any free one
        limits: Limits,
    ):
        self.answer, self.complain, self.metrics, self.limits = answer, complain, metrics, limits
        files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if files != resource.RLIM_INFINITY and files < limits.connections + TURNED_AWAY + FILES:
            raise InputError(
                f"--connections {limits.connections}: this process may open {files} files and needs"
                f" {TURNED_AWAY + FILES} more than connections (ulimit -n)"
            )
        try:
            family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            self.socket = socket.create_server(address, family=family, backlog=2048)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"--host {address[0]} --port {address[1]}: {reason}") from None
        self.socket.setblocking(False)
        self.port: int = self.socket.getsockname()[1]
        self.open: set[asyncio.Task[None]] = set()
        self.away: set[asyncio.Task[None]] = set()
        self.idle: set[socket.socket] = set()
        self.held, self.stopping = 0, False
        metrics.gauges["connections"] = lambda: len(self.open)
        metrics.gauges["body_bytes"] = lambda: self.held

    async def run(self, stop: asyncio.Event) -> int:
        """Serve, then drain; the number of requests that could not be finished in `grace`."""
        loop = asyncio.get_running_loop()
        loop.add_reader(self.socket, self._accept)
        try:
            await stop.wait()
        finally:
            self.stopping = True
            loop.remove_reader(self.socket)
            while self._accept():  # whom the kernel has let in already
                pass
            self.socket.close()
        if self.open:
            await asyncio.wait(self.open, timeout=LINGER)
        for sock in self.idle:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RD)
        left = set(self.open)
        if left:
            _, left = await asyncio.wait(left, timeout=self.limits.grace)
        for task in [*left, *self.away]:
            task.cancel()
        await asyncio.gather(*left, *self.away, return_exceptions=True)
        return len(left)

    def _accept(self) -> int:
        for count in range(64):
            try:
                sock, _ = self.socket.accept()
            except BlockingIOError:
                return count
            except ConnectionAbortedError:
                continue
            except OSError as error:  # no files left, for one: not again at once
                logger.warning("cannot take a connection: %s", error.strerror)
                self._rest()
                return 0
            sock.setblocking(False)
            if len(self.open) < self.limits.connections:
                self._begin(self.open, self._serve(sock))
            elif len(self.away) < TURNED_AWAY:
                self._begin(self.away, self._turn_away(sock))
            else:
                self.metrics.add("refused_total", reason="connections")
                sock.close()
        return 64

    def _rest(self) -> None:
        """Stop taking connections for a moment."""
        loop = asyncio.get_running_loop()
        loop.remove_reader(self.socket)

        def again() -> None:
            if not self.stopping:
                loop.add_reader(self.socket, self._accept)

        loop.call_later(0.2, again)

    def _begin(self, among: set[asyncio.Task[None]], work) -> None:
        task = asyncio.ensure_future(work)
        among.add(task)
        task.add_done_callback(among.discard)

    async def _turn_away(self, sock: socket.socket) -> None:
        """Say 503 and listen a moment: closed at once, the client might see a reset instead."""
        self.metrics.add("refused_total", reason="connections")
        loop, wire = asyncio.get_running_loop(), h11.Connection(h11.SERVER, HEAD)
        try:
            with _Timer(sock, 1.0, socket.SHUT_RDWR):
                reply = self.complain(503, "too many connections")
                await loop.sock_sendall(sock, _bytes(wire, reply, close=True))
                sock.shutdown(socket.SHUT_WR)
                while await loop.sock_recv(sock, CHUNK):
                    pass
        except OSError:
            pass
        finally:
            sock.close()

    async def _serve(self, sock: socket.socket) -> None:
        wire = h11.Connection(h11.SERVER, HEAD)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            first = True
            while await self._exchange(sock, wire, first):
                wire.start_next_cycle()
                first = False
        except OSError:
            pass  # the client is gone
        finally:
            self.idle.discard(sock)
            sock.close()

    async def _exchange(self, sock: socket.socket, wire: h11.Connection, first: bool) -> bool:
        """One request and its reply; whether another one may follow."""
        held: list[int] = []
        try:
            request = await self._read(sock, wire, held, first)
            if request is None:
                return False
            try:
                response = await self.answer(request)
            except BaseException as error:
                if isinstance(error, Exception):
                    failed = self.complain(500, f"{type(error).__name__} in the server")
                    await self._send(sock, wire, failed, close=True)
                raise
            bare = request.method == "HEAD"
            await self._send(sock, wire, response, close=self.stopping, bare=bare)
            return wire.our_state is h11.DONE and wire.their_state is h11.DONE
        except _Refused as error:
            status, message = error.args
            if status == 503:
                self.metrics.add("refused_total", reason="memory")
            self.metrics.add("requests_total", path="?", status=str(status))
            if wire.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                await self._send(sock, wire, self.complain(status, message), close=True)
                sock.shutdown(socket.SHUT_WR)
                with _Timer(sock, 1.0, socket.SHUT_RDWR):  # let it read what was said
                    while await asyncio.get_running_loop().sock_recv(sock, CHUNK):
                        pass
            return False
        finally:
            self.held -= sum(held)

    async def _read(self, sock, wire: h11.Connection, held: list[int], first: bool):
        """A whole Request; None where the client left between two; _Refused."""
        body, head = bytearray(), None
        idle = wire.trailing_data[0] == b""
        timer = _Timer(sock, self.limits.idle if idle and not first else self.limits.read)
        with timer:
            if idle:  # the first bytes: before them there is no request
                self.idle.add(sock)
                data = await asyncio.get_running_loop().sock_recv(sock, CHUNK)
                self.idle.discard(sock)
                if not data:
                    return None
                timer.restart(self.limits.read)
                wire.receive_data(data)
            while True:
                try:
                    event = wire.next_event()
                except h11.RemoteProtocolError as error:
                    status = 408 if timer.ended else error.error_status_hint
                    raise _Refused(status, f"broken HTTP: {error}") from None
                if event is h11.NEED_DATA:
                    await self._more(sock, wire, timer)
                elif isinstance(event, h11.Request):
                    head = event
                    length = dict(event.headers).get(b"content-length", b"0")
                    if int(length) > self.limits.body:
                        raise _Refused(413, f"a body has at most {self.limits.body} bytes")
                    timer.restart(self.limits.read)
                elif isinstance(event, h11.Data):
                    self._hold(len(event.data), len(body), held)
                    body += event.data
                elif isinstance(event, h11.EndOfMessage):
                    assert head is not None
                    fields = {k.decode(): v.decode("latin-1") for k, v in head.headers}
                    method, target = head.method.decode(), head.target.decode("latin-1")
                    return Request(method, target.partition("?")[0], fields, bytes(body))
                else:  # ConnectionClosed
                    return None

    async def _more(self, sock, wire: h11.Connection, timer: _Timer) -> None:
        loop = asyncio.get_running_loop()
        if wire.they_are_waiting_for_100_continue:
            go_on = h11.InformationalResponse(status_code=100, headers=[])
            await loop.sock_sendall(sock, wire.send(go_on) or b"")
        data = await loop.sock_recv(sock, CHUNK)
        if not data and timer.ended:
            raise _Refused(408, "the request did not come in time")
        wire.receive_data(data)

    def _hold(self, size: int, before: int, held: list[int]) -> None:
        """Account for bytes of a body; _Refused where they are too many."""
        if before + size > self.limits.body:
            raise _Refused(413, f"a body has at most {self.limits.body} bytes")
        if self.held + size > self.limits.memory:
            raise _Refused(503, "too many bytes at one time")
        held.append(size)
        self.held += size

    async def _send(
        self, sock, wire: h11.Connection, reply: Response, *, close: bool, bare: bool = False
    ) -> None:
        with _Timer(sock, self.limits.write, socket.SHUT_RDWR):
            data = _bytes(wire, reply, close, bare)
            await asyncio.get_running_loop().sock_sendall(sock, data)


def _bytes(wire: h11.Connection, reply: Response, close: bool, bare: bool = False) -> bytes:
    reason = HTTPStatus(reply.status).phrase
    fields = [("Content-Type", reply.kind), ("Content-Length", str(len(reply.body)))]
    fields += [*reply.headers, *([("Connection", "close")] if close else [])]
    parts = (
        h11.Response(status_code=reply.status, headers=fields, reason=reason.encode()),
        h11.Data(data=b"" if bare else reply.body),  # HEAD: a head alone
        h11.EndOfMessage(),
    )
    return b"".join(wire.send(part) or b"" for part in parts)


class _Timer:
    """Shuts a socket down after so many seconds, which ends whatever waits for it; cheaper than a
    task a wait, and nothing is left to cancel."""

    def __init__(self, sock: socket.socket, seconds: float, how: int = socket.SHUT_RD):
        self.sock, self.seconds, self.how, self.ended = sock, seconds, how, False
        self.handle: asyncio.TimerHandle | None = None

    def start(self) -> None:
        loop = asyncio.get_running_loop()
        self.handle = loop.call_later(self.seconds, self._end)

    def restart(self, seconds: float) -> None:
        self.stop()
        self.seconds = seconds
        self.start()

    def stop(self) -> None:
        if self.handle is not None:
            self.handle.cancel()

    def _end(self) -> None:
        self.ended = True
        with contextlib.suppress(OSError):
            self.sock.shutdown(self.how)

    def __enter__(self) -> _Timer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
