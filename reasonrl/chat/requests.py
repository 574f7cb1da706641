"""Requests to one server, many at a time, each ended by an answer or by the reason why there is
none: retries, deadlines, the circuit and the pause of outage.py around the exchanges of
exchange.py.

A subclass says where it asks (`path`), what it calls the server in messages (`word`), what counts
as an answer (`_read`) and what it asks to see whether the server is up (`_probe_body`). The key
comes from an environment variable, is shown nowhere, and is cut out of everything a server says.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Mapping
from typing import Any

from reasonrl import keys
from reasonrl.chat.exchange import Address, Door, Failed, HTTPReply, TooLarge
from reasonrl.chat.outage import Budget, Circuit, Patience, rest
from reasonrl.chat.reply import Malformed, Trouble, Unanswerable
from reasonrl.progress import phase
from reasonrl.records import InputError, Score, ScorerDown, infra, unscorable
from reasonrl.watchdog import beat

logger = keys.logger("reasonrl.chat")
KEY = "REASONRL_API_KEY"  # the environment variable, unless another one is named
AGAIN = 3  # times that `pause` asks again what a server that works could not answer


class Requests:
    """Blocking; a second thread waits for the first one's batch. `counts` says what happened."""

    path = "/"
    word = "server"

    def __init__(
        self,
        url: str,
        *,
        key_env: str = KEY,
        parallel: int = 32,
        patience: Patience | None = None,
        limit: int = 4 << 20,  # bytes of a reply
    ):
        if parallel < 1 or limit < 1:
            raise ValueError(f"parallel and limit must be >= 1, got {parallel} and {limit}")
        self.address = Address.of(url)
        self.parallel, self.limit = parallel, limit
        self.patience = patience or Patience()
        self.counts: Counter[str] = Counter()
        self.budget, self.circuit = Budget(), Circuit(self.patience.trip, self.patience.pause)
        keys.used(key_env)
        self._key_env, self._draws = key_env, random.Random(0)
        self._turn, self._probing = threading.Lock(), asyncio.Lock()
        self._key()  # a key that cannot be sent is refused now

    def _read(self, reply: HTTPReply, body: bytes) -> Any:
        """The answer in the reply to a body; Trouble, Malformed, Unanswerable or InputError."""
        raise NotImplementedError

    def _probe_body(self) -> bytes:
        raise NotImplementedError

    def _keep(self, key: str, answer: Any) -> None:
        """Called for every answer as it comes."""

    def exchange(self, asked: Mapping[str, bytes]) -> dict[str, Any]:
        """What came of every body, by its key: an answer, or a Score that says why none.

        InputError: the server refuses key, model or arguments. ScorerDown: by the policy.
        """
        found: dict[str, Any] = {}
        if asked:
            with self._turn:
                _run(self._answer(dict(asked), found))
        return found

    async def _answer(self, asked: dict[str, bytes], found: dict[str, Any]) -> None:
        door = Door(self.address, limit=self.limit)
        self._probing = asyncio.Lock()  # one loop's
        try:
            for again in range(AGAIN + 1):
                await self._round(door, asked, found)
                left = {k: v for k, v in asked.items() if _is_infra(found[k])}
                if not left or self.patience.policy == "mask":
                    return
                if again < AGAIN:
                    await self._until_up(door, len(left))
                asked = left
        finally:
            door.close()

    async def _round(self, door: Door, asked: dict[str, bytes], found: dict) -> None:
        """Every request ends, within its deadline; an error of configuration stops all."""
        waiting = iter(asked.items())

        async def worker() -> None:
            for key, body in waiting:
                found[key] = await self._one(door, body)
                beat()
                part.add()
                if not isinstance(found[key], Score):
                    self._keep(key, found[key])

        with phase("asking", len(asked), "replies") as part:
            count = min(self.parallel, len(asked))
            workers = [asyncio.ensure_future(worker()) for _ in range(count)]
            try:
                await asyncio.gather(*workers)
            finally:
                for task in workers:
                    task.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _one(self, door: Door, body: bytes) -> Any:
        end = time.monotonic() + self.patience.deadline
        self.budget.earn()
        doubted, attempt = False, 0
        while True:
            if not await self._may_ask(door, end):  # the circuit stays open
                return self._infra(f"the server is down: {self.circuit.reason}")
            attempt += 1
            try:
                return await self._try(door, body, end)
            except Unanswerable as error:
                return self._unscorable(str(error))
            except (Malformed, TooLarge) as error:
                reason = str(error) or f"a reply of more than {self.limit} bytes"
                if doubted or time.monotonic() >= end:
                    return self._unscorable(reason)
                doubted = True
            except (Failed, Trouble) as error:
                reason = str(error)
                self.circuit.failed(reason)
                seconds = self._rest(attempt, error)
                late = time.monotonic() + seconds >= end
                if attempt > self.patience.retries or late or not self.budget.spend():
                    return self._infra(reason)
                self.counts["retries"] += 1
                await asyncio.sleep(seconds)

    async def _try(self, door: Door, body: bytes, end: float) -> Any:
        limit = max(0.001, min(self.patience.timeout, end - time.monotonic()))
        self.counts["requests"] += 1
        reply = self._without_key(await door.post(self.path, body, self._headers(), limit))
        try:
            answer = self._read(reply, body)
        except InputError as error:
            raise InputError(f"{self.word} {self.address.url}: {error}") from None
        except (Malformed, Unanswerable):
            self.circuit.answered()
            raise
        self.circuit.answered()
        return answer

    async def _may_ask(self, door: Door, end: float) -> bool:
        """Whether the circuit is closed; if it is open, wait for its probe (not past `end`)."""
        if not self.circuit.is_open:
            return True
        seen = self.circuit.until

        async def turn() -> bool:
            async with self._probing:
                if self.circuit.is_open and self.circuit.until == seen:
                    await asyncio.sleep(max(0.0, seen - time.monotonic()))
                    await self._probe(door, end)
                return not self.circuit.is_open

        try:
            return await asyncio.wait_for(turn(), max(0.0, end - time.monotonic()))
        except asyncio.TimeoutError:
            return False

    async def _probe(self, door: Door, end: float) -> Trouble | Failed | None:
        """None where the server gives any answer to a small question, else what went wrong."""
        try:
            await self._try(door, self._probe_body(), end)
        except (Malformed, TooLarge, Unanswerable):
            self.circuit.answered()
        except (Failed, Trouble) as error:
            self.circuit.probe_failed(str(error))
            return error
        return None

    async def _until_up(self, door: Door, left: int) -> None:
        """Return when a probe is answered; ScorerDown after `wait` seconds without."""
        began, attempt = time.monotonic(), 0
        end = began + self.patience.wait
        while (trouble := await self._probe(door, end)) is not None:
            attempt += 1
            beat()  # a pause is no stall
            if attempt == 1:
                logger.warning(
                    "%s %s is down (%s): %d requests wait, for %g s at most",
                    *(self.word, self.address.url, self.circuit.reason, left, self.patience.wait),
                )
            remaining = end - time.monotonic()
            if remaining <= 0:
                raise ScorerDown(
                    f"{self.word} {self.address.url} stayed down for {self.patience.wait:g} s,"
                    f" {left} requests are not answered: {self.circuit.reason}"
                )
            await asyncio.sleep(min(self._rest(attempt, trouble), remaining))

    def _rest(self, attempt: int, error: Failed | Trouble) -> float:
        asked = error.retry_after if isinstance(error, Trouble) else None
        return rest(self.patience.pause, attempt, asked, self._draws)

    def _headers(self) -> list[tuple[str, str]]:
        key = self._key()
        return [("Authorization", f"Bearer {key}")] if key else []

    def _key(self) -> str:
        key = os.environ.get(self._key_env, "").strip()
        if key and not (key.isascii() and key.isprintable() and " " not in key):
            raise InputError(f"environment variable {self._key_env}: expected a key, one word")
        return key

    def _without_key(self, reply: HTTPReply) -> HTTPReply:
        """A reply in which the server does not repeat the key, however it writes it."""
        if not (key := self._key()):
            return reply
        found = keys.spelled(key)
        body = found.sub(keys.STARS, reply.body.decode("latin-1")).encode("latin-1")
        headers = {name: found.sub(keys.STARS, value) for name, value in reply.headers.items()}
        return HTTPReply(reply.status, headers, body)

    def _infra(self, reason: str) -> Score:
        self.counts["infra"] += 1
        if self.patience.policy == "fail":
            raise ScorerDown(f"{self.word} {self.address.url}: {reason}")
        return infra(reason)

    def _unscorable(self, reason: str) -> Score:
        self.counts["unscorable"] += 1
        return unscorable(reason)


def _is_infra(found: Any) -> bool:
    return isinstance(found, Score) and found.kind == "infra"


def _run(work: Coroutine[Any, Any, None]) -> None:
    """Run to the end, here or, where this thread's event loop is running, in another thread."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    failure: list[BaseException] = []

    def inside() -> None:
        try:
            asyncio.run(work)
        except BaseException as error:
            failure.append(error)
            if not isinstance(error, InputError | ScorerDown):
                raise

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
