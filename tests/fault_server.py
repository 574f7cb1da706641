"""A chat server on loopback that fails on request: the message says how ("fault=reset id=3").

Every broken reply carries, as far as its kind allows, a whole verdict of 1, so that a reader who is
not strict is caught. Raw sockets, one thread, one event loop; it ends with its `with` block.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import re
import struct
import threading
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

from reasonrl.chat import ChatClient, Patience

MODEL = "scripted"
STATUSES = {f"status-{code}": code for code in (500, 502, 503, 504, 429, 408, 401)}
BIG = 50 << 20  # bytes of the body that is too large
BOMB = gzip.compress(bytes(16 << 20))  # 16 KiB, a second member of a compressed body


def verdict(prompt: str, value: object) -> str:
    found = re.search(r"<verdict-([0-9a-f]+)>", prompt)
    tag = f"verdict-{found[1]}" if found else "none"
    return f"<{tag}>{value}</{tag}>"


def completion(content: Any, model: str = MODEL) -> dict[str, Any]:
    choice = {"index": 0, "message": {"role": "assistant", "content": content}}
    return {"model": model, "choices": [choice | {"finish_reason": "stop"}]}


def head(length: int | None, status: int = 200, **fields: str) -> bytes:
    lines = [f"HTTP/1.1 {status} status", "Content-Type: application/json"]
    lines += [] if length is None else [f"Content-Length: {length}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"


def whole(body: Any, status: int = 200, **fields: str) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head(len(data), status, **fields) + data


def bodies(prompt: str) -> dict[str, bytes]:
    """Faults that are one message and then an open connection."""
    good = completion(verdict(prompt, 1))
    text = json.dumps(good).encode()
    twice = text.replace(b'{"model"', b'{"model": "x", "model"', 1)
    return {
        **{name: whole(good, code) for name, code in STATUSES.items()},
        "gzip-bomb": whole(gzip.compress(text) + BOMB, Content_Encoding="gzip"),
        "not-utf8": whole(text.replace(b"stop", b"st\xff\xfe")),
        "html": whole(b"<html><body>" + text + b"</body></html>"),
        "empty-choices": whole(good | {"choices": []}),
        "null-content": whole(completion(None)),
        "nan-score": whole(text[:-1] + b', "score": NaN}'),
        "huge-score": whole(text[:-1] + b', "score": 1e999}'),
        "string-score": whole(completion("1")),
        "two-objects": whole(text + text),
        "duplicate-keys": whole(twice),
        "wrong-model": whole(completion(verdict(prompt, 1), "another")),
        "redirect": whole(good, 307, Location="http://127.0.0.1:9/v1/chat/completions"),
    }


ONE_MESSAGE = tuple(bodies(""))
WIRE = ("slow-body", "hang", "reset", "truncated-chunk", "wrong-length", "50-mb")
STOPPING = ("status-401", "redirect")  # errors of configuration
FAULTS = tuple(name for name in (*ONE_MESSAGE, *WIRE) if name not in STOPPING)


class FaultServer:
    """`url`; `seen`: requests by fault kind; `peak`: most requests in its hands at one time."""

    def __init__(self, answer: Callable[[str, int], Awaitable[Any]] | None = None):
        self.answer = answer  # (message, how often it was asked) -> content, or raw bytes
        self.seen: Counter[str] = Counter()
        self.asked: Counter[str] = Counter()
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str] = set()
        self.now = self.peak = self.connections = 0
        self.down = False  # True: every connection is reset
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)

    def __enter__(self) -> FaultServer:
        self.thread.start()
        start = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.server = asyncio.run_coroutine_threadsafe(start, self.loop).result(10)
        self.port = self.server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            self.server.close()
            own = asyncio.current_task()
            rest = [task for task in asyncio.all_tasks() if task is not own]
            for task in rest:
                task.cancel()
            await asyncio.gather(*rest, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while await self._request(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    async def _request(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        if await reader.readexactly(4) != b"POST":  # somebody speaks TLS here
            writer.write(head(0, 400))
            await writer.drain()
            return False
        top = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        length = re.search(r"(?i)content-length: (\d+)", top)
        body = json.loads(await reader.readexactly(int(length[1]) if length else 0))
        self.keys |= set(re.findall(r"(?i)authorization: (\S+ \S+)", top))
        message = written(body["messages"][-1]["content"])
        self.asked[message] += 1
        self.requests.append({**body, "messages": len(body["messages"])})
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            return await self._reply(reader, writer, message)
        finally:
            self.now -= 1

    async def _reply(self, reader, writer: asyncio.StreamWriter, message: str) -> bool:
        found = re.search(r"fault=([a-z0-9-]+)", message)
        kind = found[1] if found else "good"
        self.seen[kind] += 1
        if kind in ONE_MESSAGE:
            writer.write(bodies(message)[kind])
        elif kind in WIRE or self.down:
            await self._break(reader, writer, "reset" if self.down else kind, message)
            return False
        elif self.answer is not None:
            reply = await self.answer(message, self.asked[message])
            writer.write(reply if isinstance(reply, bytes) else whole(completion(reply)))
        else:
            writer.write(whole(completion(verdict(message, 1))))
        await writer.drain()
        return True

    async def _break(self, reader, writer: asyncio.StreamWriter, kind: str, message: str) -> None:
        text = json.dumps(completion(verdict(message, 1))).encode()
        if kind == "slow-body":
            writer.write(head(len(text)))
            for byte in text:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.sleep(0.2)
        elif kind == "hang":
            await reader.read(1)  # until the client gives up
        elif kind == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(1, 13, linger)  # SOL_SOCKET, SO_LINGER
        elif kind == "truncated-chunk":
            size = f"{len(text) + 9:x}\r\n".encode()
            writer.write(head(None, Transfer_Encoding="chunked") + size + text)
        elif kind == "wrong-length":
            writer.write(head(len(text) + 9) + text)
        elif kind == "50-mb":
            writer.write(head(None, Transfer_Encoding="chunked"))
            chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
            for _ in range(BIG >> 16):
                writer.write(chunk)
                await writer.drain()
            writer.write(f"{len(text):x}\r\n".encode() + text + b"\r\n0\r\n\r\n")
        await writer.drain()


QUICK = {"pause": 0.01, "timeout": 20.0, "deadline": 40.0, "policy": "mask"}


def connect(server: FaultServer, **options) -> ChatClient:
    patience = Patience(**(QUICK | options.pop("patience", {})))
    return ChatClient(server.url, MODEL, patience=patience, **options)


def ask(chat: ChatClient, prompts, **options):
    plan = {"max_tokens": 8, "temperature": 0.0, "seeds": [0] * len(prompts)} | options
    return chat.ask(prompts, **plan)


def written(content: Any) -> str:
    """The text of a message; its pictures are counted in `pictures=`."""
    if isinstance(content, str):
        return content
    urls = [part["image_url"]["url"] for part in content if part["type"] == "image_url"]
    text = "".join(part["text"] for part in content if part["type"] == "text")
    return f"{text} pictures={len(urls)} first={urls[0][:22] if urls else ''}"


async def echo(message: str, _: int) -> str:
    return f"re {message}"
