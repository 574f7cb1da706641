"""Many questions to an OpenAI-compatible chat server (vLLM, SGLang, `reasonrl serve`), answered in
order, each by a text or by the reason why there is none.

    client = ChatClient("http://127.0.0.1:8000/v1", "my-judge", cache="replies")
    client.ask(["2+2?"], max_tokens=64, temperature=0.0, seeds=[0])  ->  ["4"]

At most `parallel` requests are under way and nothing is queued beyond them; equal requests of a
batch are asked once. The key comes from an environment variable, is shown nowhere, and is cut out
of everything a server says. What happens when the server fails: outage.py.
Left out: streams, tools, images.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from reasonrl import keys
from reasonrl.chat.cache import Cache, key_of
from reasonrl.chat.exchange import Address, Door, Failed, HTTPReply, TooLarge
from reasonrl.chat.outage import Budget, Circuit, Patience, rest
from reasonrl.chat.reply import Malformed, Trouble, Unanswerable, text_of
from reasonrl.records import InputError, Message, Score, ScorerDown, infra, unscorable
from reasonrl.watchdog import beat

logger = keys.logger("reasonrl.chat")
PATH = "/chat/completions"
KEY = "REASONRL_API_KEY"  # the environment variable, unless another one is named
AGAIN = 3  # times that `pause` asks again what a server that works could not answer
PROBE = {"messages": [{"role": "user", "content": "1"}], "max_tokens": 1, "temperature": 0.0}


class ChatClient:
    """Blocking; a second thread waits for the first one's batch. `counts` says what happened."""

    def __init__(
        self,
        url: str,  # the base, ending in /v1
        model: str,
        *,
        key_env: str = KEY,
        parallel: int = 32,
        patience: Patience | None = None,
        cache: str | Path | None = None,
        limit: int = 4 << 20,  # bytes of a reply
        extra: Mapping[str, Any] | None = None,  # more fields of every request
    ):
        if parallel < 1 or limit < 1:
            raise ValueError(f"parallel and limit must be >= 1, got {parallel} and {limit}")
        if not model:
            raise InputError(f"server {url}: expected the name of a model, got none")
        self.address, self.model, self.extra = Address.of(url), model, dict(extra or {})
        self.parallel, self.limit = parallel, limit
        self.patience = patience or Patience()
        self.cache = None if cache is None else Cache(cache)
        self.counts: Counter[str] = Counter()
        self.budget, self.circuit = Budget(), Circuit(self.patience.trip, self.patience.pause)
        keys.used(key_env)
        self._key_env, self._draws = key_env, random.Random(0)
        self._turn, self._probing = threading.Lock(), asyncio.Lock()
        self._key()  # a key that cannot be sent is refused now

    def __repr__(self) -> str:
        return f"ChatClient({self.address.url!r}, {self.model!r})"

    def ask(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        max_tokens: int,
        temperature: float,
        seeds: Sequence[int],  # one for each prompt
    ) -> list[str | Score]:
        """The text for each prompt, or unscorable or infra with the reason.

        InputError: the server refuses key, model or arguments. ScorerDown: by the policy.
        """
        hashes, wanted = [], {}
        for prompt, seed in zip(prompts, seeds, strict=True):
            body = self._body(prompt, max_tokens, temperature, seed)
            hashes.append(key_of(self.address.url, body))
            wanted[hashes[-1]] = body
        self.counts["questions"] += len(hashes)
        found: dict[str, str | Score] = {}
        for key in wanted:
            if self.cache is not None and (text := self.cache.get(key)) is not None:
                found[key] = text
        self.counts["cached"] += len(found)
        asked = {key: body for key, body in wanted.items() if key not in found}
        if asked:
            with self._turn:
                _run(self._answer(asked, found))
        return [found[key] for key in hashes]

    async def _answer(self, asked: dict[str, bytes], found: dict[str, str | Score]) -> None:
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
                if isinstance(text := found[key], str) and self.cache is not None:
                    self.cache.put(key, text)

        workers = [asyncio.ensure_future(worker()) for _ in range(min(self.parallel, len(asked)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for task in workers:
                task.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _one(self, door: Door, body: bytes) -> str | Score:
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

    async def _try(self, door: Door, body: bytes, end: float) -> str:
        limit = max(0.001, min(self.patience.timeout, end - time.monotonic()))
        self.counts["requests"] += 1
        reply = self._without_key(await door.post(PATH, body, self._headers(), limit))
        try:
            text = text_of(reply, self.model)
        except InputError as error:
            raise InputError(f"judge {self.address.url}: {error}") from None
        except (Malformed, Unanswerable):
            self.circuit.answered()
            raise
        self.circuit.answered()
        return text

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
        body = json.dumps(PROBE | {"model": self.model} | self.extra).encode()
        try:
            await self._try(door, body, end)
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
                    "judge %s is down (%s): %d requests wait, for %g s at most",
                    *(self.address.url, self.circuit.reason, left, self.patience.wait),
                )
            remaining = end - time.monotonic()
            if remaining <= 0:
                raise ScorerDown(
                    f"judge {self.address.url} stayed down for {self.patience.wait:g} s, {left}"
                    f" requests are not answered: {self.circuit.reason}"
                )
            await asyncio.sleep(min(self._rest(attempt, trouble), remaining))

    def _rest(self, attempt: int, error: Failed | Trouble) -> float:
        asked = error.retry_after if isinstance(error, Trouble) else None
        return rest(self.patience.pause, attempt, asked, self._draws)

    def _body(self, prompt, max_tokens: int, temperature: float, seed: int) -> bytes:
        text = isinstance(prompt, str)
        messages = [{"role": "user", "content": prompt}] if text else list(prompt)
        fields = {"model": self.model, "messages": messages, "max_tokens": max_tokens}
        fields |= {"temperature": temperature, "seed": seed} | self.extra
        return json.dumps(fields, sort_keys=True).encode()

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
            raise ScorerDown(f"judge {self.address.url}: {reason}")
        return infra(reason)

    def _unscorable(self, reason: str) -> Score:
        self.counts["unscorable"] += 1
        return unscorable(reason)


def _is_infra(found: str | Score) -> bool:
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
