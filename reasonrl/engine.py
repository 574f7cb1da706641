"""Completions from an inference server that holds a copy of the policy's weights.

    engine = Engine("http://127.0.0.1:30000", SGLang(), folder="runs/a/weights")
    engine.push(policy, step)                      # the server reads them from the folder
    policy.engine = engine                         # from now on `sample` asks it

Token ids go out and come back, never text; a reply whose ids, log-probabilities or weights are not
those that were asked for is refused, and the run ends as by a server that is down. What it drew is
corrected where it is learned from (update.py): the trainer's own log-probability is the old one,
w = min(p_old / p_served, cap). Left out: weights by NCCL or shared memory, images.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

from reasonrl import lora
from reasonrl.chat.ahead import Ahead
from reasonrl.chat.exchange import HTTPReply
from reasonrl.chat.outage import Patience
from reasonrl.chat.reply import object_of
from reasonrl.chat.requests import KEY, Requests
from reasonrl.config import Config
from reasonrl.engine_protocols import VLLM, Served, SGLang, encoded
from reasonrl.models import Policy
from reasonrl.records import InputError, Score, ScorerDown
from reasonrl.sampling import Sampling

PATIENT = Patience(deadline=3600.0, timeout=900.0)  # completions are long


class Engine:
    """`kept`: the number of the weights that the server holds, None before the first push."""

    def __init__(
        self,
        url: str,  # with or without /v1
        protocol: SGLang | VLLM,
        folder: str | Path,
        *,
        patience: Patience = PATIENT,
        parallel: int = 64,
        key_env: str = KEY,
    ):
        if patience.policy == "mask":
            raise ValueError("policy must be pause or fail: a completion cannot be left out")
        self.protocol, self.folder, self.kept = protocol, Path(folder), None
        self.begun: Begun | None = None  # completions that are asked for already
        self.drew: int | None = None  # the weights that drew the last completions
        base = url.rstrip("/").removesuffix("/v1")
        known = {"patience": patience, "parallel": parallel, "key_env": key_env}
        self.asks = _Posts(base, protocol.path, protocol.served, **known)
        self.tells = [
            _Posts(base, path, lambda body, _: protocol.updated(body), **known)
            for path, _ in protocol.updates("", "")
        ]

    def complete(
        self,
        prompts: Sequence[Sequence[int]],  # one for every completion
        sampling: Sampling,
        seeds: Sequence[int],
        eos: Sequence[int],
        words: int,  # the policy's vocabulary
        seen: Callable[[int, Served], None] | None = None,  # gets a row's as soon as it is there
    ) -> list[Served]:
        """A completion for every prompt, in order.

        ScorerDown: the server stayed down, or a reply is not about this prompt, this vocabulary or
        these weights; with its row.
        """
        asked = self._asked(prompts, sampling, seeds, eos)
        if self.begun is not None and self.begun.asked == asked:
            begun, self.begun = self.begun, None
            self.drew = begun.number
            return begun.work.result()
        self.drew = self.kept
        return self._drawn(asked, self.kept, sampling, eos, words, seen)

    def begin(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seeds: Sequence[int],
        eos: Sequence[int],
        words: int,
    ) -> None:
        """Ask for completions in another thread; the `complete` that wants them waits for them."""
        asked, number = self._asked(prompts, sampling, seeds, eos), self.kept
        work = Ahead(lambda: self._drawn(asked, number, sampling, eos, words))
        self.begun = Begun(asked, number, work)

    def _drawn(
        self, asked, number: int | None, sampling, eos, words: int, seen=None
    ) -> list[Served]:
        """What the weights of that number drew for every request, each of it looked at."""

        def fault_of(got: Any) -> str:
            bad = isinstance(got, Score)
            return got.reason if bad else _fault(got, number, sampling, eos, words)

        def at_once(key: str, got: Any) -> None:
            if seen is not None and not fault_of(got):
                seen(int(key), got)

        self.asks.seen = at_once
        found = _answers(self.asks, asked)
        for key, got in found.items():
            if fault := fault_of(got):
                url = self.asks.address.url
                raise ScorerDown(f"rollout server {url}: completion {key}: {fault}")
        return [found[key] for key in asked]

    def push(self, policy: Policy, number: int) -> None:
        """Give the server the policy's weights by way of `folder`; its former ones go."""
        target = self.folder / f"weights-{number}"
        if target.exists():
            shutil.rmtree(target)
        model = lora.merged(policy) if lora.adapted(policy) else policy.model
        replace(policy, model=model).save(target)
        calls = self.protocol.updates(str(target.resolve()), str(number))
        for posts, (_, fields) in zip(self.tells, calls, strict=True):
            answer = _answers(posts, {"update": encoded(fields)})["update"]
            if isinstance(answer, Score):
                raise ScorerDown(f"rollout server {posts.address.url}{posts.path}: {answer.reason}")
        for old in self.folder.glob("weights-*"):
            if old != target:
                shutil.rmtree(old)
        self.kept = number

    def _asked(self, prompts, sampling: Sampling, seeds, eos) -> dict[str, bytes]:
        rows = zip(prompts, seeds, strict=True)
        fields = [self.protocol.request(ids, sampling, seed, eos) for ids, seed in rows]
        return {str(i): encoded(one) for i, one in enumerate(fields)}


