"""One HTTP/1.1 exchange with a known server, by h11 over asyncio, ended by a hard deadline.

The deadline covers everything: looking the name up, connecting, TLS, sending, every byte of the
reply; a server that drips cannot stretch it. A reply may have so many bytes and no more, comes
uncompressed, and a redirect is a reply like any other. Idle connections are kept and used again,
unless something came that nobody asked for.
Why not a client library: those bound single reads, not the whole, and inflate what they get.
Left out: proxies (those of the environment are not used), HTTP/2, cookies.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import Sequence
from typing import NamedTuple
from urllib.parse import urlsplit

import h11

from reasonrl.records import InputError

CHUNK = 1 << 16  # bytes read at a time
HEAD = 1 << 15  # bytes of status line and headers, at most


class Failed(Exception):
    """No whole reply came: no connection, a reset, a torn or broken message, the deadline."""


class TooLarge(Exception):
    """The reply has more bytes than are read."""


class HTTPReply(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: bytes


class Address(NamedTuple):
    """A base URL, taken apart and checked."""

    url: str
    host: str
    port: int
    tls: bool
    path: str  # of the base, without a slash at its end

    @staticmethod
    def of(url: str) -> Address:
        if "@" in url:  # before anything that would repeat it
            raise InputError("a server's address must hold no name and password")
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InputError(f"{url!r}: expected http://host:port/v1 ({error})") from None
        known = parts.scheme in ("http", "https") and parts.hostname
        if parts.query or parts.fragment:
            raise InputError("a server's address must hold no ? and no #")
        if not known or not url.isascii() or " " in url:
            raise InputError(f"{url!r}: expected http://host:port/v1 or https://...")
        tls = parts.scheme == "https"
        port = port or (443 if tls else 80)
        return Address(url.rstrip("/"), str(parts.hostname), port, tls, parts.path.rstrip("/"))


class _Line(NamedTuple):
    """An open connection, and the parser that knows where in the protocol it is."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    wire: h11.Connection


