"""Labels for traces without a rule, as ReasonFlux-PRM makes them (arXiv 2506.18896, section 3).

A row has a prompt, thinking steps and a response: `completions` (or one `completion`) and
`response`, or one `completion` with the response behind its </think>. Its steps are matched with
the response's (targets.py), scored for alignment, quality and coherence, and mixed into one label
each; a trajectory reward is added where an expert, a policy and the row's `answer` allow one
(template.py). What cannot be labelled keeps its row, with the step and the reason. A label is the
mixed target inside [0, 1]; the three scores stand beside it. Left out: rewards of response steps,
for which the paper has none.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from reasonrl import quality, targets, template
from reasonrl.asker import Asker
from reasonrl.encoder import Encoder
from reasonrl.progress import phase
from reasonrl.prompts import plain
from reasonrl.records import InputError, Score, unscorable
from reasonrl.redact import Redact, redacted
from reasonrl.rows import Refused, brief, field_of, read_rows
from reasonrl.segment import split_steps
from reasonrl.stepwise import Trace, trace_of, trace_row
from reasonrl.systems import reasonflux_step_target

CHUNK = 16  # traces whose judge is asked together
END_OF_THINKING = "</think>"


class Thought(NamedTuple):
    """A trace to be labelled: its steps matched with its response's."""

    trace: Trace  # the steps after matching
    response: list[str]
    paired: bool


@dataclass(frozen=True)
class Labeller:
    """Who gives the scores, and how; expert and policy together give trajectory rewards."""

    encoder: Encoder
    judge: Asker
    expert: Asker | None = None
    policy: Asker | None = None
    attempts: int = 8
    coherence: targets.Coherence = "cosine"
    tau: float = 0.1
    others: int = 16  # steps of unrelated traces in the denominator
    seed: int = 0

    def __call__(self, thoughts: Sequence[Thought]) -> Iterator[dict[str, Any]]:
        """A row for every trace in order: with `labels` and `scores`, or with a `reason`."""
        pool = [(i, step) for i, one in enumerate(thoughts) for step in one.trace.steps]
        with phase("labelling", len(thoughts), "traces") as part:
            for at in range(0, len(thoughts), CHUNK):
                chunk = thoughts[at : at + CHUNK]
                found = zip(chunk, self._qualities(chunk), self._trajectories(chunk), strict=True)
                for i, (one, marks, final) in enumerate(found, at):
                    yield self._row(one, marks, final, self._others(thoughts, pool, i))
                    part.add()

    def _qualities(self, chunk: Sequence[Thought]) -> list[list[float | str]]:
        calls = [
            quality.ask(plain(one.trace.prompt), one.trace.steps, t, "".join(one.response))
            for one in chunk
            for t in range(len(one.trace.steps))
        ]
        replies = self.judge.ask([call.prompt for call in calls])
        pairs = zip(calls, replies, strict=True)
        marks = iter([_mark(reply, call.nonce) for call, reply in pairs])
        return [[next(marks) for _ in one.trace.steps] for one in chunk]

    def _trajectories(self, chunk: Sequence[Thought]) -> list[tuple[Score, str] | None]:
        """The trajectory reward and the template; None where none is asked for."""
        if self.expert is None or self.policy is None:
            return [None] * len(chunk)
        gold = [one.trace.extra.get("answer") for one in chunk]
        have = [i for i, answer in enumerate(gold) if answer is not None]
        asked = [
            template.Asked(plain(chunk[i].trace.prompt), chunk[i].trace.text, str(gold[i]))
            for i in have
        ]
        out: list[tuple[Score, str] | None] = [
            (unscorable("field 'answer': expected one to verify against, got nothing"), "")
        ] * len(chunk)
        found = template.rewards(asked, self.expert, self.policy, self.attempts)
        for i, reward in zip(have, found, strict=True):
            out[i] = reward
        return out

    def _row(
        self,
        one: Thought,
        marks: Sequence[float | str],
        final: tuple[Score, str] | None,
        others: Sequence[str],
    ) -> dict[str, Any]:
        trace = one.trace
        about: dict[str, Any] = {}
        if final is not None:
            score, plan = final
            trace = replace(trace, final=score.value)
            about["template"] = plan or None
            about["final_reason"] = None if score.value is not None else score.reason
        for t, mark in enumerate(marks):
            if isinstance(mark, str):
                return trace_row(trace) | about | {"reason": f"step {t}: field 'quality': {mark}"}
        count = len(trace.steps)
        vectors = self.encoder([plain(trace.prompt), *trace.steps, *one.response, *others])
        question, steps, response, rest = vectors.split([1, count, len(one.response), len(others)])
        near = targets.neighbours(question[0], steps, rest)
        scores = {
            "align": targets.alignment(steps, response, one.paired),
            "quality": torch.tensor(marks, dtype=torch.float64),
            "coherence": targets.coherence(*near, how=self.coherence, tau=self.tau),
        }
        target = reasonflux_step_target(*scores.values()).clamp(0, 1)
        about["scores"] = {name: value.tolist() for name, value in scores.items()}
        return trace_row(replace(trace, labels=target.tolist(), boolean=False)) | about

    def _others(
        self, thoughts: Sequence[Thought], pool: Sequence[tuple[int, str]], own: int
    ) -> list[str]:
        """Steps of traces of other prompts, drawn from the seed and the trace's place."""
        if self.coherence == "cosine":
            return []
        prompt = thoughts[own].trace.prompt
        draw = random.Random(f"{self.seed}-{own}")
        foreign = [step for i, step in pool if thoughts[i].trace.prompt != prompt]
        if not foreign:
            raise InputError(
                f"coherence {self.coherence}: expected traces of at least two prompts, got one"
            )
        return draw.sample(foreign, min(self.others, len(foreign)))


