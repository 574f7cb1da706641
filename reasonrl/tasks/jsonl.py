"""Problems from a JSONL, JSON or parquet file: one row each, fields as in the README.

A row's split is decided by a hash of its prompt (shares `dev` and `test`), so it does not change
when rows are added or moved; each split that can have a row gets one. With `eval_file`, "test" is
that file and what it shares with the data leaves "train". "train" and "sft" walk through all their
rows in an order drawn anew for every pass.

Answers are graded by type (rewards/outcome.py). Left out: code, whose verifier needs a sandbox. A
field `worked` holds a gold completion for the cold start; without it that is the answer in its
tags.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from reasonrl.records import Problem, Score
from reasonrl.rewards.outcome import grade, ready
from reasonrl.tasks.base import content_share
from reasonrl.tasks.divided import Divided, check_shares, say_once
from reasonrl.tasks.rows import read_problems


@dataclass(frozen=True)
class Jsonl(Divided):
    """A data file. dev, test: shares held out. eval_file: another file that is "test".

    bad_rows: "stop" at a row with a bad field or image (InputError), or "skip" it; `skipped` then
    says for each file how many there were. gate: an answer counts behind <think>...</think> and in
    its tags only. text: how the answer type text is graded, "exact" or "rouge".
    """

    name: ClassVar[str] = "jsonl"
    path: str = ""
    dev: float = 0.1
    test: float = 0.2
    eval_file: str | None = None
    bad_rows: Literal["stop", "skip"] = "stop"
    gate: bool = False
    text: Literal["exact", "rouge"] = "exact"
    skipped: dict[str, int] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def source(self) -> str:
        return self.path

    def __post_init__(self) -> None:
        check_shares(self.path, self.dev, self.test)
        problems = self._read(self.path)
        if self.eval_file is None:
            self._splits.update(divide(problems, self.dev, self.test))
            return
        held = _distinct(self._read(self.eval_file))
        contents = {content(problem) for problem in held}
        rest = [problem for problem in problems if content(problem) not in contents]
        if len(rest) < len(problems):
            count = len(problems) - len(rest)
            where = f"{count} rows stand in {self.eval_file} too"
            say_once(f"{self.path}: {where} and are left out of training")
        self._splits.update(divide(rest, self.dev, 0.0) | {"test": held})

    def _read(self, path: str) -> list[Problem]:
        bad: list[str] | None = None if self.bad_rows == "stop" else []
        problems = read_problems(path, bad)
        if bad is not None:
            self.skipped[path] = len(bad)
        if bad:
            say_once(f"{path}: {len(bad)} rows are left out, the first: {bad[0]}")
        ready({problem.answer_type for problem in problems}, self.text)
        return problems

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
        return grade(problems, completions, gate=self.gate, text=self.text)


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


def _distinct(problems: Sequence[Problem]) -> list[Problem]:
    return list({content(problem): problem for problem in reversed(problems)}.values())[::-1]


def is_data_file(name: str) -> bool:
    return Path(name).suffix in (".jsonl", ".json", ".parquet")