class Door:
    """Exchanges with one address, many at a time; used inside one event loop, then closed."""

    def __init__(self, address: Address, *, limit: int):
        self.address, self.limit = address, limit
        self.idle: list[_Line] = []
        self.tls = ssl.create_default_context() if address.tls else None
        self.found: list[tuple[int, str]] = []  # family and number of the host

    async def post(
        self, path: str, body: bytes, headers: Sequence[tuple[str, str]], timeout: float
    ) -> HTTPReply:
        """The reply to a POST of JSON; Failed or TooLarge. Ends within `timeout` seconds."""
        task = asyncio.ensure_future(self._outcome(path, body, headers))
        try:
            await asyncio.wait({task}, timeout=timeout)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        late = Failed(f"no whole reply within {timeout:.3g} s")
        found = late if task.cancelled() else task.result()
        try:
            if isinstance(found, Exception):
                raise found
            return found
        finally:  # a traceback must not hold what holds it: replies would live until a collection
            del found, task, late

    def close(self) -> None:
        for line in self.idle:
            line.writer.transport.abort()
        self.idle = []

    async def _outcome(self, path: str, body: bytes, headers) -> HTTPReply | Failed | TooLarge:
        try:
            return await self._post(path, body, headers)
        except TooLarge:
            return TooLarge()
        except OSError as error:  # ssl's errors are among them
            error.__traceback__ = None
            reason = error.strerror or str(error) or type(error).__name__
            if isinstance(error, ConnectionError) and error.errno:  # asyncio words it oddly
                reason = os.strerror(error.errno)
            return Failed(reason)
        except h11.RemoteProtocolError as error:
            return Failed(f"broken HTTP: {error}")

    async def _post(self, path: str, body: bytes, headers) -> HTTPReply:
        while True:
            used = bool(self.idle)
            line = self.idle.pop() if used else await self._connect()
            if used and await _spoke(line):
                line.writer.transport.abort()
                continue
            try:
                reply = await self._exchange(line, path, body, headers)
            except (ConnectionError, asyncio.IncompleteReadError) as error:
                error.__traceback__ = None  # the reader keeps the error, which must not keep it
                line.writer.transport.abort()
                if used:  # the server had closed it meanwhile, before it read this request
                    continue
                raise ConnectionError("the connection was closed before a reply came") from None
            except BaseException:
                line.writer.transport.abort()
                raise
            over = line.wire.our_state is h11.DONE and line.wire.their_state is h11.DONE
            if over and not line.wire.trailing_data[0]:
                line.wire.start_next_cycle()
                self.idle.append(line)
            else:
                line.writer.transport.abort()
            return reply

    async def _exchange(self, line: _Line, path: str, body: bytes, headers) -> HTTPReply:
        host = self.address.host
        head = [
            ("Host", f"[{host}]" if ":" in host else f"{host}:{self.address.port}"),
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("Accept", "application/json"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "reasonrl"),
            *headers,
        ]
        target = self.address.path + path
        parts = (h11.Request(method="POST", target=target, headers=head), h11.Data(data=body))
        for part in (*parts, h11.EndOfMessage()):
            line.writer.write(line.wire.send(part) or b"")
        await line.writer.drain()
        return await self._receive(line)

    async def _receive(self, line: _Line) -> HTTPReply:
        status, fields, body, begun = 0, {}, bytearray(), False
        while True:
            event = line.wire.next_event()
            if event is h11.NEED_DATA:
                data = await line.reader.read(CHUNK)
                if not data and not begun:
                    raise asyncio.IncompleteReadError(b"", None)
                begun = True
                line.wire.receive_data(data)
            elif isinstance(event, h11.Response):
                status = event.status_code
                fields = {k.decode("latin-1"): v.decode("latin-1") for k, v in event.headers}
                if int(fields.get("content-length", 0)) > self.limit:
                    raise TooLarge
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self.limit:
                    raise TooLarge
            elif isinstance(event, h11.EndOfMessage):
                return HTTPReply(status, fields, bytes(body))
            elif isinstance(event, h11.ConnectionClosed):
                raise ConnectionError("the connection was closed before a reply came")

    async def _connect(self) -> _Line:
        if not self.found:
            self.found = await _look_up(self.address.host, self.address.port)
        name = self.address.host if self.tls else None
        for at, (family, number) in enumerate(self.found):
            try:
                reader, writer = await asyncio.open_connection(
                    number,
                    self.address.port,
                    family=family,
                    ssl=self.tls,
                    server_hostname=name,
                    limit=CHUNK,
                )
            except OSError:
                if at + 1 == len(self.found):
                    raise
                continue
            return _Line(reader, writer, h11.Connection(h11.CLIENT, HEAD))
        raise OSError(f"no address for {self.address.host}")


async def _spoke(line: _Line) -> bool:
    """Whether bytes, or the end, came on an idle connection: they would be read as the reply to the
    next question, and every later reply as that to the one after its own."""
    reading = asyncio.ensure_future(line.reader.read(1))
    for _ in range(3):  # until the loop has looked at the socket, and the reader at what it gave
        await asyncio.sleep(0)
    reading.cancel()
    await asyncio.wait({reading})
    if reading.cancelled():
        return False
    reading.exception()  # looked at, so that nobody is told of it
    return True


async def _look_up(host: str, port: int) -> list[tuple[int, str]]:
    """Numbers of a name. In a thread of its own: nothing can end a resolver that hangs, so the
    deadline leaves it behind, and asyncio's own threads would be waited for."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[list[tuple[int, str]]] = loop.create_future()

    def tell(found: list[tuple[int, str]], error: OSError | None) -> None:
        if not done.done():
            done.set_exception(error) if error else done.set_result(found)

    def look() -> None:
        found: list[tuple[int, str]] = []
        failure: OSError | None = None
        try:
            rows = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found = [(int(row[0]), str(row[4][0])) for row in rows]
        except (OSError, UnicodeError) as error:
            failure = OSError(f"cannot find the host {host} ({error})")
        if not loop.is_closed():
            try:
                loop.call_soon_threadsafe(tell, found, failure)
            except RuntimeError:  # closed in between: nobody waits any more
                pass

    threading.Thread(target=look, daemon=True).start()
    return await done
