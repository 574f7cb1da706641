"""A server that fails: retries and their bounds, the circuit, the three policies."""

from __future__ import annotations

import logging
import random
import sys
import threading
import time
from email.utils import formatdate
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault_server import FaultServer, ask, connect, echo, whole

from reasonrl import Score, ScorerDown
from reasonrl.chat import requests
from reasonrl.chat.outage import Budget, Circuit, asked_for, rest


def test_what_passes_is_tried_again():
    async def flaky(message: str, asked: int):
        if asked == 1:
            return whole({"error": "busy"}, 503, Retry_After="0")
        return f"re {message}"

    with FaultServer(flaky) as server:
        chat = connect(server, parallel=4)
        assert ask(chat, ["a", "b"]) == ["re a", "re b"] and chat.counts["retries"] == 2

    async def doubtful(message: str, asked: int):
        return whole(b"{}") if asked == 1 else f"re {message}"

    with FaultServer(doubtful) as server:
        assert ask(connect(server), ["a"]) == ["re a"] and server.asked["a"] == 2


def test_tries_are_bounded():
    async def busy(message: str, _: int):
        return whole({}, 429, Retry_After="100" if message == "long" else "0")

    with FaultServer(busy) as server:
        chat = connect(server, patience={"retries": 3, "trip": 1000})
        (found,) = ask(chat, ["short"])
        assert isinstance(found, Score) and found.kind == "infra" and server.asked["short"] == 4
        (found,) = ask(chat, ["long"])  # the wait it asks for does not fit into the deadline
        assert isinstance(found, Score) and server.asked["long"] == 1
        many = [f"{i}" for i in range(100)]
        ask(chat, many)  # 20 + 102 / 5 retries are all that they share
        assert sum(server.asked[m] for m in many) <= 100 + 41


def test_retry_after_budget_and_circuit(monkeypatch):
    draws = random.Random(0)
    assert rest(0.5, 1, "7", draws) == 7.0 and 0.25 <= rest(0.5, 1, None, draws) <= 0.5
    assert all(15 <= rest(0.5, 50, None, draws) <= 30 for _ in range(9))
    assert 8 < asked_for(formatdate(time.time() + 10, usegmt=True)) <= 10
    assert [asked_for(x) for x in ("-3", "soon", "", None, "\u0663")] == [0.0] * 5
    budget = Budget()
    assert sum(budget.spend() for _ in range(100)) == 20
    for _ in range(5):
        budget.earn()
    assert budget.spend() and not budget.spend()
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    circuit = Circuit(2, 1.0)
    circuit.failed("a")
    circuit.answered()
    circuit.failed("a")
    assert not circuit.is_open
    circuit.failed("b")
    assert circuit.is_open and circuit.until == 2.0 and circuit.reason == "b"
    circuit.probe_failed("c")
    assert circuit.until == 4.0
    circuit.answered()
    assert not circuit.is_open and circuit.rest == 1.0


def test_an_open_circuit_asks_one_thing_at_a_time():
    with FaultServer() as server:
        server.down = True
        chat = connect(server, parallel=8, patience={"trip": 4, "retries": 0})
        found = ask(chat, [f"q{i}" for i in range(32)])
        assert all(isinstance(f, Score) and f.kind == "infra" for f in found)
        tried = sum(n for message, n in server.asked.items() if message != "1")
        assert tried <= 4 + 8  # those that opened it and those under way then
        assert any("the server is down" in f.reason for f in found if isinstance(f, Score))
        server.down = False
        assert not any(isinstance(f, Score) for f in ask(chat, ["a", "b", "c"]))


def test_pause_waits_for_the_server(caplog):
    with FaultServer(echo) as server:
        server.down = True
        patience = {"policy": "pause", "retries": 1, "trip": 3, "wait": 60.0}
        chat = connect(server, patience=patience)
        asked = server.asked

        def mend() -> None:
            while asked["1"] < 3:  # the probe
                time.sleep(0.005)
            server.down = False

        helper = threading.Thread(target=mend, daemon=True)
        helper.start()
        with caplog.at_level(logging.WARNING):
            assert ask(chat, [f"q{i}" for i in range(20)]) == [f"re q{i}" for i in range(20)]
        helper.join(10)
        assert sum("is down" in r.message for r in caplog.records) == 1


def test_pause_ends_and_fail_is_at_once():
    with FaultServer() as server:
        server.down = True
        pausing = connect(server, patience={"policy": "pause", "wait": 0.2, "retries": 1})
        with pytest.raises(ScorerDown, match=r"stayed down for 0.2 s, 2 requests are not answered"):
            ask(pausing, ["a", "b"])
        failing = connect(server, parallel=1, patience={"policy": "fail", "retries": 0})
        with pytest.raises(ScorerDown, match="judge http://127.0.0.1"):
            ask(failing, ["c", "d"])
        assert server.asked["c"] == 1 and server.asked["d"] == 0


def test_one_request_that_always_fails_is_no_outage():
    with FaultServer() as server:
        chat = connect(server, patience={"policy": "pause", "retries": 0, "trip": 2})
        bad, good = ask(chat, ["fault=status-500 id=1", "fine"])
        assert isinstance(bad, Score) and bad.kind == "infra" and isinstance(good, str)
        assert server.seen["status-500"] == requests.AGAIN + 1
