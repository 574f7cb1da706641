"""Problems from a JSONL, JSON or parquet file: one row each, fields as in the README.

A row's split is decided by a hash of its prompt (shares `dev` and `test`), so it does not change
when rows are added or moved; each split that can have a row gets one. With `eval_file`, "test" is
that file and what it shares with the data leaves "train". "train" and "sft" walk through all their
rows in an order drawn anew for every pass.

Answers by type: text is compared after folding case, width, white space and end punctuation;
whole numbers exactly, others within 1e-5; choice as a set of letters; ocr gives exp(-word error
rate); math goes to the verifier. Left out: code, whose verifier needs a sandbox. A field `worked`
holds a gold completion for the cold start; without it that is the answer in its tags.
"""

from __future__ import annotations

import json
import logging
import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from reasonrl.answer import final_answer
from reasonrl.records import Problem, Score, scored, unscorable
from reasonrl.rewards.verify import verify_math
from reasonrl.tasks.base import content_share
from reasonrl.tasks.divided import Divided, check_shares
from reasonrl.tasks.rows import NUMBER, parse_choice, parse_number, read_problems

TOLERANCE = 1e-5  # relative, for numbers written as rounded decimals
WORDS = 2000  # longest text, in words, that is compared word by word
logger = logging.getLogger("reasonrl.tasks")


@dataclass(frozen=True)
class Jsonl(Divided):
    """A data file. dev, test: shares held out. eval_file: another file that is "test"."""

    name: ClassVar[str] = "jsonl"
    path: str = ""
    dev: float = 0.1
    test: float = 0.2
    eval_file: str | None = None

    @property
    def source(self) -> str:
        return self.path

    def __post_init__(self) -> None:
        check_shares(self.path, self.dev, self.test)
        problems = read_problems(self.path)
        if self.eval_file is None:
            self._splits.update(divide(problems, self.dev, self.test))
            return
        held = _distinct(read_problems(self.eval_file))
        contents = {content(problem) for problem in held}
        rest = [problem for problem in problems if content(problem) not in contents]
        if len(rest) < len(problems):
            logger.warning(
                "%s: %d rows stand in %s too and are left out of training",
                *(self.path, len(problems) - len(rest), self.eval_file),
            )
        self._splits.update(divide(rest, self.dev, 0.0) | {"test": held})

    @property
    def alphabet(self) -> str:
        rows = [p for split in self._splits.values() for p in split]
        texts = [json.dumps([p.prompt, p.answer], ensure_ascii=False) for p in rows]
        return "".join(sorted({*super().alphabet, *"".join(texts)}))

    def worked(self, problem: Problem) -> str | None:
        worked = problem.extra.get("worked")
        if isinstance(worked, str):
            return worked
        return None if problem.answer is None else f"<answer>{problem.answer}</answer>"

    def grade(self, problem: Problem, completion: str) -> Score:
        return self.grades([problem], [completion])[0]

    def grades(self, problems: Sequence[Problem], completions: Sequence[str]) -> list[Score]:
        """The outcomes of many completions; maths is verified all at once."""
        math_rows = [
            i for i, p in enumerate(problems) if p.answer_type == "math" and p.answer is not None
        ]
        answers = [problems[i].answer or "" for i in math_rows]
        verified = verify_math([completions[i] for i in math_rows], answers) if math_rows else []
        known = dict(zip(math_rows, verified, strict=True))
        pairs = enumerate(zip(problems, completions, strict=True))
        return [known[i] if i in known else grade_row(p, c) for i, (p, c) in pairs]


def content(problem: Problem) -> str:
    """What makes a row the same problem as another: its prompt and images."""
    return json.dumps([problem.prompt, list(problem.images)], sort_keys=True, default=str)


def divide(problems: Sequence[Problem], dev: float, test: float) -> dict[str, list[Problem]]:
    """Rows by split. Equal contents stay together; a held-out split has each content once.

    Where a share is wanted but no row fell into it, the nearest row by hash is taken, as long as
    "train" keeps one.
    """
    shares = {content(p): content_share(content(p)) for p in problems}
    where = {
        c: "test" if s < test else "dev" if s < test + dev else "train" for c, s in shares.items()
    }
    in_order = sorted(where, key=lambda c: shares[c])
    if "train" not in where.values() and in_order:
        where[in_order[-1]] = "train"
    for split, share in (("test", test), ("dev", dev)):
        if share > 0 and split not in where.values():
            training = [c for c in in_order if where[c] == "train"]
            spare = training[:-1] or [c for c in in_order if where[c] == "dev" and split == "test"]
            where |= {c: split for c in spare[:1]}
    rows = {s: [p for p in problems if where[content(p)] == s] for s in ("train", "dev", "test")}
    return {"train": rows["train"], "dev": _distinct(rows["dev"]), "test": _distinct(rows["test"])}


def grade_row(problem: Problem, completion: str) -> Score:
    """The outcome by answer type, the types that need no verifier."""
    gold, kind = problem.answer, problem.answer_type
    if gold is None:
        return unscorable("the row has no answer")
    if kind == "code":
        return unscorable("code answers are graded by a sandboxed scorer, not by the task")
    stated = final_answer(completion)
    if stated is None:
        stated = _last_line(completion, kind)
    if not stated:
        return scored(0.0, "no answer found in the completion")
    if kind == "numerical":
        return _numerical(gold, stated)
    if kind == "choice":
        want, got = parse_choice(gold), parse_choice(stated)
        if want is None:
            return unscorable(f"the gold answer is no choice: {gold!r}")
        return scored(float(got == want), "" if got else "the answer is not a choice")
    if kind == "ocr":
        return scored(math.exp(-word_error_rate(folded(stated).split(), folded(gold).split())))
    return scored(float(folded(stated) == folded(gold)))


def folded(text: str) -> str:
    """Text for comparison: case, width, white space, quotes and end punctuation do not count."""
    text = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(text.split()).strip("\"'`*$ ").rstrip(".!?,;: ").strip("\"'`*$ ")


def word_error_rate(stated: Sequence[str], gold: Sequence[str]) -> float:
    """Word edits that turn one into the other, over the gold words."""
    stated, gold = stated[:WORDS], gold[:WORDS]
    row = list(range(len(gold) + 1))
    for i, word in enumerate(stated, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(gold, 1):
            swap = before + (word != other)
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, swap)
    return row[-1] / max(1, len(gold))


def _last_line(completion: str, kind: str) -> str:
    """What a completion without any mark answers: its last line, for numbers the last one there."""
    lines = completion.rpartition("</think>")[2].strip().splitlines()
    last = lines[-1].strip() if lines else ""
    numbers = [match[0] for match in NUMBER.finditer(last)] if kind == "numerical" else []
    return numbers[-1] if numbers else last


def _numerical(gold: str, stated: str) -> Score:
    want, got = parse_number(gold), parse_number(stated)
    if want is None:
        return unscorable(f"the gold answer is no number: {gold!r}")
    if got is None:
        return scored(0.0, "the answer is not a number")
    allowed = 0 if want.denominator == 1 else TOLERANCE * abs(want)
    return scored(float(abs(got - want) <= allowed))


def _distinct(problems: Sequence[Problem]) -> list[Problem]:
    return list({content(problem): problem for problem in reversed(problems)}.values())[::-1]


def is_data_file(name: str) -> bool:
    return Path(name).suffix in (".jsonl", ".json", ".parquet")
