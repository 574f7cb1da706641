"""The final answer that a completion states, as text: what graders compare and votes count.

Only what stands after a closed </think> is read. In this order: the last <answer> span (and a box
in it), the last closed \\boxed{...}, the last "#### ..." line. Linear in the text; nothing is
parsed or evaluated here.
"""

from __future__ import annotations

import re

from reasonrl.segment import answer_span

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?(?:/\d+)?")
BRACES = re.compile(r"\\boxed\{|\\.|[{}]", re.DOTALL)
MARKER = re.compile(r"####[ \t]*(\S[^\n]*)")


def final_answer(completion: str) -> str | None:
    """The answer stated by one of the marks above, stripped, or None; an empty mark is no
    answer."""
    text = completion.rpartition("</think>")[2]
    span = answer_span(text)
    if span is not None:
        inside = text[slice(*span)]
        return boxed(inside) or inside.strip() or None
    if (box := boxed(text)) is not None:
        return box or None
    marked = MARKER.findall(text)
    return marked[-1].strip() if marked else None


def boxed(text: str) -> str | None:
    """What stands in the last \\boxed{...} whose braces close, stripped, or None."""
    open_braces: list[int] = []  # where a box's content starts, -1 for any other brace
    best = (-1, -1)
    for token in BRACES.finditer(text):
        if token[0] == "}":
            if open_braces:
                best = max(best, (open_braces.pop(), token.start()))
        elif token[0][-1] == "{" and token[0] != "\\{":
            open_braces.append(token.end() if len(token[0]) > 1 else -1)
    return text[slice(*best)].strip() if best[0] >= 0 else None


def ballot(completion: str) -> str | None:
    """The answer as a vote counts it: the stated one, else the last number, else the last line."""
    stated = final_answer(completion)
    if stated is None:
        text = completion.rpartition("</think>")[2]
        numbers = NUMBER.findall(text)
        lines = [line for line in text.splitlines() if line.strip()]
        stated = numbers[-1] if numbers else lines[-1] if lines else ""
    plain = stated.strip().strip("$").strip().rstrip(".").casefold()
    if NUMBER.fullmatch(plain):
        plain = plain.replace(",", "").lstrip("+")
    return "".join(plain.split()) or None
