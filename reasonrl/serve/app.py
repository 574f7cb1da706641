"""The routes of a server: which path is answered by which scorer in which protocol.

POST / , /reward, /get_reward: OpenRLHF's protocol, by the first scorer; /reward/NAME by that one.
POST /classify, /v1/embeddings: verl's, by the first scorer that needs no label (a PRM, a judge).
POST /v1/chat/completions, GET /v1/models: OpenAI's.  GET /health, /metrics.
A full queue is 503 with Retry-After, a request that must change 4xx with what to change.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from reasonrl.records import InputError, ScorerDown
from reasonrl.serve import protocols
from reasonrl.serve.listener import Limits, Listener, Request, Response
from reasonrl.serve.metrics import Metrics
from reasonrl.serve.protocols import BadRequest
from reasonrl.serve.queue import Full, TooMany
from reasonrl.serve.scorers import Scorer

RETRY = (("Retry-After", "1"),)
Route = Callable[[Request], Awaitable[Response]]


class App:
    """Answers requests; `unscored` is the reward of what has no score (None: JSON's null)."""

    def __init__(self, scorers: Sequence[Scorer], unscored: float | None = None):
        if not scorers:
            raise InputError("serve: expected something to serve, got nothing")
        names = [scorer.name for scorer in scorers]
        if len(set(names)) < len(names):
            raise InputError(f"serve: expected each kind once, got {', '.join(names)}")
        self.scorers = {scorer.name: scorer for scorer in scorers}
        self.first, self.unscored, self.metrics = scorers[0], unscored, Metrics()
        self.readers = [s for s in scorers if s.tokenizer is not None]
        self.chat = next((s for s in scorers if s.model is not None), None)
        self.routes: dict[tuple[str, str], Route] = {
            ("GET", "/health"): self._health,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/classify"): self._classify,
            ("POST", "/v1/embeddings"): self._embeddings,
        }
        for path in ("/", "/reward", "/get_reward", *(f"/reward/{name}" for name in names)):
            self.routes["POST", path] = self._rewards
        for scorer in scorers:
            self.metrics.gauges[f"queue_rows_{scorer.name}"] = lambda s=scorer: s.queue.queued
            self.metrics.gauges[f"batches_{scorer.name}"] = lambda s=scorer: s.queue.batches

    async def __call__(self, request: Request) -> Response:
        began, status = time.monotonic(), 500  # where the scorer raises, the listener says so
        try:
            response = await self._answer(request)
            status = response.status
            return response
        finally:
            self.metrics.took(time.monotonic() - began)
            known = any(path == request.path for _, path in self.routes)
            path = request.path if known else "?"
            self.metrics.add("requests_total", path=path, status=str(status))

    async def _answer(self, request: Request) -> Response:
        method = "GET" if request.method == "HEAD" else request.method
        route = self.routes.get((method, request.path))
        if route is None:
            allowed = [m for m, path in self.routes if path == request.path]
            if allowed:
                made = complain(405, f"{request.path} takes {allowed[0]}, got {request.method}")
                return made._replace(headers=(("Allow", allowed[0]),))
            paths = ", ".join(sorted({path for _, path in self.routes}))
            return complain(404, f"no such path; there are {paths}")
        try:
            return await route(request)
        except BadRequest as error:
            return complain(error.status, str(error))
        except TooMany:
            return complain(413, "more rows in one request than the queue can hold; send fewer")
        except Full:
            self.metrics.add("refused_total", reason="queue")
            return complain(503, "the queue is full")
        except ScorerDown as error:
            return complain(503, str(error))

    async def _rewards(self, request: Request) -> Response:
        scorer = self.scorers.get(request.path.removeprefix("/reward/"), self.first)
        rows = protocols.items(protocols.body_of(request.body))
        scores = await self._scores(scorer, rows)
        return _json(protocols.rewards(scores, self.unscored))

    async def _classify(self, request: Request) -> Response:
        return await self._values(request, "probs", ("activation", "use_activation"))

    async def _embeddings(self, request: Request) -> Response:
        return await self._values(request, "embedding", ("encoding_format",))

    async def _values(self, request: Request, name: str, harmless: Sequence[str]) -> Response:
        if not self.readers:
            raise BadRequest("no scorer here works without a label (serve prm=... or judge=...)")
        scorer, body = self.readers[0], protocols.body_of(request.body)
        for field in body.keys() - {"model", "input", "messages", "user", *harmless}:
            raise BadRequest(f"field {field!r}: not supported here")
        rows = protocols.conversation(body, scorer.tokenizer)
        scores = await self._scores(scorer, rows)
        return _json(protocols.values(scores, str(body.get("model") or scorer.name), name))

    async def _scores(self, scorer: Scorer, rows: Sequence[protocols.Item]):
        scores = await scorer.queue.put(rows, "score")
        for score in scores:
            self.metrics.add("scores_total", scorer=scorer.name, kind=score.kind)
        return scores

    async def _chat(self, request: Request) -> Response:
        body = protocols.body_of(request.body)
        if self.chat is None:
            raise BadRequest("no model here answers (serve judge=MODEL)", 404)
        model = body.get("model")
        if model not in (self.chat.model, self.chat.name):
            raise BadRequest(f"model: expected {self.chat.model!r}, got {model!r}", 404)
        ask = protocols.ask_of(body)
        (found,) = await self.chat.queue.put([ask], ask.sampling)
        if isinstance(found, BadRequest):
            raise found
        return _json(protocols.completion(str(model), *found))

    async def _models(self, _: Request) -> Response:
        names = [] if self.chat is None else [self.chat.model]
        names += [name for name in self.scorers if name not in names]
        rows = [{"id": name, "object": "model", "owned_by": "reasonrl"} for name in names]
        return _json({"object": "list", "data": rows})

    async def _health(self, _: Request) -> Response:
        return _json({"status": "ok", "scorers": list(self.scorers)})

    async def _metrics(self, _: Request) -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(200, self.metrics.text().encode(), kind)


def complain(status: int, message: str) -> Response:
    headers = RETRY if status == 503 else ()
    return Response(status, protocols.error(status, message), headers=headers)


def run(
    app: App,
    address: tuple[str, int],
    limits: Limits,
    started: Callable[[Listener, asyncio.Event], None],
) -> int:
    """Serve until SIGTERM, SIGINT or the event that `started` gets; then drain.

    Returns how many requests could not be finished within `limits.grace`. A second signal ends the
    process at once. Outside the main thread no signal is listened to.
    """
    listener = Listener(app, complain, app.metrics, address, limits)

    async def serve() -> int:
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def end(number: int) -> None:
            stop.set()
            loop.remove_signal_handler(number)

        for number in (signal.SIGTERM, signal.SIGINT):
            try:
                loop.add_signal_handler(number, end, number)
            except (ValueError, RuntimeError):  # not the main thread
                break
        started(listener, stop)
        return await listener.run(stop)

    try:
        return asyncio.run(serve())
    finally:
        for scorer in app.scorers.values():
            scorer.queue.close()


def _json(body: Any, status: int = 200) -> Response:
    return Response(status, json.dumps(body).encode())