@dataclass(frozen=True)
class Begun:
    """Completions asked for ahead of their step."""

    asked: Mapping[str, bytes]
    number: int | None  # of the weights that draw them
    work: Ahead[list[Served]]

    def state(self) -> dict[str, Any] | None:
        """As plain values, when they are there; None where the server failed."""
        if self.work.failed:
            return None
        served = [astuple(got) for got in self.work.result()]
        return {"asked": dict(self.asked), "number": self.number, "served": served}

    @staticmethod
    def of(state: Mapping[str, Any]) -> Begun:
        served = [Served(*got) for got in state["served"]]
        return Begun(state["asked"], state["number"], Ahead(lambda: served))


def of(config: Config, out: Path) -> Engine | None:
    """The server of a run's config section `engine`, if there is one; its first push is to come."""
    how, draw = config.engine, config.sample
    if how.overlap:
        rules = {
            "engine.url": bool(how.url),
            "engine.correction token or sequence": how.correction != "off",
            "no filter (a group is graded before it is known how many are needed)": (
                not config.filter.active
            ),
        }
        for needed, there in rules.items():
            if not there:
                raise InputError(f"engine.overlap: needs {needed}")
    if not how.url:
        return None
    if how.kind == "sglang":
        protocol = SGLang()
    elif not how.model:
        raise InputError("engine.model: expected the name that vLLM serves the model by, got none")
    elif not how.processed and (draw.temperature, draw.top_p, draw.top_k) != (1.0, 1.0, 0):
        raise InputError(
            "engine.processed: vLLM says log-probabilities at temperature 1 of the whole"
            " distribution unless it is started with --logprobs-mode processed_logprobs; start it"
            " so and set engine.processed=true, or sample at temperature 1 without top_p and top_k"
        )
    else:
        protocol = VLLM(how.model)
    patience = Patience(
        policy=how.when_down,
        wait=how.wait,
        deadline=4 * how.timeout,
        timeout=how.timeout,
    )
    folder = Path(how.folder) if how.folder else out / "weights"
    return Engine(how.url, protocol, folder, patience=patience, parallel=how.parallel)


def _fault(
    got: Served, number: int | None, sampling: Sampling, eos: Sequence[int], words: int
) -> str:
    """What makes a completion unusable, or nothing."""
    if got.version is not None and number is not None and got.version != str(number):
        return f"weights {got.version} wrote it, the server should hold {number}"
    if not 0 < len(got.tokens) <= sampling.max_tokens:
        return f"expected 1 to {sampling.max_tokens} tokens, got {len(got.tokens)}"
    if len(got.logp) != len(got.tokens):
        return f"{len(got.tokens)} tokens came with {len(got.logp)} log-probabilities"
    if wild := [i for i in got.tokens if not 0 <= i < words]:
        return f"token {wild[0]} is outside the policy's vocabulary of {words}"
    if high := [p for p in got.logp if p > 1e-4]:
        return f"a log-probability of {high[0]:g} is above 0"
    ends = [i for i, token in enumerate(got.tokens) if token in eos]
    if ends and ends[0] != len(got.tokens) - 1:
        return f"it goes on behind the end-of-sequence token at {ends[0]}"
    if got.reason == "stop" and not ends:
        return "it stopped without an end-of-sequence token of the policy"
    if got.reason == "length" and not ends and len(got.tokens) < sampling.max_tokens:
        return (
            f"it was cut at {len(got.tokens)} tokens, {sampling.max_tokens} were asked for"
            " (is the server's context as long as the policy's?)"
        )
    return ""


def _answers(posts: _Posts, asked: Mapping[str, bytes]) -> dict[str, Any]:
    """What the server said. A refusal is ScorerDown: the run keeps its state, as for one that is
    down, and goes on when the server is mended."""
    try:
        return posts.exchange(asked)
    except InputError as error:
        raise ScorerDown(str(error)) from None


class _Posts(Requests):
    """Requests to one path; a probe is the request that failed, sent again."""

    word = "rollout server"

    def __init__(self, url: str, path: str, read: Callable[[Mapping, Mapping], Any], **known: Any):
        super().__init__(url, limit=64 << 20, **known)
        self.path, self.read, self.last = path, read, b"{}"
        self.seen: Callable[[str, Any], None] = lambda key, answer: None

    def exchange(self, asked: Mapping[str, bytes]) -> dict[str, Any]:
        self.last = next(iter(asked.values()), b"{}")
        return super().exchange(asked)

    def _keep(self, key: str, answer: Any) -> None:
        self.seen(key, answer)

    def _read(self, reply: HTTPReply, body: bytes) -> Any:
        if reply.status == 404:
            raise InputError(f"it has no {self.path} (is this the server that was named?)")
        return self.read({} if reply.status == 200 and not reply.body else object_of(reply),
                         json.loads(body))  # fmt: skip

    def _probe_body(self) -> bytes:
        return self.last
