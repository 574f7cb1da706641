"""A scorer at a server is asked about a group while the rollout server draws the next one."""

from __future__ import annotations

import threading
import zlib

import pytest
from engine_server import EngineServer
from fault_server import MODEL, FaultServer, verdict
from test_engine import SIZE, rows, words

from reasonrl.algos import Libra, Sophia
from reasonrl.algos.base import Algorithm
from reasonrl.chat import ChatClient
from reasonrl.cli import main

GROUPS, GROUP, STEPS = 2, 3, 2
MORE = {"eval_problems": 0, "steps": STEPS, "engine.parallel": 1, "loss": "{name: dapo}"}
LIBRA = "{judge: URL, judge_model: MODEL, votes: 2, max_tokens: 32, outage: fail}"
SOPHIA = "{scorer: URL, scorer_model: MODEL, whole_response: true, keep_degenerate: true}"
KINDS = {"libra": (Libra, LIBRA), "sophia": (Sophia, SOPHIA)}


async def replies(message: str, asked: int) -> str:
    draw = zlib.crc32(message.encode())
    if "<verdict-" in message:
        return verdict(message, draw // 7 % 2)
    return f"<answer>0.{draw % 10}</answer>"


def run(out, kind: str, judge, server) -> int:
    algo = KINDS[kind][1].replace("URL", judge.url).replace("MODEL", MODEL)
    return main(words(server, out, **MORE, algorithm=kind, algo=algo))


def numbers(out) -> list[dict]:
    return [
        {k: v for k, v in row.items() if not k.startswith(("time", "step_time"))}
        for row in rows(out)
    ]


class Waits(EngineServer):
    """Draws the last group of a step only when the scorer has been asked about the first."""

    asked = threading.Event()
    late = 0

    def draw(self, *args, **how):
        if self.seen["/generate"] % (GROUPS * GROUP) == 0:  # the last completion of a step
            self.late += not self.asked.wait(20)
            self.asked.clear()
        return super().draw(*args, **how)


@pytest.mark.parametrize("kind", KINDS)
def test_a_group_is_scored_while_the_next_is_drawn(kind, tmp_path, monkeypatch):
    async def told(message: str, asked: int) -> str:
        Waits.asked.set()
        return await replies(message, asked)

    with FaultServer(told) as judge, Waits("sglang", **SIZE) as server:
        assert run(tmp_path / "early", kind, judge, server) == 0
        assert server.late == 0
        early = judge.requests
    monkeypatch.setattr(KINDS[kind][0], "ahead", Algorithm.ahead)
    with FaultServer(replies) as judge, EngineServer("sglang", **SIZE) as server:
        assert run(tmp_path / "late", kind, judge, server) == 0
        assert len(judge.requests) == len(early) > 0  # nothing is asked twice
    assert numbers(tmp_path / "early") == numbers(tmp_path / "late")
    assert any(row["grad_norm"] > 0 for row in rows(tmp_path / "early"))


def test_a_judge_that_is_down_meanwhile_ends_the_run_as_ever(tmp_path, capsys):
    with FaultServer(replies) as judge, EngineServer("sglang", **SIZE) as server:
        judge.down = True
        assert run(tmp_path / "run", "libra", judge, server) == 4
        assert capsys.readouterr().err.splitlines()[-1].startswith("reasonrl: judge http")
        assert not (tmp_path / "run" / "metrics.jsonl").exists() or rows(tmp_path / "run") == []
        judge.down = False
        algo = LIBRA.replace("URL", judge.url).replace("MODEL", MODEL)
        again = words(server, tmp_path / "run", **MORE, algorithm="libra", algo=algo)
        assert main([*again, "--resume"]) == 0
        assert run(tmp_path / "whole", "libra", judge, server) == 0
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2]


def test_what_is_begun_is_answered_in_order_and_once():
    how = {"max_tokens": 8, "temperature": 0.0}
    with FaultServer(replies) as server:
        client = ChatClient(server.url, MODEL)
        for text in ("a", "b", "c"):
            client.begin([text, "x"], seeds=[0, 0], **how)
        found = client.ask(["a", "b", "c", "d", "x"], seeds=[0] * 5, **how)
        assert sorted(server.asked.items()) == [("a", 1), ("b", 1), ("c", 1), ("d", 1), ("x", 3)]
        assert client.ask(["d"], seeds=[0], **how) == [found[3]] and not client.begun
        assert client.counts["questions"] == 6
