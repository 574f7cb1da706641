"""A completion of the charts task gone through step by step (what counts as right: charts.py)."""

from __future__ import annotations

import re
from collections.abc import Mapping

from reasonrl.tasks.charts_words import NAMES, Link, Question, answer, apply, links, operands

NUMBER = r"(-?(?:0|[1-9][0-9]{0,5}))"
READING = re.compile(rf"([a-z]){NUMBER}")
LINK = re.compile(rf"{NUMBER}([+*-]){NUMBER}={NUMBER}")
CHAT_READING = re.compile(rf"([a-z]+): {NUMBER}")
CHAT_LINK = re.compile(rf"{NUMBER} ([+*-]) {NUMBER} = {NUMBER}")
ANSWER = re.compile(r"<answer>([^<>]*)</answer>")
LETTERS = {name: letter for letter, name in NAMES.items()}


class Walk:
    """A completion gone through step by step, against the picture and what it wrote itself."""

    def __init__(self, question: Question, shown: Mapping[str, int], chat: bool):
        self.question, self.shown, self.chat = question, shown, chat
        self.values: dict[str, int] = {}  # of what is needed, as written, in the order of writing
        self.results: list[int] = []
        self.ended = False

    def right(self, step: str) -> bool:
        """Whether the next step is right."""
        text = step.replace("<think>", "", 1).replace("</think>", "", 1).strip()
        if self.ended:
            return False
        if (said := self._said(text)) is not None:
            self.ended = True
            return self._ready() and len(self.results) == len(self._links()) and said == self._due()
        text = text if self.chat else step.rstrip(";")
        if match := (CHAT_READING if self.chat else READING).fullmatch(text):
            return self._read(LETTERS.get(match[1], "") if self.chat else match[1], int(match[2]))
        match = (CHAT_LINK if self.chat else LINK).fullmatch(text)
        return match is not None and self._calculate(*match.groups())

    def mended(self, step: str) -> str:
        """The step as it should be: what is read off as the picture has it, what is calculated with
        the numbers that it takes; empty for what is neither."""
        text = step.strip() if self.chat else step.rstrip(";")
        if match := (CHAT_READING if self.chat else READING).fullmatch(text):
            letter = LETTERS.get(match[1], "") if self.chat else match[1]
            seen = self.shown.get(letter, match[2])
            return f"{match[1]}: {seen}" if self.chat else f"{match[1]}{seen}"
        if match := (CHAT_LINK if self.chat else LINK).fullmatch(text):
            left, op, right, _ = match.groups()
            found = apply(int(left), op, int(right))
            return f"{left} {op} {right} = {found}" if self.chat else f"{left}{op}{right}={found}"
        return ""

    def _said(self, text: str) -> str | None:
        """The answer that a step gives, or None where it gives none."""
        if not self.chat:
            return text[1:] if text.startswith("#") else None
        match = ANSWER.fullmatch(text)
        return match[1].strip() if match else None

    def _read(self, letter: str, value: int) -> bool:
        if letter not in self.question.letters or letter in self.values:
            return False
        self.values[letter] = value
        return value == self.shown[letter]

    def _ready(self) -> bool:
        return len(self.values) == len(self.question.letters)

    def _links(self) -> list[Link]:
        return links(self.question, self.values)

    def _calculate(self, left: str, op: str, right: str, result: str) -> bool:
        number = len(self.results)
        if not self._ready() or number >= len(self._links()):
            return False
        before = self.results[-1] if self.results else None
        wanted = operands(self._links()[number], before)
        self.results.append(int(result))
        return (int(left), op, int(right), int(result)) == (*wanted, apply(*wanted))

    def _due(self) -> str | None:
        """The answer that follows from what was written."""
        found = answer(self.question, self.values, self.results[-1] if self.results else None)
        return NAMES.get(found, found) if self.chat and found else found
