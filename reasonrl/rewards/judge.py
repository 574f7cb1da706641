"""A generative judge as a scorer: k verdicts a completion, their mean is the score (Libra).

    rewards = Judge(models.load("judge"), votes=4)(rollout)
    rewards = Judge(ChatClient("http://127.0.0.1:8000/v1", "judge"), votes=4)(rollout)

The judge is a model in this process, or one behind any OpenAI-compatible server; there every vote
is a request with a seed of its own, and what the server failed to judge is infra. A judgement
without a clean verdict does not count; a completion for which none counts is unscorable, never 0.
The judge sees what stands behind the completion's </think> unless `with_cot`. Everything is drawn
from the seed, so a run with a judge in this process resumes exactly. Left out: pairwise prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from reasonrl.chat import ChatClient
from reasonrl.judging import Call, Style, ask, read
from reasonrl.models import Policy
from reasonrl.prompts import plain, render
from reasonrl.records import Problem, Rewards, Rollout, Score, infra, scored, unscorable
from reasonrl.rollout import Sampling, sample
from reasonrl.vision import refuse


class Down(str):
    """The reason of a vote that is missing by the server's fault, not by the reply's."""


class Judge:
    """`judge(rollout) -> Rewards` with outcome = the mean verdict in [0, 1]."""

    def __init__(
        self,
        policy: Policy | ChatClient,
        *,
        votes: int = 1,
        max_tokens: int = 512,  # of one judgement
        temperature: float = 1.0,  # 0: one greedy judgement
        think: bool = True,
        with_cot: bool = False,
        checklist: Sequence[str] = (),
        style: Style = "full",
        seed: int = 0,
    ):
        if votes < 1 or max_tokens < 1:
            raise ValueError(f"votes and max_tokens must be >= 1, got {votes} and {max_tokens}")
        if temperature == 0 and votes > 1:
            raise ValueError(f"votes must be 1 at temperature 0, got {votes}")
        self.policy, self.votes, self.seed = policy, votes, seed
        self.sampling = Sampling(max_tokens, temperature)
        if style == "compact" and checklist:
            raise ValueError("style compact has no room for a checklist")
        self.think, self.with_cot, self.checklist = think, with_cot, tuple(checklist)
        self.style: Style = style

    def __call__(self, rollout: Rollout) -> Rewards:
        refuse(rollout.problems, "a judge")
        prompts = [rollout.problems[g].prompt for g in rollout.group.tolist()]
        verdicts = self.verdicts([plain(p) for p in prompts], rollout.text)
        missing = [v for row in verdicts for v in row if isinstance(v, str)]
        down, total = sum(isinstance(v, Down) for v in missing), max(1, sum(map(len, verdicts)))
        metrics = {"judge/unparsable": (len(missing) - down) / total}
        if isinstance(self.policy, ChatClient):
            metrics["judge/infra"] = down / total
        return Rewards(outcome=[_score(row) for row in verdicts], metrics=metrics)

    def begin(self, rollout: Rollout) -> None:
        """Ask a server about these completions in another thread; a call that has them among its
        own finds the answers. For a judge in this process there is nothing to begin."""
        if isinstance(self.policy, ChatClient):
            prompts = [rollout.problems[g].prompt for g in rollout.group.tolist()]
            prompts, options = self._questions(
                self._calls([plain(p) for p in prompts], rollout.text)
            )
            self.policy.begin(prompts, **options)

    def verdicts(self, questions: Sequence[str], responses: Sequence[str]) -> list[list[int | str]]:
        """`votes` verdicts for every response: 0, 1 or the reason why there is none."""
        calls = self._calls(questions, responses)
        if isinstance(self.policy, ChatClient):
            return self._behind(self.policy, calls)
        return self._here(self.policy, calls)

    def _calls(self, questions: Sequence[str], responses: Sequence[str]) -> list[Call]:
        own = [r if self.with_cot else without_thinking(r) for r in responses]
        how = {"think": self.think, "checklist": self.checklist, "style": self.style}
        pairs = zip(questions, own, strict=True)
        return [ask(q, r, seed=self.seed, **how) for q, r in pairs]

    def _questions(self, calls: Sequence[Call]) -> tuple[list[str], dict[str, Any]]:
        """What a server is asked: every call once a vote, each with a seed of its own."""
        votes = range(self.votes)
        options = {
            "max_tokens": self.sampling.max_tokens,
            "temperature": self.sampling.temperature,
            "seeds": [(self.seed * 1_000_003 + vote) % 2**31 for _ in calls for vote in votes],
        }
        return [call.prompt for call in calls for _ in votes], options

    def _here(self, policy: Policy, calls: Sequence[Call]) -> list[list[int | str]]:
        prompts = [render(policy.tokenizer, call.prompt) for call in calls]
        room = policy.context - self.sampling.max_tokens
        out: list[list[int | str]] = [["the prompt is too long"] for _ in calls]
        fits = [i for i, ids in enumerate(prompts) if len(ids) <= room]
        problems = [Problem(f"judgement-{i}", calls[i].prompt) for i in fits]
        chosen = [prompts[i] for i in fits]
        done = sample(policy, problems, chosen, self.votes, self.sampling, self.seed)
        for at, i in enumerate(fits):
            texts = done.text[at * self.votes : (at + 1) * self.votes]
            out[i] = [read(text, calls[i].nonce, self.style) for text in texts]
        return out

    def _behind(self, client: ChatClient, calls: Sequence[Call]) -> list[list[int | str]]:
        prompts, options = self._questions(calls)
        replies = client.ask(prompts, **options)
        pairs = zip(replies, [call for call in calls for _ in range(self.votes)], strict=True)
        votes = [_verdict(reply, call.nonce, self.style) for reply, call in pairs]
        return [votes[i : i + self.votes] for i in range(0, len(votes), self.votes)]


def _verdict(reply: str | Score, nonce: str, style: Style) -> int | str:
    if isinstance(reply, str):
        return read(reply, nonce, style)
    return Down(reply.reason) if reply.kind == "infra" else reply.reason


def without_thinking(response: str) -> str:
    """What stands behind the last </think>; all of it where there is none."""
    return response.rpartition("</think>")[2].strip() or response


def _score(verdicts: Sequence[int | str]) -> Score:
    known = [v for v in verdicts if not isinstance(v, str)]
    if known:
        return scored(sum(known) / len(known))
    reasons = Counter(v for v in verdicts if isinstance(v, str))
    said = ", ".join(f"{reason} ({n})" for reason, n in reasons.most_common())
    return infra(said) if any(isinstance(v, Down) for v in verdicts) else unscorable(said)
