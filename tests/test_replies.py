"""600 replies that come twice, late or out of order: each question has its own answer, once.

The server answers over loopback; what it does to a reply is drawn from the question's number.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from fault_server import FaultServer, ask, completion, connect, verdict, whole

from reasonrl import Problem
from reasonrl.choice import texts
from reasonrl.rewards.judge import Judge
from reasonrl.tasks.base import Draws

COUNT, PARALLEL = 600, 24
PATIENT = {"timeout": 0.5, "deadline": 60.0, "retries": 4, "trip": 10**9, "policy": "pause"}
KINDS = ("twice", "late", "reordered", "good")


class Mixed:
    """Answers a message by its kind; `said` counts what went out."""

    def __init__(self, content) -> None:
        self.content = content
        self.said: Counter[str] = Counter()
        self.held: list[asyncio.Future] = []
        self.draws = Draws("replies")

    async def __call__(self, message: str, times: int):
        kind = next((k for k in KINDS if f"kind={k} " in message), "good")
        self.said[kind] += 1
        reply = whole(completion(self.content(message)))
        if kind == "twice":
            return reply + reply
        if kind == "late" and times == 1:
            await asyncio.sleep(0.8)  # the client has given up and asked again
            self.said["late indeed"] += 1
        if kind == "reordered":
            await self.turn()
        return reply

    async def turn(self) -> None:
        """Wait until a few are here or a moment has passed, then leave in a drawn order."""
        mine = asyncio.get_running_loop().create_future()
        self.held.append(mine)
        if len(self.held) >= 5:
            self.let_go()
        await asyncio.wait({mine}, timeout=0.05)
        if not mine.done():
            self.let_go()

    def let_go(self) -> None:
        for future in self.draws.shuffled(self.held):
            future.set_result(None)
        self.held = []


def questions() -> list[str]:
    """Each has its number; a tenth of them are asked twice in the batch."""
    draws = Draws("questions")
    once = [f"kind={draws.choice(KINDS)} id={i} end" for i in range(COUNT)]
    return draws.shuffled(once + once[: COUNT // 10])


def test_every_question_gets_its_own_answer_and_is_kept_once(tmp_path):
    asked = questions()
    mixed = Mixed(lambda message: f"re {message}")
    with FaultServer(mixed) as server:
        options = {"parallel": PARALLEL, "cache": tmp_path, "patience": PATIENT}
        assert ask(connect(server, **options), asked) == [f"re {q}" for q in asked]
        assert set(server.asked) - {"1"} == set(asked)  # and a probe where all waited
        assert min(mixed.said[k] for k in KINDS) > 100
        kept = [json.loads(p.read_text())["text"] for p in tmp_path.rglob("*.json")]
        assert Counter(kept) == Counter(f"re {q}" for q in set(asked))
        before = len(server.requests)
        assert ask(connect(server, **options), asked) == [f"re {q}" for q in asked]
        assert len(server.requests) == before  # all of it is on the disk
    assert mixed.said["late"] > mixed.said["late indeed"] > 0


def test_a_judge_scores_each_completion_by_its_own_verdict():
    """A reply that answered another completion would be a reward for the wrong one."""
    draws = Draws("judged")
    right = [draws.below(2) for _ in range(COUNT)]
    answers = [f"kind={KINDS[i % 4]} id={i} right={r} end" for i, r in enumerate(right)]
    mixed = Mixed(lambda message: verdict(message, int("right=1" in message)))
    with FaultServer(mixed) as server:
        chat = connect(server, parallel=PARALLEL, patience=PATIENT)
        judge = Judge(chat, max_tokens=8, temperature=0.0)
        found = judge(texts([Problem("p", "2+2?")] * COUNT, answers)).outcome
    assert [score.value for score in found] == [float(r) for r in right]


def test_bytes_behind_a_reply_close_the_connection():
    """Else they would be read as the answer to the next question."""

    async def twice(message: str, _: int) -> bytes:
        reply = whole(completion(f"re {message}"))
        return reply + (reply if message == "a" else b"")

    with FaultServer(twice) as server:
        assert ask(connect(server, parallel=1), list("abc")) == ["re a", "re b", "re c"]
        assert server.connections == 2
