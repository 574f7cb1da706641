"""The process that reads mathematics written by a model: parse two answers, say whether they are
equal.

Run by path, never imported (`verify.py` starts and kills it). One JSON object a line: a task comes
on standard input, a verdict with the task's id goes out on a copy of standard output that parsed
text cannot reach. Everything that interprets text (math-verify, sympy) is imported here and nowhere
else. Its own timer, which uses a signal, is off: the owner kills by process group, and CPU and
memory limits stand behind that.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys

WORD = re.compile(r"(?:\\text\{\s*)?([A-Za-z][A-Za-z ]{3,}?)\s*\}?")
POWER_OF_TEN = re.compile(r"([-+]?\d+(?:\.\d+)?)[eE]([-+]?\d+)")
PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}|\n")
SIGNS = str.maketrans(
    {"∞": r"\infty ", "π": r"\pi ", "−": "-", "≤": r"\le ", "≥": r"\ge ", "×": r"\times "}
)


def main() -> None:
    sys.path[0] = os.path.dirname(sys.path[0])  # for this one import
    from _limits import cpu_limit, limits  # pyright: ignore[reportMissingImports]

    sys.path.pop(0)  # its modules must not shadow others
    memory = int(sys.argv[1])
    verdicts = os.fdopen(os.dup(1), "w", encoding="utf-8")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    limits(memory)
    logging.disable(logging.CRITICAL)
    from math_verify import parse, verify  # noqa: F401, paid for before the first task

    print(json.dumps({"ready": True}), file=verdicts, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        cpu_limit(task["timeout"])
        print(json.dumps(verdict(task)), file=verdicts, flush=True)


def verdict(task: dict) -> dict:
    """{"id", "kind"}: equal, different, no answer (in free text), unread answer, or no gold."""
    gold = read(task["gold"])
    if not gold:
        return {"id": task["id"], "kind": "no gold"}
    if plain(task["pred"]).casefold() == plain(task["gold"]).casefold():
        return {"id": task["id"], "kind": "equal"}
    readings = [read(task["pred"])] if not task["free"] or bare(task["pred"]) else []
    readings += [read_text(task["pred"])] if task["free"] else []
    readings = [found for found in readings if found]
    if not readings:
        return {"id": task["id"], "kind": "no answer" if task["free"] else "unread answer"}
    words = [WORD.fullmatch(x.strip()) for x in (task["gold"], task["pred"])]
    if words[0] is not None:  # letters are not a product of variables
        said = words[1][1].casefold() if words[1] is not None else None
        return {
            "id": task["id"],
            "kind": "equal" if said == words[0][1].casefold() else "different",
        }
    from math_verify import verify

    same = any(verify(gold, found, timeout_seconds=None) for found in readings)
    return {"id": task["id"], "kind": "equal" if same else "different"}


def bare(text: str) -> bool:
    """Whether a completion without any mark is nothing but an expression."""
    return len(text) <= 256 and "$" not in text and PROSE.search(text) is None


def plain(answer: str) -> str:
    return "".join(answer.strip().strip("$").rstrip(".").split())


def read(answer: str) -> list:
    """A bare answer, LaTeX without delimiters or not, as sympy objects; [] if it does not parse."""
    from math_verify import LatexExtractionConfig, parse

    answer = answer.strip().translate(SIGNS)
    if (power := POWER_OF_TEN.fullmatch(answer)) is not None:
        answer = f"{power[1]} \\cdot 10^{{{power[2]}}}"
    config = [LatexExtractionConfig(boxed_match_priority=0)]
    text = f"\\boxed{{{answer}}}"
    return parse(text, config, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]


def read_text(completion: str) -> list:
    """The answer in free text, by math-verify's own search."""
    from math_verify import parse

    return parse(completion, fallback_mode="no_fallback", parsing_timeout=None)  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
