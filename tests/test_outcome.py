"""Outcome rewards by answer type: values worked out apart, the gate, what is no zero."""

from __future__ import annotations

import itertools
import json
import math
import sys

import pytest

from reasonrl.records import InputError, Problem
from reasonrl.rewards import outcome
from reasonrl.rewards.outcome import grade, has_format, rouge, word_error_rate
from reasonrl.tasks import make_task


def one(kind, gold, completion, **options):
    (score,) = grade([Problem("p", "q", gold, kind)], [completion], **options)
    return score


@pytest.mark.parametrize(
    "kind, gold, stated, value",
    [
        ("numerical", "12", "$12$", 1),
        ("numerical", "$$0.25$$", "25%", 1),
        ("numerical", "12", "12.5", 0),
        ("choice", "$B$", "(b) Paris", 1),
        ("choice", "A, C", "C", 0),
        ("math", "$\\frac{1}{2}$", "$$0.5$$", 1),
        ("math", "2\\sqrt{2}", "\\sqrt{8}", 1),
        ("math", "2", "3", 0),
        ("ocr", "The quick brown fox", "the quack brown", math.exp(-2 / 4)),  # a swap, a loss
        ("ocr", "one two", "zero one two three four", math.exp(-3 / 2)),  # three put in
        ("ocr", "STOP", "go", math.exp(-1)),
        ("ocr", "$5 off", "5 off", 1),
    ],
)
def test_values_by_type(kind, gold, stated, value):
    completion = f"<think>so</think><answer>{stated}</answer>"
    for gate in (False, True):
        score = one(kind, gold, completion, gate=gate)
        assert score.kind == "scored" and score.value == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(
    "gold, stated, value",
    [
        # ROUGE-1: the cat sat, 3 of 4 and of 6: 0.6; -2: 2 of 3 and of 5: 0.5; -L as -1
        ("the cats sat on the mat", "The cat sat down.", (0.6 + 0.5 + 0.6) / 3),
        ("running dogs", "run dog", 1.0),  # stemmed
        ("a b c d", "d c b a", (1.0 + 0.0 + 0.25) / 3),  # the order counts in -2 and -L
        ("Paris", "Paris", 2 / 3),  # one word makes no pair
        ("Paris", "Rome", 0.0),
    ],
)
def test_rouge(gold, stated, value):
    assert rouge(stated, gold) == pytest.approx(value, rel=1e-12)
    score = one("text", gold, f"<answer>{stated}</answer>", text="rouge")
    assert score.value == pytest.approx(value, rel=1e-12)
    assert one("text", gold, f"<answer>{stated}</answer>").value == float(gold == stated)


TEXTS = [list(words) for n in range(4) for words in itertools.product("abc", repeat=n)]


@pytest.mark.parametrize("two", [words for words in TEXTS if words], ids="".join)
def test_the_word_error_rate_is_the_edit_distance(two):
    for one in [*TEXTS, list("abcab"), list("cacbacb")]:
        assert word_error_rate(" ".join(one), " ".join(two)) == edits(one, two) / len(two)


def edits(one, two):
    row = list(range(len(two) + 1))
    for i, word in enumerate(one, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(two, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != other))
    return row[-1]


@pytest.mark.parametrize(
    "completion, holds",
    [
        ("<think>a</think><answer>4</answer>", True),
        ("<think>a</think>\n\nso\n<answer>4</answer> and more", True),
        ("<think></think><answer></answer>", True),
        (" <think>a</think><answer>4</answer>", False),
        ("a</think><answer>4</answer>", False),
        ("<think>a<answer>4</answer>", False),
        ("<think>a</think><answer>4", False),
        ("<think>a<answer>4</answer></think>", False),
        ("<think>a<answer></think>4</answer>", False),
        ("", False),
    ],
)
def test_the_gate(completion, holds):
    assert has_format(completion) == holds
    for kind, gold in [("numerical", "4"), ("choice", "D"), ("ocr", "4"), ("math", "4")]:
        score = one(kind, gold, completion, gate=True)
        assert score.kind == "scored"
        if not holds:
            assert score.value == 0.0 and score.reason == outcome.NO_FORMAT
    if holds:
        good = completion.replace("<answer></answer>", "<answer>4</answer>")
        assert one("numerical", "4", good, gate=True).value == 1.0


def test_the_gate_does_not_lend_an_answer_from_the_thinking():
    for completion in (
        "<think>a</think><answer>4</answer><think>b</think>",
        "<think>a</think><answer>4</answer></think><answer>5</answer>",
    ):
        assert has_format(completion)
        assert one("numerical", "4", completion, gate=True).value == 0.0


def test_what_cannot_be_graded_is_no_zero():
    for kind, gold, options in [
        ("numerical", "many", {}),
        ("choice", "yes", {}),
        ("ocr", "$ . $", {}),
        ("text", "\u5317\u4eac", {"text": "rouge"}),  # no word that ROUGE sees
        ("code", "print(1)", {}),
        ("math", "?!?", {}),
        ("text", None, {}),
    ]:
        score = one(kind, gold, "<answer>x</answer>", **options)
        assert score.kind == "unscorable" and score.value is None and score.reason
    assert one("text", "\u5317\u4eac", "<answer>\u5317\u4eac</answer>").value == 1.0


def test_order_is_kept_and_unknown_types_are_named():
    problems = [
        Problem("a", "q", "1", "math"),
        Problem("b", "q", "B", "choice"),
        Problem("c", "q", "\\frac{3}{1}", "math"),
    ]
    found = grade(problems, [f"<answer>{x}</answer>" for x in ("2", "B", "3")])
    assert [score.value for score in found] == [0.0, 1.0, 1.0]
    with pytest.raises(InputError, match="answer_type: expected one of numerical.*'regression'"):
        one("regression", "1", "1")
    with pytest.raises(InputError, match="text: expected exact or rouge, got 'bleu'"):
        one("text", "1", "1", text="bleu")


def test_a_missing_package_is_named_before_anything_is_graded(tmp_path, monkeypatch):
    path = tmp_path / "d.jsonl"
    row = {"prompt": "q", "answer": "a b"}
    path.write_text(json.dumps(row | {"answer_type": "ocr"}) + "\n" + json.dumps(row) + "\n")
    assert make_task(str(path), text="rouge").text == "rouge"
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    outcome._rouge.cache_clear()
    with pytest.raises(InputError, match="the package rouge-score is not installed"):
        make_task(str(path), text="rouge")
    monkeypatch.setitem(sys.modules, "jiwer", None)
    with pytest.raises(InputError, match="answer_type ocr: the package jiwer is not installed"):
        make_task(str(path))


def test_a_data_file_takes_gate_and_text(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps({"prompt": "q", "answer": "the cats sat on the mat"}) + "\n")
    bare, full = "<answer>the cat sat down</answer>", "<think>x</think><answer>a mat</answer>"
    strict = make_task(str(path), gate=True, text="rouge")
    problem = strict.problem("train", 0)
    assert [s.value for s in strict.grades([problem] * 2, [bare, full])] == [
        0.0,
        pytest.approx((2 * (1 / 2) * (1 / 6) / (1 / 2 + 1 / 6)) * 2 / 3),
    ]
    plain = make_task(str(path), text="rouge")
    assert plain.grade(problem, bare).value == pytest.approx(1.7 / 3)
