"""The outcome reward by answer type, as SophiaVL-R1 has it (arXiv 2505.17018 section 3.3).

    numerical   1 where the number is the same (whole numbers exactly, others within 1e-5)
    choice      1 where the set of letters is the same
    ocr         exp(-word error rate) on folded words, in (0, 1]; the paper's "-WER" leaves [0, 1]
    text        "exact": 1 where the folded text is the same; "rouge": the mean F1 of ROUGE-1, -2
                and -L, words stemmed (one word has no pairs: 2/3 at most)
    math        the verifier's verdict (verify.py)

`$` around an answer is no part of it. With `gate` a completion must be <think>...</think> from its
first character, then somewhere <answer>...</answer>, whatever stands behind it; else 0 with that
reason. Wrong is 0; a gold answer that cannot be graded is unscorable. `code` is for a sandboxed
scorer (code.py).
    grade([problem], ["<think>2+2</think><answer>4</answer>"], gate=True)
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal

from reasonrl.answer import final_answer
from reasonrl.answer_forms import NUMBER, folded, parse_choice, parse_number
from reasonrl.records import InputError, Problem, Score, scored, unscorable
from reasonrl.rewards.verify import verify_math

TYPES = ("numerical", "choice", "ocr", "text", "math", "code")
TOLERANCE = 1e-5  # relative, for numbers written as rounded decimals
WORDS = 2000  # of a text that is compared word by word
MEASURES = ("rouge1", "rouge2", "rougeL")
NO_FORMAT = "expected <think>...</think> from the start, then <answer>...</answer>"

Text = Literal["exact", "rouge"]


def grade(
    problems: Sequence[Problem],
    completions: Sequence[str],  # one for each
    *,
    gate: bool = False,
    text: Text = "exact",
) -> list[Score]:
    """The outcomes; maths is verified all at once. InputError: an answer type that nobody knows,
    a package that is not installed."""
    ready({problem.answer_type for problem in problems}, text)
    pairs = list(zip(problems, completions, strict=True))
    out: dict[int, Score] = {}
    maths = []
    for i, (problem, completion) in enumerate(pairs):
        if problem.answer is None:
            out[i] = unscorable("the row has no answer")
        elif problem.answer_type == "code":
            out[i] = unscorable("code answers are graded by a sandboxed scorer, not by the task")
        elif gate and not has_format(completion):
            out[i] = scored(0.0, NO_FORMAT)
        elif problem.answer_type == "math":
            maths.append(i)
        else:
            out[i] = _one(problem.answer, problem.answer_type, completion, text)
    if maths:
        answers = [_bare(pairs[i][0].answer or "") for i in maths]
        out |= zip(maths, verify_math([pairs[i][1] for i in maths], answers), strict=True)
    return [out[i] for i in range(len(pairs))]


def ready(types: Iterable[str], text: Text = "exact") -> None:
    """InputError where one of the answer types cannot be graded here."""
    for kind in types:
        if kind not in TYPES:
            raise InputError(f"answer_type: expected one of {', '.join(TYPES)}, got {kind!r}")
        if kind == "ocr":
            _jiwer()
        elif kind == "text" and text == "rouge":
            _rouge()
    if text not in ("exact", "rouge"):
        raise InputError(f"text: expected exact or rouge, got {text!r}")


def has_format(completion: str) -> bool:
    """Whether thinking stands first, in its tags, and an answer in its own somewhere behind it."""
    if not completion.startswith("<think>"):
        return False
    at = 0
    for tag in ("</think>", "<answer>", "</answer>"):
        at = completion.find(tag, at)
        if at < 0:
            return False
        at += len(tag)
    return True


def _one(gold: str, kind: str, completion: str, text: Text) -> Score:
    """The types that need no verifier."""
    stated = final_answer(completion)
    if stated is None:
        stated = _last_line(completion, kind)
    gold, stated = _bare(gold), _bare(stated)
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
        if not folded(gold):
            return unscorable(f"the gold answer has no words: {gold!r}")
        return scored(math.exp(-word_error_rate(folded(stated), folded(gold))))
    if text == "rouge":
        found = rouge(stated, gold)
        unread = f"the gold answer has no words that ROUGE counts: {gold!r}"
        return unscorable(unread) if found is None else scored(found)
    return scored(float(folded(stated) == folded(gold)))


def word_error_rate(stated: str, gold: str) -> float:
    """Word edits that turn one into the other, over the gold words; the first WORDS of each."""
    one, other = (" ".join(text.split()[:WORDS]) for text in (stated, gold))
    return float(_jiwer().wer(other, one))


def rouge(stated: str, gold: str) -> float | None:
    """Mean F1 of ROUGE-1, -2 and -L; None where the gold text has no word (ASCII letters and
    digits) to count."""
    one, other = (" ".join(text.split()[:WORDS]) for text in (stated, gold))
    if not any(c.isascii() and c.isalnum() for c in other):
        return None
    found = _rouge().score(other, one)
    return sum(found[name].fmeasure for name in MEASURES) / len(MEASURES)


def _bare(answer: str) -> str:
    return answer.strip().strip("$").strip()


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


def _jiwer():
    try:
        import jiwer  # optional
    except ImportError:
        raise _missing("ocr", "jiwer") from None
    return jiwer


@cache
def _rouge():
    try:
        from rouge_score.rouge_scorer import RougeScorer  # optional
    except ImportError:
        raise _missing("text (rouge)", "rouge-score") from None
    return RougeScorer(list(MEASURES), use_stemmer=True)


def _missing(kind: str, package: str) -> InputError:
    return InputError(
        f"answer_type {kind}: the package {package} is not installed (pip install reasonrl[vision])"
    )
