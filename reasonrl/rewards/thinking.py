"""placeholder"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from reasonrl.models import Policy
from reasonrl.prompts import plain, render
from reasonrl.records import InputError, Problem, Rollout, Score, scored, unscorable
from reasonrl.rollout import Sampling, sample
from reasonrl.tasks import Task

Scorer = Callable[[Rollout], Sequence[Score]]
NUMBER = re.compile(r"(?:0(?:\.[0-9]+)?|1(?:\.0+)?|\.[0-9]+)")


def parse_compact(text):
    text = text.strip()
    if NUMBER.fullmatch(text):
        return scored(float(text))
    return unscorable(f"expected a number, got {text[:20]!r}")


def compact_prompt(question: str, thinking: str) -> str:
    return f"{question}|{thinking}|"


def request(tokenizer, problem: Problem, thinking: str) -> Problem:
    """What the reward model is asked about one thinking, images included."""
    return Problem(
        problem.id, compact_prompt(plain(problem.prompt), thinking), images=problem.images
    )


def answer_text(tokenizer, value: float) -> str:
    """The reply that says a score, to one decimal as published."""
    return f"{value:.1f}"


class ThinkingScorer:
    def __init__(self, policy: Policy, *, task: Task, whole_response: bool = False):
        self.policy, self.task, self.whole = policy, task, whole_response

    def __call__(self, rollout: Rollout) -> list[Score]:
        asked = {}
        rows = []
        for g, text in zip(rollout.group.tolist(), rollout.text, strict=True):
            problem = rollout.problems[g]
            thinking = text if self.whole else self.task.thinking(problem, text)
            rows.append((g, thinking))
            if thinking.strip():
                asked.setdefault((g, thinking), len(asked))
        problems = [request(None, rollout.problems[g], t) for g, t in asked]
        ids = [render(self.policy.tokenizer, p.prompt, images=len(p.images)) for p in problems]
        done = sample(self.policy, problems, ids, 1, Sampling(8, 0.0), 0)
        found = [parse_compact(t) for t in done.text]
        return [found[asked[row]] if row in asked else unscorable("no thinking") for row in rows]


def by_rule(task: Task) -> Scorer:
    def score(rollout: Rollout) -> list[Score]:
        out = []
        for g, text in zip(rollout.group.tolist(), rollout.text, strict=True):
            problem = rollout.problems[g]
            thinking = task.thinking(problem, text)
            if not thinking.strip():
                out.append(unscorable("no thinking"))
                continue
            end = text.index(thinking) + len(thinking)
            steps = [s for s in task.steps(problem, text) if s.start < end]
            worked = task.worked(problem)
            expected = len(task.steps(problem, worked)) - 1
            right = sum(s.reward == 1.0 for s in steps)
            out.append(scored(right / max(len(steps), expected)))
        return out

    return score


def find_scorer(*a, **k):
    raise InputError("later")
