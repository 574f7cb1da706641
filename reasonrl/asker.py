"""Asking a language model in words: one small protocol, a model in this process, a memory.

Whoever has `ask(prompts) -> replies`, one reply a prompt in order, is an Asker: a model in this
process (`PolicyAsker`), a client of a chat server with its settings fixed (`ClientAsker`). A reply
that could not be had is an empty string, never an invented one; who reads replies must say what an
empty one means. The same prompt several times in one call asks for as many samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from reasonrl import keys
from reasonrl.cache import Cache
from reasonrl.models import Policy
from reasonrl.prompts import render
from reasonrl.records import Problem, Score
from reasonrl.rollout import Sampling, sample

logger = keys.logger("reasonrl")


class Asker(Protocol):
    def ask(self, prompts: Sequence[str]) -> list[str]:
        """One reply for every prompt, in order; empty where there is none."""
        ...


class PolicyAsker:
    """A model in this process. temperature 0: greedy, so that equal prompts get equal replies."""

    def __init__(
        self, policy: Policy, *, max_tokens: int = 512, temperature: float = 0.0, seed: int = 0
    ):
        if max_tokens < 1 or temperature < 0:
            raise ValueError(
                f"max_tokens must be >= 1 and temperature >= 0, got {max_tokens}, {temperature}"
            )
        self.policy, self.seed = policy, seed
        self.sampling = Sampling(max_tokens, temperature)
        self.asked = 0

    def ask(self, prompts: Sequence[str]) -> list[str]:
        ids = [render(self.policy.tokenizer, prompt) for prompt in prompts]
        room = self.policy.context - self.sampling.max_tokens
        fits = [i for i, prompt in enumerate(ids) if len(prompt) <= room]
        for i in set(range(len(ids))) - set(fits):
            logger.warning(
                "prompt %d: %d tokens, the model has room for %d; no reply", i, len(ids[i]), room
            )
        out = [""] * len(prompts)
        problems = [Problem(f"prompt-{i}", prompts[i]) for i in fits]
        chosen = [ids[i] for i in fits]
        self.asked += 1
        seed = self.seed * 1_000_003 + self.asked
        done = sample(self.policy, problems, chosen, 1, self.sampling, seed, rows=64)
        for i, text in zip(fits, done.text, strict=True):
            out[i] = text
        return out


class Client(Protocol):
    """What a client of an OpenAI-compatible server offers."""

    def ask(
        self, prompts: Sequence[str], *, max_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> Sequence[str | Score]:
        """A text for each prompt, or a score that says why there is none."""
        ...


class ClientAsker:
    """A client with its settings fixed; the k-th of equal prompts in a call has a seed of its
    own."""

    def __init__(
        self, client: Client, *, max_tokens: int = 512, temperature: float = 0.0, seed: int = 0
    ):
        self.client, self.seed = client, seed
        self.max_tokens, self.temperature = max_tokens, temperature

    def ask(self, prompts: Sequence[str]) -> list[str]:
        seen: Counter[str] = Counter()
        seeds = []
        for prompt in prompts:
            seeds.append((self.seed * 1_000_003 + seen[prompt]) % 2**31)
            seen[prompt] += 1
        limits = {"max_tokens": self.max_tokens, "temperature": self.temperature}
        replies = self.client.ask(prompts, **limits, seeds=seeds)
        lost = [reply.reason for reply in replies if not isinstance(reply, str)]
        if lost:
            logger.warning("%d of %d prompts have no reply: %s", len(lost), len(prompts), lost[0])
        return [reply if isinstance(reply, str) else "" for reply in replies]


class Remembered:
    """An Asker whose replies are kept under the hash of the prompt; empty ones are asked again.

    The k-th of n equal prompts in a call has its own place; another n is asked anew, so that no
    sample is counted twice.
    """

    def __init__(self, asker: Asker, name: str, cache: Cache):
        self.asker, self.name, self.cache = asker, name, cache

    def ask(self, prompts: Sequence[str]) -> list[str]:
        total, seen = Counter(prompts), Counter[str]()
        keys, out = [], []
        for prompt in prompts:
            key = ("reply", self.name, prompt, seen[prompt], total[prompt])
            seen[prompt] += 1
            kept = self.cache.get(*key)
            keys.append(key)
            out.append("" if kept is None else kept.decode())
        missing = [i for i, reply in enumerate(out) if not reply]
        if missing:
            replies = self.asker.ask([prompts[i] for i in missing])
            if len(replies) != len(missing):
                raise ValueError(f"asked {len(missing)} prompts, got {len(replies)} replies")
            for i, reply in zip(missing, replies, strict=True):
                out[i] = reply
                if reply:
                    self.cache.put(reply.encode("utf-8", "replace"), *keys[i])
        return out
