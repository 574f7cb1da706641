"""A generative judge as a scorer: k verdicts a completion, their mean is the score (Libra).

    rewards = Judge(models.load("judge"), votes=4)(rollout)

A judgement without a clean verdict does not count; a completion for which none counts is
unscorable, never 0. The judge sees what stands behind the completion's </think> unless `with_cot`.
Everything is drawn from the seed, so a run with a judge resumes exactly. Left out: judges behind a
server, pairwise ranking prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from reasonrl.judging import ask, read
from reasonrl.models import Policy
from reasonrl.prompts import plain, render
from reasonrl.records import Problem, Rewards, Rollout, Score, scored, unscorable
from reasonrl.rollout import Sampling, sample


class Judge:
    """`judge(rollout) -> Rewards` with outcome = the mean verdict in [0, 1]."""

    def __init__(
        self,
        policy: Policy,
        *,
        votes: int = 1,
        max_tokens: int = 512,  # of one judgement
        temperature: float = 1.0,  # 0: one greedy judgement
        think: bool = True,
        with_cot: bool = False,
        checklist: Sequence[str] = (),
        seed: int = 0,
    ):
        if votes < 1 or max_tokens < 1:
            raise ValueError(f"votes and max_tokens must be >= 1, got {votes} and {max_tokens}")
        if temperature == 0 and votes > 1:
            raise ValueError(f"votes must be 1 at temperature 0, got {votes}")
        self.policy, self.votes, self.seed = policy, votes, seed
        self.sampling = Sampling(max_tokens, temperature)
        self.think, self.with_cot, self.checklist = think, with_cot, tuple(checklist)

    def __call__(self, rollout: Rollout) -> Rewards:
        prompts = [rollout.problems[g].prompt for g in rollout.group.tolist()]
        verdicts = self.verdicts([plain(p) for p in prompts], rollout.text)
        torn = sum(isinstance(v, str) for row in verdicts for v in row)
        total = max(1, sum(map(len, verdicts)))
        return Rewards(
            outcome=[_score(row) for row in verdicts], metrics={"judge/unparsable": torn / total}
        )

    def verdicts(self, questions: Sequence[str], responses: Sequence[str]) -> list[list[int | str]]:
        """`votes` verdicts for every response: 0, 1 or the reason why there is none."""
        own = [r if self.with_cot else without_thinking(r) for r in responses]
        calls = [
            ask(q, r, seed=self.seed, think=self.think, checklist=self.checklist)
            for q, r in zip(questions, own, strict=True)
        ]
        prompts = [render(self.policy.tokenizer, call.prompt) for call in calls]
        room = self.policy.context - self.sampling.max_tokens
        out: list[list[int | str]] = [["the prompt is too long"] for _ in calls]
        fits = [i for i, ids in enumerate(prompts) if len(ids) <= room]
        problems = [Problem(f"judgement-{i}", calls[i].prompt) for i in fits]
        chosen = [prompts[i] for i in fits]
        done = sample(self.policy, problems, chosen, self.votes, self.sampling, self.seed)
        for at, i in enumerate(fits):
            texts = done.text[at * self.votes : (at + 1) * self.votes]
            out[i] = [read(text, calls[i].nonce) for text in texts]
        return out


def without_thinking(response: str) -> str:
    """What stands behind the last </think>; all of it where there is none."""
    return response.rpartition("</think>")[2].strip() or response


def _score(verdicts: Sequence[int | str]) -> Score:
    known = [v for v in verdicts if not isinstance(v, str)]
    if known:
        return scored(sum(known) / len(known))
    reasons = Counter(v for v in verdicts if isinstance(v, str))
    return unscorable(", ".join(f"{reason} ({n})" for reason, n in reasons.most_common()))
