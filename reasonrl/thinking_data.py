"""Data for a thinking reward model (SophiaVL-R1, arXiv 2505.17018 section 3.2): what a policy
thought during a plain GRPO run, a score for each, as many of every score.

    pairs = logged("runs/plain", task, by_rule(task))
    write(balanced(pairs), "runs/trm-data", tokenizer)     # rows for `reasonrl train sft`

The scores come from whoever is asked: the task's rule, a larger model behind a server. Thinking
that nobody could score is left out and counted. A row is a question to the reward model (`prompt`,
`images`) and its reply (`worked`); where the rule scored, in the short form, the task's review of
every step stands before the number. Published: 470,331 pairs of a run, 5,000 to 15,000 of each
interval of 0.1 kept, no review. Left out: the unpublished rules by which theirs were filtered.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reasonrl import images
from reasonrl.choice import texts
from reasonrl.progress import phase
from reasonrl.records import InputError, Problem
from reasonrl.report.gather import completion_files, read_table
from reasonrl.rewards.thinking import Scorer, reply_text, request
from reasonrl.stepwise import write_rows
from reasonrl.tasks import Task
from reasonrl.tasks.base import Draws

INTERVALS = 10  # of the score, each 0.1 wide


class Pair(NamedTuple):
    """A problem, what was thought about it, and what that is worth in [0, 1]."""

    problem: Problem
    thinking: str
    score: float
    working: str = ""  # of who scored it, where there is one


class Found(NamedTuple):
    pairs: list[Pair]
    unscored: int  # completions for whose thinking there is no score


def logged(
    run: str | Path,
    task: Task,
    scorer: Scorer,
    *,
    whole_response: bool = False,
    reviewed: bool = False,  # the scores are the rule's: with its working
) -> Found:
    """The thinking of every completion that a run logged, with its score; beside them the worked
    completion of each problem, where the task has one (a young policy thinks nothing right).

    InputError where the run logged none, or problems that are not of this task.
    """
    files = completion_files(Path(run))
    if not files:
        raise InputError(f"{run}: expected completions of a run, found none")
    known: dict[str, Problem] = {}
    pairs, unscored = [], 0
    with phase("scoring", len(files), "tables") as part:
        for step in sorted(files):
            rows = read_table(files[step])
            problems = [_problem(row, task, known, files[step]) for row in rows]
            written = [(p, row["completion"]) for p, row in zip(problems, rows, strict=True)]
            gold = [(p, w) for p in {p.id: p for p in problems}.values() if (w := task.worked(p))]
            asked = [*written, *gold]
            scores = scorer(texts([p for p, _ in asked], [text for _, text in asked]))
            for (problem, text), score in zip(asked, scores, strict=True):
                if score.value is None:
                    unscored += 1
                    continue
                thinking = text if whole_response else task.thinking(problem, text)
                working = (task.review(problem, text) if reviewed else None) or ""
                pairs.append(Pair(problem, thinking, score.value, working))
            part.add()
    return Found(pairs, unscored)


def balanced(pairs: Sequence[Pair], *, most: int | None = None, seed: int = 0) -> list[Pair]:
    """Distinct pairs, at most `most` of each interval of the score, drawn at random; by default
    the mean number of the intervals that have any. InputError for fewer than two scores."""
    bins: dict[int, list[Pair]] = defaultdict(list)
    for pair in {(p.problem.id, p.thinking): p for p in pairs}.values():
        bins[min(int(pair.score * INTERVALS + 1e-9), INTERVALS - 1)].append(pair)
    if len(bins) < 2:
        raise InputError(
            f"thinking data: expected scores in at least two intervals of 0.1, got {len(bins)} from"
            f" {len(pairs)} completions"
        )
    limit = most or math.ceil(sum(map(len, bins.values())) / len(bins))
    draws = Draws("thinking", seed)
    kept = [pair for key in sorted(bins) for pair in draws.shuffled(bins[key])[:limit]]
    return draws.shuffled(kept)


def write(pairs: Sequence[Pair], folder: str | Path, tokenizer: Any) -> Path:
    """FOLDER/pairs.jsonl, and the pictures that no file holds in FOLDER/images; returns the file.

    tokenizer: of the reward model to be, which decides the form of question and reply.
    """
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = [_row(pair, folder, tokenizer) for pair in pairs]
    write_rows(folder / "pairs.jsonl", rows)
    return folder / "pairs.jsonl"


def _row(pair: Pair, folder: Path, tokenizer: Any) -> dict[str, Any]:
    asked = request(tokenizer, pair.problem, pair.thinking)
    said = f"{pair.score:.1f}"
    row = {"prompt": asked.prompt, "answer": said, "answer_type": "numerical"}
    row |= {"worked": reply_text(tokenizer, pair.score, pair.working), "score": pair.score}
    row |= {"problem_id": pair.problem.id, "images": []}
    for picture in pair.problem.images:
        name = images.key(picture)
        path = folder / "images" / f"{name}.png"
        if not path.exists():
            images.decode([picture])[0].save(path)
        row["images"].append(f"images/{name}.png")
    return row


def _problem(row: Mapping[str, Any], task: Task, known: dict[str, Problem], file: Path) -> Problem:
    """The problem of a logged completion; the task's training problems are met in order."""
    wanted = row["problem_id"]
    while wanted not in known:
        at = len(known)
        batch = task.problems("train", at, 256)
        fresh = {p.id: p for p in batch if p.id not in known}
        known |= fresh
        if len(fresh) < len(batch) and wanted not in known:
            raise InputError(f"{file}: problem {wanted!r} is none of task {task.name}'s")
        if at > 1 << 22:
            raise InputError(f"{file}: problem {wanted!r} is none of task {task.name}'s first ones")
    return known[wanted]
