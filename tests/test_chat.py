"""The chat client against a scripted server: faults, order, parallelism, cache, keys."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fault_server import (
    FAULTS,
    MODEL,
    QUICK,
    STOPPING,
    FaultServer,
    ask,
    completion,
    connect,
    echo,
    verdict,
    whole,
)

from reasonrl import InputError, Problem, Score, ScorerDown
from reasonrl.chat import ChatClient, Patience
from reasonrl.chat.cache import Cache
from reasonrl.choice import texts
from reasonrl.cli import main
from reasonrl.rewards.judge import Judge


def faults(count: int, monkeypatch) -> None:
    """`count` judgements, half of them of answers on which the server fails, all kinds in turn."""
    limit = {"timeout": 1.5, "deadline": 3.0, "retries": 1, "trip": 10**9}
    took: list[float] = []
    one = ChatClient._one

    async def timed(self, door, body):
        began = time.monotonic()
        try:
            return await one(self, door, body)
        finally:
            took.append(time.monotonic() - began)

    monkeypatch.setattr(ChatClient, "_one", timed)
    answers = []
    for i in range(count):
        kind = FAULTS[i // 2 % len(FAULTS)]
        answers.append(
            f"fault={kind} id={i}" if i % 2 else f"right id={i}" * (i % 4 == 0) or f"{i}"
        )

    async def grade(message: str, _: int) -> str:
        return verdict(message, int("right id=" in message))

    with FaultServer(grade) as server:
        chat = connect(server, patience=limit, limit=1 << 20, parallel=64)
        judge = Judge(chat, max_tokens=8, temperature=0.0)
        chunk, kinds, grown = 500, {}, []
        for start in range(0, count, chunk):
            part = answers[start : start + chunk]
            found = judge(texts([Problem("p", "2+2?")] * len(part), part)).outcome
            assert len(found) == len(part)
            for answer, score in zip(part, found, strict=True):
                if answer.startswith("fault="):
                    assert score.value is None and score.kind in ("unscorable", "infra"), answer
                    assert score.reason
                    late = "no whole reply within" in score.reason
                    end = "late" if late else score.kind
                    kinds.setdefault(answer.split()[0][6:], set()).add(end)
                elif score.kind == "scored":
                    assert score.value == float(answer.startswith("right")), answer
                else:  # nothing but a machine that is too busy may take a good reply away
                    assert "no whole reply within" in score.reason
            grown.append(psutil.Process().memory_info().rss)
        assert set(kinds) == set(FAULTS) and set(FAULTS) <= set(server.seen)
    assert len(took) == count and max(took) <= limit["deadline"] + 1.0
    assert grown[-1] - grown[0] < 50 << 20
    passing = ("status", "reset", "truncated-chunk", "wrong-length")
    for kind, ends in kinds.items():
        slow = kind in ("hang", "slow-body")
        end = "late" if slow else "infra" if kind.startswith(passing) else "unscorable"
        assert end in ends and ends <= {end, "late"}, (kind, ends)
    assert len(FAULTS) + len(STOPPING) + 2 >= 25  # TLS and names are below


def test_no_fault_becomes_a_score(monkeypatch):
    faults(528, monkeypatch)


@pytest.mark.torture
def test_no_fault_becomes_a_score_10000(monkeypatch):
    faults(10_000, monkeypatch)


@pytest.mark.parametrize("kind", STOPPING)
def test_what_a_person_must_mend_stops_at_once(kind):
    with FaultServer() as server:
        chat = connect(server, parallel=2)
        with pytest.raises(InputError, match="redirects" if kind == "redirect" else "status 401"):
            ask(chat, [f"fault={kind} id={i}" for i in range(50)])
        assert server.seen[kind] <= 2 and server.peak <= 2


def test_no_tls_there_is_infra():
    with FaultServer() as server:
        url = server.url.replace("http:", "https:")
        patience = Patience(**(QUICK | {"retries": 1}))
        (found,) = ask(ChatClient(url, MODEL, patience=patience), ["x"])
        assert isinstance(found, Score) and found.kind == "infra" and "SSL" in found.reason


def test_a_name_without_a_number_is_infra_also_if_the_resolver_hangs(monkeypatch):
    def unknown(host, *_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    patience = Patience(**(QUICK | {"retries": 1}))
    (found,) = ask(ChatClient("http://judge.invalid/v1", MODEL, patience=patience), ["x"])
    assert isinstance(found, Score) and found.kind == "infra" and "judge.invalid" in found.reason
    free = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: free.wait(60) and [])
    patience = Patience(**(QUICK | {"timeout": 0.05, "deadline": 0.1}))
    (found,) = ask(ChatClient("http://judge.invalid/v1", MODEL, patience=patience), ["x"])
    assert isinstance(found, Score) and found.kind == "infra" and not free.is_set()
    free.set()


def test_order_and_equal_requests_and_connections():
    prompts = [f"question {i % 40}" for i in range(200)]
    with FaultServer(echo) as server:
        chat = connect(server, parallel=7)
        assert ask(chat, prompts) == [f"re {p}" for p in prompts]
        assert len(server.requests) == 40 and server.peak <= 7 and server.connections <= 7
        assert chat.counts["questions"] == 200 and chat.counts["requests"] == 40
        asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "x"}]
        assert ask(chat, [asked, "x"], seeds=[1, 2]) == ["re x", "re x"]
        sent = {(r["messages"], r["seed"], r["max_tokens"]) for r in server.requests[-2:]}
        assert sent == {(2, 1, 8), (1, 2, 8)}


def test_128_requests_take_4_rounds():
    """At 200 ms of latency: 0.8 s and not 25.6 s. Counted, not timed: the server answers nobody
    before 32 requests are in its hands, which is one round."""
    rounds, held = [], []

    async def together(message: str, _: int) -> str:
        mine = asyncio.get_running_loop().create_future()
        held.append(mine)
        if len(held) == 32:
            rounds.append(len(held))
            for future in held:
                future.set_result(None)
            held.clear()
        await asyncio.wait_for(mine, 30)
        return f"re {message}"

    with FaultServer(together) as server:
        prompts = [f"{i}" for i in range(128)]
        assert ask(connect(server, parallel=32), prompts) == [f"re {p}" for p in prompts]
        assert rounds == [32] * 4 and server.peak == 32
    assert 4 * 20 <= 128


def test_replies_are_kept_on_disk(tmp_path):
    with FaultServer(echo) as server:
        for _ in range(2):
            assert ask(connect(server, cache=tmp_path), ["a", "b"]) == ["re a", "re b"]
        assert len(server.requests) == 2
        files = sorted(tmp_path.rglob("*.json"))
        assert len(files) == 2 and not [p for p in tmp_path.rglob(".*")]
        files[0].write_text(files[0].read_text().replace("re ", "no "))  # a change
        files[1].write_bytes(files[1].read_bytes()[:-3])  # a torn write
        assert ask(connect(server, cache=tmp_path), ["a", "b"]) == ["re a", "re b"]
        assert len(server.requests) == 4
        assert ask(connect(server, cache=tmp_path), ["a"], seeds=[5]) == ["re a"]
        (found,) = ask(connect(server, cache=tmp_path), ["fault=html id=1"])
        assert isinstance(found, Score) and len(list(tmp_path.rglob("*.json"))) == 3
    with pytest.raises(InputError, match="cache"):
        Cache(files[0])


def test_every_damage_of_a_kept_reply_is_seen(tmp_path):
    cache = Cache(tmp_path)
    cache.put("ab" * 24, "text \ud800")
    (path,) = tmp_path.rglob("*.json")
    data = path.read_bytes()
    assert cache.get("ab" * 24) == "text \ud800"
    for at in range(len(data)):
        path.write_bytes(data[:at])
        assert cache.get("ab" * 24) is None
        for bit in range(8):
            path.write_bytes(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            assert cache.get("ab" * 24) in (None, "text \ud800")
    path.write_bytes(b"[" * 100_000)
    assert cache.get("ab" * 24) is None


def test_the_key_is_sent_and_shown_nowhere(monkeypatch, tmp_path, caplog):
    key = "sk-canary/0123456789"
    monkeypatch.setenv("CANARY", key)

    async def tell(message: str, _: int):
        said = f"your key is {key}"
        if message == "refuse":
            return whole({"error": said}, 401)
        if message == "trouble":
            return whole({"error": said}, 500)
        if message == "escaped":
            body = json.dumps(completion(said)).replace("/", "\\/").encode()
            return whole(body)
        return whole({"error": said}) if message == "odd" else said

    with FaultServer(tell) as server, caplog.at_level(logging.DEBUG):
        patience = Patience(**(QUICK | {"retries": 0}))
        chat = ChatClient(server.url, MODEL, key_env="CANARY", patience=patience, cache=tmp_path)
        found = ask(chat, ["x", "trouble", "odd", "escaped"])
        with pytest.raises(InputError, match="status 401") as refused:
            ask(chat, ["refuse"])
        down = Patience(**(QUICK | {"policy": "pause", "wait": 0.01, "retries": 0}))
        chat = ChatClient(server.url, MODEL, key_env="CANARY", patience=down)
        server.down = True
        with pytest.raises(ScorerDown) as stopped:
            ask(chat, ["y"])
        assert server.keys == {f"Bearer {key}"}
    kept = "".join(p.read_text() for p in Path(tmp_path).rglob("*.json"))
    shown = [repr(found), str(refused.value), str(stopped.value), caplog.text, kept]
    shown += [repr(chat), repr(vars(chat))]
    assert not any("canary" in text for text in shown)
    assert "***" in repr(found) and "***" in str(refused.value) and "***" in kept
    monkeypatch.setenv("CANARY", "two words")
    with pytest.raises(InputError, match="CANARY: expected a key, one word"):
        ChatClient("http://127.0.0.1:1/v1", MODEL, key_env="CANARY")


def test_no_proxy_and_no_other_host(monkeypatch):
    with FaultServer(echo) as server, FaultServer(echo) as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        assert ask(connect(server), ["a"]) == ["re a"] and not proxy.connections


def test_a_prompt_that_is_too_long_is_unscorable():
    async def long(message: str, _: int):
        text = {"error": {"message": "This model's maximum context length is 8 tokens"}}
        empty = {"model": MODEL, "choices": [{"message": {}, "finish_reason": "length"}]}
        return whole(text, 400) if message == "a" else whole(empty)

    with FaultServer(long) as server:
        found = ask(connect(server), ["a", "b"])
        assert [f.kind for f in found if isinstance(f, Score)] == ["unscorable"] * 2
        reasons = [f.reason for f in found if isinstance(f, Score)]
        assert reasons == ["the prompt is too long", "cut at max_tokens before any text"]
        assert len(server.requests) == 2


def test_it_works_inside_a_running_loop():
    async def inside(server: FaultServer):
        return ask(connect(server), ["a"])

    with FaultServer(echo) as server:
        assert asyncio.run(inside(server)) == ["re a"]


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/v1",
        "http://",
        "127.0.0.1:8000",
        "http://h:99999/v1",
        "http://u:p@h/v1",
        "http://h?x",
    ],
)
def test_addresses_are_checked(url):
    with pytest.raises(InputError):
        ChatClient(url, MODEL)


def test_votes_are_requests_with_seeds_of_their_own():
    """Two of three votes say 1; one is lost to the server and is not a 0."""

    async def vote(message: str, _: int) -> object:
        return whole({}, 500) if "lost" in message else verdict(message, 1)

    with FaultServer(vote) as server:
        chat = connect(server, patience={"retries": 0})
        judge = Judge(chat, votes=3, max_tokens=8, seed=2)
        rewards = judge(texts([Problem("p", "2+2")] * 2, ["4", "lost"]))
        assert [s.value for s in rewards.outcome] == [1.0, None]
        assert rewards.outcome[1].kind == "infra" and "500" in rewards.outcome[1].reason
        assert rewards.metrics == {"judge/unparsable": 0.0, "judge/infra": 0.5}
        seeds = [r["seed"] for r in server.requests]
        assert sorted(set(seeds)) == [2_000_006, 2_000_007, 2_000_008]


def test_judge_bench_over_http(tmp_path, capsys):
    async def grade(message: str, _: int) -> str:
        return verdict(message, int("yes" in message))

    rows = [
        {"question": "q", "response": f"{w} {i}", "label": int(w == "yes")}
        for i, w in enumerate(["yes", "no"] * 6)
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    with FaultServer(grade) as server:
        words = ["judge", "bench", str(tmp_path / "b.jsonl"), "--judge", server.url]
        more = ["--judge-model", MODEL, "--judge-cache", str(tmp_path / "kept")]
        assert main([*words, *more]) == 0
        assert json.loads(capsys.readouterr().out)["accuracy"]["accuracy"] == 1.0
        assert main([*words, *more]) == 0 and len(server.requests) == 12
        capsys.readouterr()
        assert main(words) == 2 and "--judge-model" in capsys.readouterr().err
        assert main([*words, "--judge-model", "x", "--judge-timeout", "0"]) == 2
        server.down = True
        down = ["--judge-model", MODEL, "--outage", "fail"]
        capsys.readouterr()
        assert main([*words, *down]) == 4
        assert f"judge {server.url}" in capsys.readouterr().err