def _mark(reply: str, nonce: str) -> float | str:
    value = quality.read(reply, nonce)
    return f"{value}; the judge wrote {brief(reply)}" if isinstance(value, str) else value


def read_thoughts(path: str | Path, delimiter: str, redact: Redact | None = None) -> list[Thought]:
    """The traces of a file; InputError names the row and the field of the first fault."""
    path = Path(path)
    out, seen = [], {}
    for number, row in read_rows(path):
        where = f"{path}: row {number}"
        try:
            one = thought_of(redacted(row, redact), f"{path.stem}-{number}", delimiter, where)
        except Refused as error:
            raise InputError(f"{where}: {error}") from None
        first = seen.setdefault(one.trace.id, number)
        if first != number:
            raise InputError(
                f"{where}: field 'id': expected a new one, got {one.trace.id!r} as in row {first}"
            )
        out.append(one)
    return out


def thought_of(row: Mapping[str, Any], default_id: str, delimiter: str, where: str = "") -> Thought:
    """One row as a trace with its response; Refused says which field is wrong."""
    row = {key: value for key, value in row.items() if key != "labels"}
    response = row.get("response")
    if response is None:
        thinking, closed, response = _thinking(row)
        if not closed:
            raise Refused(
                "field 'response': expected a text, or a completion with </think>, got nothing"
            )
        row |= {"completion": thinking, "response": response}
        row.pop("steps", None)
    if isinstance(response, str):
        response = [response[s.start : s.end] for s in split_steps(response, delimiter)]
    if not (isinstance(response, list) and response):
        raise Refused(f"field 'response': expected some text, got {brief(row['response'])}")
    for i, part in enumerate(response):
        if not isinstance(part, str) or not part.strip():
            raise Refused(f"field 'response': step {i}: expected some text, got {brief(part)}")
    trace = trace_of(row, default_id, False, delimiter, where)
    steps, matched, paired = targets.match(trace.steps, response)
    return Thought(replace(trace, steps=steps), matched, paired)


def _thinking(row: Mapping[str, Any]) -> tuple[str, str, str]:
    text = field_of(row, "completion", str, "a string") or ""
    thinking, closed, response = text.partition(END_OF_THINKING)
    return thinking.replace("<think>", "", 1), closed, response
