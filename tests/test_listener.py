"""Connections of the server: bounds, batches, broken HTTP, slow clients, stops."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from served import Served, rows, scripted

from reasonrl import InputError
from reasonrl.records import scored
from reasonrl.serve import App, Limits, run


def test_paths_methods_and_broken_http():
    with Served(scripted()) as served:
        assert "there are /, /classify" in served.call("/v2", {})[2]["error"]["message"]
        status, headers, _ = served.call("/reward")
        assert status == 405 and headers["Allow"] == "POST"
        status, headers, text = served.call("/health", method="HEAD")
        assert status == 200 and int(headers["Content-Length"]) > 0
        assert served.call("/v1/chat/completions", {"messages": []})[0] == 404
        assert served.call("/classify", {"input": "x"})[0] == 400
        for bad, code in [
            (b"nonsense\r\n\r\n", b"400"),
            (b"GET / HTTP/1.1\r\n\r\n", b"400"),  # no Host
            (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"b" * 20_000, b"431"),
            (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n", b"413"),
            (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", b"400"),
        ]:
            with socket.create_connection(("127.0.0.1", served.port), timeout=30) as raw:
                raw.sendall(bad)
                assert raw.recv(65536).split()[1] == code, bad[:40]
        assert served.call("/health")[0] == 200


def test_chunked_bodies_and_kept_connections():
    with Served(scripted(), body=2048) as served:
        link = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
        data = json.dumps(rows("4")).encode()
        for _ in range(3):
            link.request(
                "POST",
                "/",
                iter([data[:20], data[20:]]),
                encode_chunked=True,
                headers={"Transfer-Encoding": "chunked"},
            )
            reply = link.getresponse()
            assert reply.status == 200 and json.loads(reply.read())["rewards"] == [1.0]
        assert len(served.listener.open) == 1
        link.request(
            "POST",
            "/",
            iter([b"x" * 1024] * 3),
            encode_chunked=True,
            headers={"Transfer-Encoding": "chunked"},
        )
        assert link.getresponse().status == 413
        link.close()
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as raw:
            head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n"
            raw.sendall(f"{head}Expect: 100-continue\r\n\r\n".encode())
            assert b" 100 " in raw.recv(4096)
            raw.sendall(data + data[:0])
            assert b"200 OK" in raw.recv(4096)


def test_requests_become_batches_and_a_full_queue_is_503():
    go, sizes = threading.Event(), []

    def held(batch):
        sizes.append(len(batch))
        assert go.wait(60)
        return [scored(float(row.completion)) for row in batch]

    with Served(scripted(held, size=8, waiting=16)) as served, ThreadPoolExecutor(32) as threads:
        queue = served.app.first.queue
        first = threads.submit(served.call, "/", rows("0"))
        served.until(lambda: sizes == [1])
        later = [
            threads.submit(served.call, "/", rows(f"{i}", f"{i + 1}")) for i in range(1, 16, 2)
        ]
        served.until(lambda: queue.queued == 16)
        status, headers, reply = served.call("/", rows("4"))
        assert status == 503 and headers["Retry-After"] == "1"
        assert reply["error"]["message"] == "the queue is full"
        assert served.call("/health")[0] == 200  # it answers meanwhile
        go.set()
        assert first.result(60)[2]["rewards"] == [0.0]
        got = [f.result(60)[2]["rewards"] for f in later]
        assert got == [[float(i), float(i + 1)] for i in range(1, 16, 2)]
        assert sizes == [1, 8, 8]
        assert served.app.metrics.value("refused_total", reason="queue") == 1


def test_a_scorer_that_raises_is_500_for_its_batch_alone():
    def moody(batch):
        if any(row.completion == "bad" for row in batch):
            raise RuntimeError("a bug")
        return [scored(1.0)] * len(batch)

    with Served(scripted(moody)) as served:
        status, _, reply = served.call("/", rows("bad"))
        assert status == 500 and "RuntimeError" in reply["error"]["message"]
        assert "a bug" not in json.dumps(reply)
        assert served.app.metrics.value("requests_total", path="/", status="500") == 1
        assert served.call("/", rows("4"))[2]["rewards"] == [1.0]


def test_1000_slow_clients():
    """Half a head each, then silence: some are told 503 at once, the others 408 when their time is
    over; memory does not grow, and whoever comes after them is served."""
    with Served(scripted(), connections=200, read=1.0) as served:
        before = psutil.Process().memory_info().rss
        slow = []
        for _ in range(1000):
            raw = socket.socket()
            raw.settimeout(30)
            raw.connect(("127.0.0.1", served.port))
            raw.sendall(b"POST / HTTP/1.1\r\nHost: x\r\n")
            slow.append(raw)
        answers = []
        for raw in slow:
            try:
                answers.append(raw.recv(4096)[9:12].decode())
            except ConnectionResetError:
                answers.append("reset")
            raw.close()
        assert set(answers) <= {"408", "503", "reset", ""}
        assert answers.count("408") >= 200 and answers.count("503") >= 1
        assert psutil.Process().memory_info().rss - before < 50 << 20
        served.until(lambda: not served.listener.open)
        assert served.call("/", rows("4"))[2]["rewards"] == [1.0]


def test_bytes_held_at_one_time_are_bounded():
    with Served(scripted(), memory=64 << 10, body=60 << 10) as served:
        head = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 50000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", served.port), timeout=30) as raw:
            raw.sendall(head + b"x" * 40_000)
            served.until(lambda: served.listener.held == 40_000)
            status, _, reply = served.call("/", b"y" * 30_000)
            assert status == 503 and "bytes" in reply["error"]["message"]
            raw.sendall(b"x" * 10_000)
            assert b" 400 " in raw.recv(4096)
        served.until(lambda: served.listener.held == 0)


def test_a_stop_loses_no_request():
    """Stopped while requests are queued, half sent, and waiting to be let in."""
    go = threading.Event()

    def held(batch):
        assert go.wait(60)
        return [scored(1.0)] * len(batch)

    with Served(scripted(held)) as served, ThreadPoolExecutor(32) as threads:
        queue = served.app.first.queue
        asked = [threads.submit(served.call, "/", rows("4")) for _ in range(24)]
        served.until(lambda: queue.queued + queue.batches >= 24 and len(served.listener.open) == 24)
        half = socket.create_connection(("127.0.0.1", served.port), timeout=30)
        data = json.dumps(rows("4")).encode()
        head = f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        half.sendall(head + data[:10])
        idle = socket.create_connection(("127.0.0.1", served.port), timeout=30)
        served.until(lambda: len(served.listener.open) == 26)
        served.stop()
        served.until(lambda: served.listener.socket.fileno() == -1)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", served.port), timeout=30)
        half.sendall(data[10:])
        go.set()
        assert all(f.result(60)[0] == 200 for f in asked)
        reply = half.recv(65536)
        assert b"200 OK" in reply and b"close" in reply.lower()
        assert idle.recv(10) == b""
        served.thread.join(30)
        assert served.lost == 0
        half.close(), idle.close()


def test_sigterm_drains_the_command():
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    words = [sys.executable, "-m", "reasonrl.cli", "serve", "math", "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=env)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        port = int(line.split("127.0.0.1:")[1].split()[0])
        ends: list[object] = []

        def hammer(i: int) -> None:
            for n in range(10_000):
                link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    link.connect()
                except ConnectionRefusedError:
                    return
                link.request("POST", "/", json.dumps(rows(f"\\boxed{{{i}+{n}}}")))
                ends.append(link.getresponse().status)
                link.close()

        with ThreadPoolExecutor(8) as threads:
            work = [threads.submit(hammer, i) for i in range(8)]
            while len(ends) < 40 and not any(f.done() for f in work):
                time.sleep(0.01)
            process.send_signal(signal.SIGTERM)
            for future in work:
                future.result(60)  # a reply that does not come raises here
        rest = process.stdout.read()
        assert process.wait(60) == 0 and rest == f"stopped after {len(ends)} requests\n"
        assert set(ends) == {200} and len(ends) >= 40
    finally:
        process.kill()
        process.wait()


def test_a_port_that_is_taken():
    with Served(scripted()) as served:
        with pytest.raises(InputError, match=f"--port {served.port}: Address already in use"):
            run(App([scripted()]), ("127.0.0.1", served.port), Limits(), lambda *_: None)
