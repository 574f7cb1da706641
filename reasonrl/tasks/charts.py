"""Pictures with questions: what was read off a picture, and what was made of it, checked by rule.

    compact   sum:        r3;g7;b2;3+7=10;10+2=12#12        (for character-level models)
    chat      <think>red: 3 / green: 7 / blue: 2 / 3 + 7 = 10 / 10 + 2 = 12</think>
              <answer>12</answer>                           (one line a step)

    kind      picture                        questions
    bars      a bar a colour                 r: value  max: min: sum: of all  r-g: difference
    count     shapes in cells                r: how many  sum: in all  r-g: how many more
    compare   shapes in cells                r?g: the colour of which there are more
    box       a rectangle on a grid          per: perimeter  area: both in cells

A reading is right when the picture says so, the question needs it and it was not given before; in
any order. A calculation is right when it takes the values *written* before, in the order in which
they were written, and is true, so one misread bar costs one step. The answer is right as a step
when it follows from what was written. The outcome is another question: the one answer, in its
format, must be the true one, however it was reached; a right answer behind a wrong step is `lucky`.
The split is decided by the numbers shown and the question, not by where they stand.

    task = make_task("charts", style="compact"); p = task.problem("train", 0); p.images[0].draw()
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from reasonrl.records import InputError, Problem, Score, Step, scored
from reasonrl.segment import split_steps, think_span
from reasonrl.tasks.base import Draws, GeneratedTask, leading_share
from reasonrl.tasks.charts_check import Walk
from reasonrl.tasks.charts_draw import CELLS, COLOURS, bars, box, scatter
from reasonrl.tasks.charts_words import (
    ASKED,
    NAMES,
    Question,
    answer,
    apply,
    links,
    operands,
    question_text,
)

VALUE = re.compile(r"-?(?:0|[1-9][0-9]{0,5})|[a-z]{1,10}")
FORMAT = re.compile(
    r"<think>((?:(?!</?(?:think|answer)>).)*)</think>\s*<answer>([^<>]*)</answer>\s*", re.S
)


@dataclass(frozen=True)
class Charts(GeneratedTask):
    """kinds: names from the table above, with commas between; box has few problems and is left to
    be asked for. size: pixels a side, a multiple of 8.
    colours: how many stand in a picture. high: the largest bar, count or side."""

    name: ClassVar[str] = "charts"
    kinds: str = "bars,count,compare"
    size: int = 64
    colours: int = 3
    high: int = 5
    style: Literal["chat", "compact"] = "chat"

    def __post_init__(self) -> None:
        known = all(kind in ASKED for kind in self._kinds)
        fits = 16 <= self.size <= 4096 and self.size % CELLS == 0
        rules = [
            ("kinds", known and self._kinds, f"some of {', '.join(ASKED)}", self.kinds),
            ("size", fits, "a multiple of 8 in 16 to 4096", self.size),
            ("colours", 2 <= self.colours <= 4, "2 to 4", self.colours),
            ("high", 2 <= self.high <= CELLS, "2 to 8", self.high),
            ("style", self.style in ("chat", "compact"), "chat or compact", self.style),
        ]
        for knob, holds, expected, got in rules:
            if not holds:
                raise InputError(f"task charts: {knob}: expected {expected}, got {got!r}")

    @property
    def _kinds(self) -> list[str]:
        return [kind for part in self.kinds.split(",") if (kind := part.strip())]

    @property
    def alphabet(self) -> str:
        if self.style == "chat":
            return super().alphabet
        return "".join(sorted(set("0123456789+-*=;#:?wh" + "maxminsumperarea" + self._palette)))

    @property
    def delimiter(self) -> str:
        return ";" if self.style == "compact" else "\n"

    @property
    def _palette(self) -> str:
        return "".join(COLOURS)[: self.colours]

    def candidate(self, draws: Draws, id: str) -> tuple[str, Problem]:
        kind = draws.choice(self._kinds)
        ask = draws.choice(ASKED[kind])
        letters = "wh" if kind == "box" else self._palette
        count = {"value": 1, "minus": 2, "more": 2}.get(ask, 0)
        named = tuple(sorted(draws.shuffled(letters)[:count], key=letters.index))
        shown = {letter: draws.between(1, self.high) for letter in letters}
        while ask == "more" and shown[named[0]] == shown[named[1]]:
            shown[named[1]] = draws.between(1, self.high)
        if ask == "minus":  # the larger number first
            named = tuple(sorted(named, key=lambda letter: -shown[letter]))
        question = Question(ask, named or tuple(letters))
        if kind == "box":
            picture = box(shown["w"], shown["h"], self._palette, self.size, draws)
        else:
            picture = (bars if kind == "bars" else scatter)(shown, self.size, draws)
        content = f"{kind} {shown} {ask} {''.join(question.letters)}"
        extra = {"kind": kind, "shown": shown, "ask": ask, "letters": question.letters}
        gold = self._say(self._worked(question, shown)[1])
        answer_type = "text" if ask == "more" else "numerical"
        prompt = self._prompt(kind, question)
        return content, Problem(id, prompt, gold, answer_type, self.name, (picture,), extra)

    def _prompt(self, kind: str, question: Question) -> str | list[dict[str, Any]]:
        text = question_text(kind, question, self.style)
        if self.style == "compact":
            return text
        parts = [{"type": "image"}, {"type": "text", "text": text}]
        return [{"role": "user", "content": parts}]

    def _say(self, found: str) -> str:
        """An answer as it is written: colours by name in a chat."""
        return NAMES.get(found, found) if self.style == "chat" else found

    def _worked(self, question: Question, shown: Mapping[str, int]) -> tuple[list[str], str]:
        """The right steps, the answer apart."""
        values = {letter: shown[letter] for letter in question.letters}
        chat, result = self.style == "chat", None
        steps = [f"{NAMES[k]}: {v}" if chat else f"{k}{v}" for k, v in values.items()]
        for link in links(question, values):
            a, op, b = operands(link, result)
            result = apply(a, op, b)
            steps.append(f"{a} {op} {b} = {result}" if chat else f"{a}{op}{b}={result}")
        found = answer(question, values, result)
        assert found is not None
        return steps, found

    def worked(self, problem: Problem) -> str:
        steps, found = self._worked(self._asked(problem), problem.extra["shown"])
        if self.style == "compact":
            return ";".join(steps) + f"#{found}"
        return "<think>" + "\n".join(steps) + f"</think>\n<answer>{self._say(found)}</answer>"

    def _walk(self, problem: Problem) -> Walk:
        return Walk(self._asked(problem), problem.extra["shown"], self.style == "chat")

    def _asked(self, problem: Problem) -> Question:
        return Question(problem.extra["ask"], tuple(problem.extra["letters"]))

    def thinking(self, problem: Problem, completion: str) -> str:
        """What stands between the think tags (compact: before the #); all of it where no answer
        comes, nothing where there are no tags."""
        if self.style == "compact":
            return completion.partition("#")[0]
        span = think_span(completion)
        return "" if span is None else completion[slice(*span)].strip()

    def grade(self, problem: Problem, completion: str) -> Score:
        """1 when there is one well-formed answer in its place and it is true; else 0."""
        if self.style == "compact":
            count, said = completion.count("#"), completion.rpartition("#")[2]
            if count != 1:
                return scored(0.0, f"expected one answer, got {count}")
        else:
            match = FORMAT.fullmatch(completion)
            if match is None:
                return scored(0.0, "expected <think>...</think><answer>...</answer>")
            said = match[2].strip()
        if VALUE.fullmatch(said) is None:
            return scored(0.0, "the answer is not well-formed")
        right = said == problem.answer
        return scored(float(right), "" if right else f"answer {said}, expected {problem.answer}")

    def steps(self, problem: Problem, completion: str) -> list[Step]:
        """One step a line (or a `;` part), the answer the last; what comes behind it gets 0."""
        walk = self._walk(problem)
        return [
            Step(piece.start, piece.end, float(walk.right(completion[piece.start : piece.end])))
            for piece in self._pieces(completion)
        ]

    def review(self, problem: Problem, completion: str) -> str:
        walk = self._walk(problem)
        end = completion.index(thinking := self.thinking(problem, completion)) + len(thinking)
        marks = []
        for piece in self._pieces(completion):
            if piece.start < end:
                text = completion[piece.start : piece.end].replace("<think>", "", 1)
                text = text.replace("</think>", "", 1)
                marks.append(walk.mended(text) + ("+" if walk.right(text) else "-"))
        expected = len(self._worked(self._asked(problem), problem.extra["shown"])[0])
        return self.delimiter.join([*marks, *"?" * (expected - len(marks))])

    def lucky(self, problem: Problem, completion: str) -> bool:
        """Whether the answer is right and some step is not."""
        right = self.grade(problem, completion).value == 1.0
        return right and any(step.reward != 1.0 for step in self.steps(problem, completion))

    def prefix_correct(self, problem: Problem, completion: str) -> float:
        """Leading right steps over the steps expected, the answer among them."""
        expected = len(self._worked(self._asked(problem), problem.extra["shown"])[0]) + 1
        return leading_share(self.steps(problem, completion), expected)

    def _pieces(self, text: str) -> Sequence[Step]:
        if self.style == "compact":
            cuts = {0, len(text), *(m.end() for m in re.finditer(";+", text))}
            edges = sorted(cuts | {m.start() for m in re.finditer("#", text)})
            return [Step(a, b) for a, b in zip(edges, edges[1:], strict=False)]
        out: list[Step] = []
        start = 0  # of a line that holds nothing but tags, and goes to the next one
        for piece in split_steps(text, "\n"):
            line = text[piece.start : piece.end].strip()
            if line == "</think>" and out:
                out[-1] = Step(out[-1].start, piece.end)
                start = piece.end
            elif line != "<think>":
                out.append(Step(start, piece.end))
                start = piece.end
        return out
