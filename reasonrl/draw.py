"""Which completions a step learns from: groups are drawn, graded, kept or dropped by accuracy.

Without a filter a step takes the groups of the next `prompts_per_step` problems as they are. With
one, whole groups whose mean outcome lies outside [low, high] teach little and are dropped (PRIME's
accuracy filter, arXiv 2502.01456 section 3.2; DAPO's dynamic sampling is low just above 0 and high
just below 1); up to `rounds` rollouts are made until enough survive. Surplus survivors wait with
their completions and go first in the next step; they are then one step old, and the loss takes the
log-probabilities they were sampled with. Where too few survive, the step is smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from reasonrl.algos.base import Algorithm
from reasonrl.batch import merge, take
from reasonrl.config import Filter
from reasonrl.engine import Begun
from reasonrl.ranks import any_rank
from reasonrl.records import Problem, Rollout, Score
from reasonrl.rollout import Sampling, begin
from reasonrl.vision import prepare

Waiting = tuple[int, Rollout]  # number of the problem in the task's train split, its group


class Source:
    """Hands a run its rollouts; `drawn` problems of the train split are used up."""

    def __init__(self, algo: Algorithm, accelerator: Accelerator, limits: Filter, drawn: int = 0):
        self.algo, self.accelerator, self.limits = algo, accelerator, limits
        self.drawn = drawn
        self.waiting: list[Waiting] = []

    def draw(
        self, prompts: int, group: int, sampling: Sampling, seed: Callable[[int], int]
    ) -> tuple[Rollout, dict[str, float]]:
        """One step's rollout of this rank's share of `prompts` groups, and what the filter did.

        seed: the sampling seed of each round, 0, 1, ...
        """
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if not self.limits.active:
            return self._rollout(prompts, group, sampling, seed(0)), {}
        wanted = len(range(rank, prompts, world))
        carried, seen = len(self.waiting), 0
        for number in range(self.limits.rounds):
            if not any_rank(self.accelerator, len(self.waiting) < wanted):
                break  # every rank has enough: all leave together
            rollout = self._rollout(prompts, group, sampling, seed(number))
            seen += len(rollout.problems)
            self._sift(rollout)
        chosen, self.waiting = self.waiting[:wanted], self.waiting[wanted:]
        metrics = {
            "filter/kept": (len(chosen) + len(self.waiting) - carried) / max(1, seen),
            "filter/groups": float(len(chosen)),
            "filter/waiting": float(len(self.waiting)),
        }
        parts = [rollout for _, rollout in chosen]
        out = merge(parts or [self.algo.rollout([], group, sampling, 0)])
        # what waits is a step old when it is used
        self.waiting = [(n, replace(rollout, stale=True)) for n, rollout in self.waiting]
        return out, metrics

    def ahead(self, prompts: int, group: int, sampling: Sampling, seed: int) -> None:
        """Let the server draw the next step's completions while this step goes on (no filter)."""
        clock, policy = self.algo.clock, self.algo.policy
        problems = self._mine(self.algo.task.problems("train", self.drawn, prompts))
        clock.step += 1
        asked = self.algo.prompt(problems)
        clock.step -= 1
        begin(policy, asked, group, sampling, seed)

    def mark(self) -> tuple[int, list[Waiting], Any]:
        """Where the source stands, for `rewind`."""
        server = self.algo.policy.engine
        return self.drawn, list(self.waiting), server and server.begun

    def rewind(self, mark: tuple[int, list[Waiting], Any]) -> None:
        """As if nothing had been drawn since `mark`."""
        self.drawn, self.waiting = mark[0], list(mark[1])
        if self.algo.policy.engine is not None:
            self.algo.policy.engine.begun = mark[2]

    def state(self) -> list[dict[str, Any]]:
        """What every rank keeps waiting, and what a server draws for it, as plain values; a
        collective."""
        mine: dict[str, Any] = {"waiting": [_plain(n, rollout) for n, rollout in self.waiting]}
        server = self.algo.policy.engine
        if server is not None and server.begun is not None:
            mine["begun"] = server.begun.state()
        return [mine] if self.accelerator.num_processes == 1 else gather_object([mine])

    def restore(self, ranks: Sequence[dict[str, Any]]) -> None:
        """Take back `state`; for another number of ranks the groups are dealt out anew, and a
        server draws again."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if len(ranks) == world:
            mine = ranks[rank]["waiting"]
            server, begun = self.algo.policy.engine, [r["begun"] for r in ranks if r.get("begun")]
            if server is not None and len(begun) == world:
                server.begun = Begun.of(begun[rank])
        else:
            mine = [group for r in ranks for group in r["waiting"]][rank::world]
        self.waiting = [self._group(plain) for plain in mine]

    def _rollout(self, prompts: int, group: int, sampling: Sampling, seed: int) -> Rollout:
        """Completions of this rank's share of the next problems."""
        problems = self._mine(self._next(prompts))
        rollout = self.algo.rollout([p for _, p in problems], group, sampling, seed)
        return replace(rollout, numbers=[n for n, _ in problems])

    def _next(self, count: int) -> list[tuple[int, Problem]]:
        first, self.drawn = self.drawn, self.drawn + count
        return list(enumerate(self.algo.task.problems("train", first, count), first))

    def _mine(self, problems: list) -> list:
        """This rank's problems; whole groups stay on one rank."""
        return problems[self.accelerator.process_index :: self.accelerator.num_processes]

    def _sift(self, rollout: Rollout) -> None:
        """Grade a rollout and let the groups inside the limits wait."""
        outcome = self.algo.outcomes(rollout)
        for g, number in enumerate(rollout.numbers):
            rows = (rollout.group == g).nonzero()[:, 0].tolist()
            values = [v for b in rows if (v := outcome[b].value) is not None]
            cut = self.limits.drop_clipped and not all(rollout.finished[b] for b in rows)
            mean = sum(values) / len(values) if values else None
            if mean is not None and not cut and self.limits.low <= mean <= self.limits.high:
                group = take(rollout, [g])
                graded = replace(group, outcome=[outcome[b] for b in rows])
                self.waiting.append((number, graded))

    def _group(self, plain: dict[str, Any]) -> Waiting:
        problem = self.algo.task.problem("train", plain["number"])
        sampling = plain["sampling_logp"]
        rows = len(plain["text"])
        prompts, images = prepare(self.algo.policy, [problem], [plain["prompt"]])
        rollout = Rollout(
            problems=[problem],
            prompt_ids=prompts,
            group=torch.zeros(rows, dtype=torch.long),
            completion_ids=plain["completions"],
            text=plain["text"],
            finished=plain["finished"],
            logp=plain["logp"],
            pieces=plain["pieces"],
            sampling_logp=sampling,
            outcome=[Score(*score) for score in plain["outcome"]],
            numbers=[plain["number"]],
            stale=True,
            images=images,
        )
        return plain["number"], rollout


def _plain(number: int, rollout: Rollout) -> dict[str, Any]:
    sampling = rollout.sampling_logp
    return {
        "number": number,
        "prompt": list(rollout.prompt_ids[0]),
        "completions": [list(ids) for ids in rollout.completion_ids],
        "text": list(rollout.text),
        "finished": list(rollout.finished),
        "logp": list(rollout.logp),
        "pieces": [list(p) for p in rollout.pieces],
        "sampling_logp": None if sampling is None else list(sampling),
        "outcome": [(s.kind, s.value, s.reason) for s in rollout.outcome or ()],
    }
