"""What a server serves: verifiers, process reward models, judges; each with a queue of its own.

    open_scorer("math"), open_scorer("prm=runs/prm"), open_scorer("judge=./judge")

A judge scores completions, and its model also answers chat requests; both go through one queue,
because one model is used by one thread at a time.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reasonrl import models, prm_heads
from reasonrl.choice import texts
from reasonrl.models import Policy
from reasonrl.prompts import render
from reasonrl.records import InputError, Problem, Score, unscorable
from reasonrl.rewards.code import verify_code
from reasonrl.rewards.judge import Judge
from reasonrl.rewards.prm import PRMScorer
from reasonrl.rewards.verify import verify_math
from reasonrl.rollout import Sampling, sample
from reasonrl.serve.protocols import Ask, BadRequest, Item
from reasonrl.serve.queue import Queue

KINDS = "math, code, prm=FOLDER or judge=MODEL"


@dataclass(frozen=True)
class Plan:
    """How the scorers of a server work; what the command line sets."""

    timeout: float = 5.0  # seconds of verifying one answer
    queue: int = 1024  # rows that may wait for each scorer
    batch: int = 32  # rows of a model's batch
    votes: int = 1  # verdicts of a judge a completion
    max_tokens: int = 512  # of a judgement, or of a chat request that says nothing
    temperature: float | None = None  # of judgements; None: 0 for one vote, else 1
    device: str = "auto"  # where models run: a GPU where there is one


@dataclass
class Scorer:
    name: str
    queue: Queue
    tokenizer: Any = None  # whose chat template a rendered conversation is in
    model: str | None = None  # the name under which chat requests are answered


def open_scorer(spec: str, plan: Plan) -> Scorer:
    """A scorer, loaded and warm; InputError where there is no such thing."""
    kind, _, what = spec.partition("=")
    if kind in ("math", "code") and not what:
        return _verifier(kind, plan)
    if kind in ("prm", "judge") and what:
        if kind == "prm":
            return prm_scorer(PRMScorer(prm_heads.load(what, device=plan.device)), plan)
        return judge_scorer(models.load(what, device=plan.device), what, plan)
    raise InputError(f"serve: expected {KINDS}, got {spec!r}")


def _verifier(kind: str, plan: Plan) -> Scorer:
    def judged(rows: list[Item]) -> list[Score]:
        said = [row.completion for row in rows]
        if kind == "code":
            return verify_code(said, [row.label for row in rows], timeout=plan.timeout)
        return verify_math(said, [_gold(row.label) for row in rows], timeout=plan.timeout)

    if kind == "math":  # the workers' start is not the first client's to pay for
        verify_math([r"\boxed{x}", r"\boxed{y}"], ["x+1", "y+1"], timeout=60)
    return Scorer(kind, Queue(judged, size=8, lanes=2, waiting=plan.queue))


def _gold(label: Any) -> str:
    """A label as verify_math takes it; what is no answer becomes "", which is unscorable."""
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        return ""
    return str(label)


def prm_scorer(scorer: PRMScorer, plan: Plan) -> Scorer:
    """A process reward model; its score is the total of a completion."""

    def totals(rows: list[Item]) -> Sequence[Score]:
        return scorer(texts(_problems(rows), [row.completion for row in rows])).outcome

    queue = Queue(_each_alone(totals), size=plan.batch, waiting=plan.queue)
    return Scorer("prm", queue, scorer.prm.body.tokenizer)


def judge_scorer(policy: Policy, name: str, plan: Plan) -> Scorer:
    """A generative judge; its score is the mean verdict, and its model answers as `name`."""
    heat = (0.0 if plan.votes == 1 else 1.0) if plan.temperature is None else plan.temperature
    judge = Judge(policy, votes=plan.votes, max_tokens=plan.max_tokens, temperature=heat)

    def work(rows: list[Any]) -> Sequence[Any]:
        if isinstance(rows[0], Ask):
            return _chat(policy, rows, plan.max_tokens)
        return judge(texts(_problems(rows), [row.completion for row in rows])).outcome

    queue = Queue(work, size=plan.batch, waiting=plan.queue)
    return Scorer("judge", queue, policy.tokenizer, name)


def _chat(policy, rows: list[Ask], most: int) -> list[Any]:
    """For each request ([(text, ended, tokens)], tokens of the prompt), or a BadRequest."""
    limit, heat, top_p, top_k, count = rows[0].sampling  # of one kind, so equal in all rows
    limit = most if limit is None else limit
    out: list[Any] = [None] * len(rows)
    prompts = {}
    for i, row in enumerate(rows):
        try:
            prompts[i] = render(policy.tokenizer, row.prompt)
        except InputError as error:
            out[i] = BadRequest(str(error))
            continue
        if len(prompts[i]) + limit > policy.context:
            out[i] = BadRequest(
                f"This model's maximum context length is {policy.context} tokens, got a prompt of"
                f" {len(prompts.pop(i))} and max_tokens {limit}"
            )
    if not prompts:
        return out
    asked = [secrets.randbits(62) if rows[i].seed is None else rows[i].seed for i in prompts]
    problems = [Problem(f"chat-{i}", rows[i].prompt) for i in prompts]
    plan = Sampling(limit, heat, top_p, top_k)
    seeds = [int(seed or 0) for seed in asked]
    done = sample(policy, problems, list(prompts.values()), count, plan, seeds)
    made = list(zip(done.text, done.finished, map(len, done.completion_ids), strict=True))
    for at, (i, ids) in enumerate(prompts.items()):
        out[i] = (made[at * count : (at + 1) * count], len(ids))
    return out


def _problems(rows: Sequence[Item]) -> list[Problem]:
    return [Problem(repr(row.prompt), row.prompt) for row in rows]


def _each_alone(score: Callable[[list[Item]], Sequence[Score]]):
    """A batch in which one row cannot be read is scored row by row, so that only that one is
    unscorable."""

    def scored(rows: list[Item]) -> Sequence[Score]:
        try:
            return score(rows)
        except InputError as error:
            if len(rows) == 1:
                return [unscorable(str(error))]
            return [one for row in rows for one in scored([row])]

    return scored
