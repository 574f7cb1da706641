"""Judging as a task (V2V, arXiv 2507.21645): is this response to this question right?

Rows of a file in Libra Bench's format (cases.py), as `reasonrl judge data` writes it. The prompt is
judging.ask's; a completion is right when its one verdict is the row's label, and a completion
without a verdict is wrong, with the reason: here the judge is the one who is graded. What a
judgement's length costs is the algorithm's (algos/judging.py), for a task sees texts, not tokens.

`worked` is a judgement by rule: the row's `check` (the answer re-derived step by step, then
compared with the stated one; Task.check), then the label. With `traces`, "train" and "sft" are the
rows of that file (`prompt` and `worked`: judgements somebody made, and whatever is mixed in) and
the judging rows are held out or unused.

A row's split is decided by a hash of its question: no question has responses on both sides. With
`eval_file`, "test" is that file, and rows on its questions leave "train".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from reasonrl.cases import Case, read_cases
from reasonrl.judging import Style, ask, read, verdict_text
from reasonrl.records import InputError, Problem, Score, scored, unscorable
from reasonrl.tasks.base import split_of
from reasonrl.tasks.divided import Divided, check_shares, say_once
from reasonrl.tasks.rows import read_problems


@dataclass(frozen=True)
class Judging(Divided):
    """Judged answers; see the head of this file."""

    name: ClassVar[str] = "judging"
    data: str = ""
    eval_file: str | None = None
    dev: float = 0.1
    test: float = 0.2
    traces: str | None = None
    style: Style = "full"
    think: bool = True
    with_cot: bool = False  # the judge sees the response's thinking too
    checklist: list[str] = field(default_factory=list)  # criteria that the judge goes through

    @property
    def source(self) -> str:
        return self.data

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError(
                "task judging: data: expected a file of judged answers (`reasonrl judge data`"
                " makes one), got none"
            )
        check_shares(self.data, self.dev, 0.0 if self.eval_file else self.test)
        cases = read_cases(self.data)
        held = read_cases(self.eval_file) if self.eval_file else []
        questions = {case.question for case in held}
        own = [case for case in cases if case.question not in questions]
        if len(own) < len(cases):
            where = f"{len(cases) - len(own)} rows are on questions of {self.eval_file}"
            say_once(f"{self.data}: {where} and are left out of training")
        splits: dict[str, list[Problem]] = {"train": [], "dev": [], "test": []}
        share = 0.0 if self.eval_file else self.test
        for number, case in enumerate(own):
            split = split_of(case.question, self.dev, share)
            splits[split].append(self.problem_of(case, f"judgement-{number}"))
        splits["test"] += [
            self.problem_of(case, f"bench-{number}") for number, case in enumerate(held)
        ]
        if self.traces:
            splits["train"] = read_problems(self.traces)
        self._splits.update(splits)

    def problem_of(self, case: Case, id: str) -> Problem:
        """A judged answer as a problem: the judge's prompt, the label as its answer."""
        how = (self.style, self.think, self.with_cot, self.seed)
        return judgement(case, id, *how, self.checklist)

    def worked(self, problem: Problem) -> str | None:
        """A judgement to learn from: the row's own (`traces`), or the one by rule."""
        if "nonce" not in problem.extra:
            return problem.extra.get("worked")
        return gold(problem, self.style, self.think)

    def verdict(self, problem: Problem, completion: str) -> int | str:
        """The judge's verdict, 0 or 1, or the reason why there is none."""
        return read(completion, problem.extra["nonce"], self.style)

    def grade(self, problem: Problem, completion: str) -> Score:
        """1 where the verdict is the label, else 0."""
        if "nonce" not in problem.extra:
            return unscorable("the row is no judgement")
        found = self.verdict(problem, completion)
        if isinstance(found, str):
            return scored(0.0, found)
        right = str(found) == problem.answer
        return scored(float(right), "" if right else f"verdict {found}, expected {problem.answer}")

    def judgements(self, split: str = "train") -> Sequence[Problem]:
        """All judging rows of a split, in the file's order."""
        return self._rows(split)


def judgement(
    case: Case,
    id: str,
    style: Style,
    think: bool,
    with_cot: bool,
    seed: int,
    checklist: Sequence[str] = (),
) -> Problem:
    """A judged answer as a problem for a judge."""
    response = case.with_cot if with_cot else case.response
    question = case.question
    call = ask(question, response, seed=seed, think=think, checklist=checklist, style=style)
    extra = {
        "nonce": call.nonce,
        "label": case.label,
        "index": case.index,
        "check": case.check,
    }
    return Problem(id, call.prompt, str(case.label), "choice", "judging", extra=extra)


def gold(problem: Problem, style: Style, think: bool) -> str | None:
    """The judgement by rule: the row's `check`, then the label; None where the row has none and
    thinking is asked for."""
    nonce, label = problem.extra["nonce"], problem.extra["label"]
    end = verdict_text(label, nonce, style)
    if not think:
        return end
    check = problem.extra["check"]
    if check is None:
        return None
    text = f"{check}{end}" if style == "compact" else f"{check}\n{end}"
    return text if read(text, nonce, style) == label else None
