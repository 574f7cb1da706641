"""Many questions to an OpenAI-compatible chat server (vLLM, SGLang, `reasonrl serve`), answered in
order, each by a text or by the reason why there is none.

    client = ChatClient("http://127.0.0.1:8000/v1", "my-judge", cache="replies")
    client.ask(["2+2?"], max_tokens=64, temperature=0.0, seeds=[0])  ->  ["4"]

At most `parallel` requests are under way and nothing is queued beyond them; equal requests of a
batch are asked once. What happens when the server fails: requests.py, outage.py.
Left out: streams, tools, images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reasonrl.chat.ahead import Ahead
from reasonrl.chat.cache import Cache, key_of
from reasonrl.chat.exchange import HTTPReply
from reasonrl.chat.outage import Patience
from reasonrl.chat.reply import text_of
from reasonrl.chat.requests import KEY, Requests
from reasonrl.records import InputError, Message, Score

PROBE = {"messages": [{"role": "user", "content": "1"}], "max_tokens": 1, "temperature": 0.0}


class ChatClient(Requests):
    """A judge behind its server, asked in messages, answering in text."""

    path = "/chat/completions"
    word = "judge"

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
        if not model:
            raise InputError(f"server {url}: expected the name of a model, got none")
        super().__init__(url, key_env=key_env, parallel=parallel, patience=patience, limit=limit)
        self.model, self.extra = model, dict(extra or {})
        self.cache = None if cache is None else Cache(cache)
        self.begun: list[Ahead[dict[str, Any]]] = []

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
        hashes, wanted = self._hashed(prompts, max_tokens, temperature, seeds)
        self.counts["questions"] += len(hashes)
        begun, self.begun = self.begun, []
        found = {key: answer for work in begun for key, answer in work.result().items()}
        found |= self._answers({key: body for key, body in wanted.items() if key not in found})
        return [found[key] for key in hashes]

    def begin(
        self,
        prompts: Sequence[str | Sequence[Message]],
        *,
        max_tokens: int,
        temperature: float,
        seeds: Sequence[int],
    ) -> None:
        """Ask in another thread, one batch after the other; the next `ask` has the answers, and
        raises what went wrong."""
        _, wanted = self._hashed(prompts, max_tokens, temperature, seeds)
        former = self.begun[-1:]

        def work() -> dict[str, Any]:
            for one in former:
                one.wait()
            return self._answers(wanted)

        self.begun.append(Ahead(work))

    def _hashed(self, prompts, max_tokens: int, temperature: float, seeds):
        """The key of every question, and every key's request."""
        hashes, wanted = [], {}
        for prompt, seed in zip(prompts, seeds, strict=True):
            body = self._body(prompt, max_tokens, temperature, seed)
            hashes.append(key_of(self.address.url, body))
            wanted[hashes[-1]] = body
        return hashes, wanted

    def _answers(self, wanted: Mapping[str, bytes]) -> dict[str, Any]:
        """Of every request, from the cache or the server."""
        found: dict[str, Any] = {}
        for key in wanted:
            if self.cache is not None and (text := self.cache.get(key)) is not None:
                found[key] = text
        self.counts["cached"] += len(found)
        return found | self.exchange({k: body for k, body in wanted.items() if k not in found})

    def _read(self, reply: HTTPReply, body: bytes) -> str:
        return text_of(reply, self.model)

    def _probe_body(self) -> bytes:
        return json.dumps(PROBE | {"model": self.model} | self.extra).encode()

    def _keep(self, key: str, answer: str) -> None:
        if self.cache is not None:
            self.cache.put(key, answer)

    def _body(self, prompt, max_tokens: int, temperature: float, seed: int) -> bytes:
        text = isinstance(prompt, str)
        messages = [{"role": "user", "content": prompt}] if text else list(prompt)
        fields = {"model": self.model, "messages": messages, "max_tokens": max_tokens}
        fields |= {"temperature": temperature, "seed": seed} | self.extra
        return json.dumps(fields, sort_keys=True).encode()
