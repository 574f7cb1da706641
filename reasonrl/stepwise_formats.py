"""Published step labels as stepwise rows: what a row's fields are decides.

Math-Shepherd (arXiv 2312.08935): `input` holds the question and the steps, a mark behind each step;
`label` is the same text with + or - in place of every mark.
PRM800K (arXiv 2305.20050): `question.problem`, and `label.steps`, each with rated completions (-1
wrong, 0 neutral, 1 right) and the one that was chosen to go on. Neutral counts as right, as its
authors train it; steps after the first wrong one have no label and are left out.
Left out: PRM800K rows that annotators gave up on or that hold no rated step (None, to be counted).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from reasonrl.rows import Refused, brief

MARK = "\u043a\u0438"  # Math-Shepherd's step mark, two Cyrillic letters
FIRST = re.compile(r"Step 1:")


def stepwise(row: Mapping[str, Any]) -> dict[str, Any] | None:
    """A row with `prompt`, `completions`, `labels`; None where it has nothing to learn from."""
    if isinstance(row.get("input"), str) and isinstance(row.get("label"), str):
        return _shepherd(row)
    if isinstance(row.get("question"), Mapping) and isinstance(row.get("label"), Mapping):
        return _prm800k(row["question"], row["label"], row)
    return dict(row)


def _shepherd(row: Mapping[str, Any]) -> dict[str, Any]:
    text, marked = row["input"], row["label"]
    parts = text.split(MARK)
    if len(parts) < 2:
        raise Refused(f"field 'input': expected a mark behind every step, got {brief(text)}")
    signs = _signs(parts, marked)
    start = FIRST.search(parts[0])
    if start is None:
        raise Refused(f"field 'input': expected 'Step 1:' behind the question, got {brief(text)}")
    question, first = parts[0][: start.start()].strip(), parts[0][start.start() :]
    steps = [f"{s.strip()}\n" for s in (first, *parts[1:-1])]
    out = {"prompt": question, "completions": steps, "labels": [s == "+" for s in signs]}
    return out | {k: v for k, v in row.items() if k not in ("input", "label")}


def _signs(parts: Sequence[str], marked: str) -> list[str]:
    """What stands where the marks were; the rest of the two texts must be the same."""
    signs, at = [], 0
    for i, part in enumerate(parts[:-1]):
        end = at + len(part)
        if marked[at:end] != part or marked[end : end + 1] not in ("+", "-"):
            raise Refused(f"field 'label': step {i}: expected + or - behind the text of 'input'")
        signs.append(marked[end])
        at = end + 1
    if marked[at:].strip() != parts[-1].strip():
        raise Refused("field 'label': expected the text of 'input', it ends otherwise")
    return signs


def _prm800k(
    question: Mapping[str, Any], label: Mapping[str, Any], row: Mapping[str, Any]
) -> dict[str, Any] | None:
    problem, steps = question.get("problem"), label.get("steps")
    if not isinstance(problem, str) or not isinstance(steps, list):
        raise Refused("field 'question': expected problem, and steps in 'label', got none")
    texts: list[str] = []
    labels: list[bool] = []
    for i, step in enumerate(steps):
        chosen = _chosen(step, i)
        if chosen is None or chosen.get("rating") is None:
            break
        if chosen["rating"] not in (-1, 0, 1):
            got = brief(chosen["rating"])
            raise Refused(f"field 'label': step {i}: expected a rating -1, 0 or 1, got {got}")
        texts.append(f"{str(chosen.get('text', '')).strip()}\n")
        labels.append(chosen["rating"] >= 0)
        if chosen["rating"] < 0:
            break
    if not texts:
        return None
    out: dict[str, Any] = {"prompt": problem, "completions": texts, "labels": labels}
    if (answer := question.get("ground_truth_answer")) is not None:
        out["answer"] = answer
    return out | {k: row[k] for k in ("labeler", "generation") if row.get(k) is not None}


def _chosen(step: Any, i: int) -> Mapping[str, Any] | None:
    """The completion that the solution went on with, the first one where none was chosen."""
    if not isinstance(step, Mapping):
        raise Refused(f"field 'label': step {i}: expected completions, got {brief(step)}")
    human = step.get("human_completion")
    if isinstance(human, Mapping):
        return {**human, "rating": 1 if human.get("rating") is None else human["rating"]}
    made = step.get("completions") or []
    at = step.get("chosen_completion")
    if at is None:
        return made[0] if made else None
    if type(at) is not int or not 0 <= at < len(made):
        raise Refused(f"field 'label': step {i}: chosen_completion {brief(at)} of {len(made)}")
    return made[at]
