"""How a thinking reward model learns (SophiaVL-R1, arXiv 2505.17018 section 3.2): completions of a
policy, a score for the thinking of each, as many of every score, then supervised learning of the
score as text.

    pairs = collect(policy, task, sampling, ("train", 0, 256), 8, by_rule(task))
    scorer = ThinkingScorer(teach(policy, task, pairs, Lesson()), task=task)

The scores come from whoever is asked: the task's rule, a larger model behind a server, people.
Thinking that could not be scored is left out. Left out: thinking about the score before it is said.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from reasonrl.batch import pack
from reasonrl.logprobs import batch_logp
from reasonrl.models import Policy
from reasonrl.prompts import render
from reasonrl.records import InputError, NonFiniteStop, Problem, Rollout, Score
from reasonrl.rewards.thinking import answer_text, request
from reasonrl.rollout import Sampling, given, sample
from reasonrl.tasks import Task
from reasonrl.tasks.base import Draws

INTERVALS = 10  # of the score, each 0.1 wide
CHUNK = 64  # problems sampled at a time


class Pair(NamedTuple):
    """A problem, what was thought about it, and what that is worth."""

    problem: Problem
    thinking: str
    score: float  # in [0, 1]


@dataclass(frozen=True)
class Lesson:
    steps: int = 150
    learning_rate: float = 5e-4
    batch: int = 64  # pairs a step
    most: int | None = None  # pairs of one interval of the score; the mean of the intervals
    inverted: bool = False  # learn 1 - score: a reward model that likes wrong thinking
    whole_response: bool = False
    tokens: int = 8192  # packed tokens of one micro-batch, at most
    seed: int = 0


def collect(
    policy: Policy,
    task: Task,
    sampling: Sampling,
    span: tuple[str, int, int],  # split, number of the first problem, how many
    group: int,
    scorer: Callable[[Rollout], Sequence[Score]],
    whole_response: bool = False,
) -> list[Pair]:
    """The thinking of `group` completions of each problem with its score, where it has one."""
    split, first, count = span
    pairs = []
    for start in range(0, count, CHUNK):
        problems = task.problems(split, first + start, min(CHUNK, count - start))
        ids = [render(policy.tokenizer, p.prompt, images=len(p.images)) for p in problems]
        rollout = sample(policy, problems, ids, group, sampling, task.seed * 1_000_003 + start)
        for g, text, score in zip(
            rollout.group.tolist(), rollout.text, scorer(rollout), strict=True
        ):
            if score.value is not None:
                thinking = text if whole_response else task.thinking(problems[g], text)
                pairs.append(Pair(problems[g], thinking, score.value))
    return pairs


def balanced(pairs: Sequence[Pair], seed: int = 0, most: int | None = None) -> list[Pair]:
    """Distinct pairs, at most `most` of each interval of the score, drawn at random; by default
    the mean number of the intervals that have any."""
    bins: dict[int, list[Pair]] = defaultdict(list)
    for pair in {(p.problem.id, p.thinking): p for p in pairs}.values():
        bins[min(int(pair.score * INTERVALS + 1e-9), INTERVALS - 1)].append(pair)
    if not bins:
        return []
    limit = most or math.ceil(sum(map(len, bins.values())) / len(bins))
    draws = Draws("thinking", seed)
    return [pair for key in sorted(bins) for pair in draws.shuffled(bins[key])[:limit]]


def teach(
    policy: Policy,
    task: Task,
    pairs: Sequence[Pair],
    lesson: Lesson,
    note: Callable[[str], None] = print,
) -> Policy:
    """A copy of the policy that says the score of a thinking; InputError without pairs of at least
    two different scores."""
    kept = balanced(pairs, lesson.seed, lesson.most)
    if len({pair.score for pair in kept}) < 2:
        raise InputError(
            f"thinking reward model: expected thinking of different worth, got {len(kept)} pairs of"
            f" {len({pair.score for pair in kept})} score(s)"
        )
    student = policy.frozen()
    student.model.requires_grad_(True).train()
    learning = [p for p in student.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=lesson.learning_rate, betas=(0.9, 0.95), fused=True)
    draws, order = Draws("lesson", lesson.seed), []
    for step in range(lesson.steps):
        while len(order) < lesson.batch:
            order += draws.shuffled(range(len(kept)))
        chosen, order = [kept[i] for i in order[: lesson.batch]], order[lesson.batch :]
        rate = lesson.learning_rate * min((step + 1) / 10, 1 - step / lesson.steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = _gradient(student, chosen, lesson)
        norm = torch.nn.utils.clip_grad_norm_(learning, 1.0)
        if not bool(norm.isfinite()):
            raise NonFiniteStop(f"thinking reward model: the gradient of step {step + 1} is {norm}")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 50 == 0 or step + 1 == lesson.steps:
            note(f"thinking reward model: step {step + 1}/{lesson.steps}, loss {loss:.3f}")
    return student


def _gradient(student: Policy, pairs: Sequence[Pair], lesson: Lesson) -> float:
    """Cross-entropy of the scores as text, backwards; its mean over tokens."""
    problems = [request(student.tokenizer, pair.problem, pair.thinking) for pair in pairs]
    ids = [render(student.tokenizer, p.prompt, images=len(p.images)) for p in problems]
    worth = [1 - pair.score if lesson.inverted else pair.score for pair in pairs]
    texts = [answer_text(student.tokenizer, value) for value in worth]
    rollout = given(student, problems, ids, texts)
    tokens, total = sum(map(len, rollout.completion_ids)), 0.0
    for batch in pack(rollout, None, lesson.tokens):
        loss = -batch_logp(student, batch).sum() / tokens
        loss.backward()
        total += float(loss.detach())
    return total
