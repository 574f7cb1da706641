"""Verifiable judging (V2V, arXiv 2507.21645): data for judges from verifiable problems, and Libra
Bench's measure of them.

Data: several generators answer problems that a verifier can grade; every answer becomes a row whose
label is the verifier's, right and wrong ones balanced for each generator. Rows have Libra Bench's
fields: index, question, response, label, model, reference, subset, response_with_cot.
Bench: accuracy on each subset, the unweighted mean of them, balanced accuracy, accuracy for each
generator; intervals are percentile bootstraps over rows. A tie of votes is "wrong"; a row
without any verdict counts as judged wrongly and is reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from reasonrl.models import Policy
from reasonrl.prompts import plain, render
from reasonrl.records import InputError
from reasonrl.rewards.judge import Judge, without_thinking
from reasonrl.rollout import Sampling, sample
from reasonrl.rows import Refused, brief, field_of, read_rows
from reasonrl.tasks import Task
from reasonrl.tasks.base import Draws

RESAMPLES = 2000


@dataclass(frozen=True)
class Case:
    """One row of a judging benchmark."""

    index: str
    question: str
    response: str
    with_cot: str
    label: int
    model: str
    subset: str


def read_cases(path: str | Path) -> list[Case]:
    """The rows of a file in Libra Bench's format; InputError names row and field."""
    out = []
    for number, row in read_rows(path):
        try:
            out.append(_case(row, number))
        except Refused as error:
            raise InputError(f"{path}: row {number}: {error}") from None
    return out


def bench(judge: Judge, cases: Sequence[Case], seed: int = 0) -> dict[str, Any]:
    """The metrics of a judge; it sees the thinking where it was made `with_cot`."""
    responses = [c.with_cot if judge.with_cot else c.response for c in cases]
    votes = judge.verdicts([c.question for c in cases], responses)
    known = [[v for v in row if not isinstance(v, str)] for row in votes]
    said = [int(2 * sum(row) > len(row)) if row else None for row in known]
    hit = np.array([s == c.label for s, c in zip(said, cases, strict=True)], dtype=np.float64)
    label = np.array([c.label for c in cases])
    subsets = sorted({c.subset for c in cases})
    masks = {name: np.array([c.subset == name for c in cases]) for name in subsets}

    def means(rows: np.ndarray) -> dict[str, float]:
        by = {name: _mean(hit[rows[masks[name][rows]]]) for name in subsets}
        seen = [v for v in by.values() if not math.isnan(v)]
        halves = [_mean(hit[rows[label[rows] == k]]) for k in (0, 1)]
        return by | {"mean": _mean(np.array(seen)), "balanced": _mean(np.array(halves))}

    rng, every = np.random.default_rng(seed), np.arange(len(cases))
    whole = means(every)
    draws = [means(rng.integers(len(cases), size=len(cases))) for _ in range(RESAMPLES)]

    def point(name: str) -> dict[str, float]:
        low, high = np.nanpercentile([d[name] for d in draws], [2.5, 97.5])
        return {"accuracy": whole[name], "low": float(low), "high": float(high)}

    models = sorted({c.model for c in cases})
    return {
        "rows": len(cases),
        "unjudged": sum(s is None for s in said),
        "accuracy": point("mean"),
        "balanced_accuracy": point("balanced"),
        "subsets": {name: point(name) for name in subsets},
        "generators": {m: _mean(hit[[c.model == m for c in cases]]) for m in models},
        "said_right": sum(s == 1 for s in said) / max(1, len(said)),
        "with_cot": judge.with_cot,
        "thinking": judge.think,
        "votes": judge.votes,
    }


def make_cases(
    generators: Mapping[str, Policy],
    task: Task,
    sampling: Sampling,
    span: tuple[str, int, int],  # split, number of the first problem, how many
    samples: int,
    seed: int,
) -> Iterator[dict[str, Any]]:
    """Rows of judging data, as many right as wrong ones for each generator."""
    split, first, count = span
    problems = task.problems(split, first, count)
    index = 0
    for name, policy in generators.items():
        prompts = [render(policy.tokenizer, p.prompt, images=len(p.images)) for p in problems]
        rollout = sample(policy, problems, prompts, samples, sampling, seed)
        asked = [rollout.problems[g] for g in rollout.group.tolist()]
        grades = task.verdicts(asked, rollout.text)
        sides: dict[int, list[int]] = {0: [], 1: []}
        for i, grade in enumerate(grades):
            if grade.value in (0.0, 1.0) and rollout.text[i].strip():
                sides[int(grade.value)].append(i)
        draws = Draws("judge", seed, name)
        size = min(map(len, sides.values()))
        chosen = sorted(i for side in sides.values() for i in draws.shuffled(side)[:size])
        for i in chosen:
            yield {
                "index": index,
                "question": plain(asked[i].prompt),
                "response": without_thinking(str(rollout.text[i])),
                "label": int(grades[i].value or 0),
                "model": name,
                "reference": asked[i].answer,
                "subset": str(asked[i].extra.get("subset", task.name)),
                "response_with_cot": rollout.text[i],
            }
            index += 1


def _case(row: Mapping[str, Any], number: int) -> Case:
    texts = {}
    for name in ("question", "response"):
        texts[name] = field_of(row, name, str, "a string")
        if not texts[name] or not texts[name].strip():
            raise Refused(f"field {name!r}: expected some text, got {brief(texts[name])}")
    label = row.get("label")
    if label not in (0, 1):
        raise Refused(f"field 'label': expected 0 or 1, got {brief(label)}")
    return Case(
        index=str(row.get("index", number)),
        question=texts["question"],
        response=texts["response"],
        with_cot=field_of(row, "response_with_cot", str, "a string") or texts["response"],
        label=int(label),
        model=str(row.get("model", "unknown")),
        subset=str(row.get("subset", "all")),
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan
