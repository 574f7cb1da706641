"""RewardSpec: text and number come from one object; lies are refused when it is built."""

import re

import pytest

from reasonrl.records import InputError
from reasonrl.reward_spec import Case, Part, RewardSpec


def long(completion, problem):
    return len(completion) > 3


def has_a(completion, problem):
    return "a" in completion


FORMAT = Part("format", (Case(1.0, "it is long", long), Case(-1.0)))
ANSWER = (Case(2.0, "it has the letter", has_a), Case(-2.0))
GATED = RewardSpec((FORMAT, Part("answer", ANSWER, "format", -3.0)))
PLAIN = RewardSpec((FORMAT, Part("answer", ANSWER)))


def numbers(text):
    return [float(n) for n in re.findall(r"[-+]?\d+(?:\.\d+)?", text)]


@pytest.mark.parametrize(
    "completion, gated, plain", [("aaaa", 3, 3), ("bbbb", -1, -1), ("a", -4, 1), ("b", -4, -3)]
)
def test_totals_of_gate_and_sum(completion, gated, plain):
    assert GATED.grade(completion, None) == gated and PLAIN.grade(completion, None) == plain
    assert sum(GATED.part_values(completion, None).values()) == gated


def test_reachable_totals_are_listed_once_from_the_top():
    assert GATED.totals() == (3.0, -1.0, -4.0)
    assert PLAIN.totals() == (3.0, 1.0, -1.0, -3.0)
    tenth = Part("a", (Case(0.1, "x", long), Case(0.3)))
    assert RewardSpec((tenth, Part("b", (Case(0.2, "y", has_a), Case(0.0))))).totals() == (
        0.5,
        0.3,
        0.1,
    )


@pytest.mark.parametrize("spec", [GATED, PLAIN])
def test_every_number_in_the_text_is_reachable_and_every_total_is_in_it(spec):
    values = {case.value for part in spec.parts for case in part.cases} | {-3.0}
    for detail in ("full", "score"):
        stated = numbers(spec.render(detail))
        assert set(stated) <= values | set(spec.totals())
        assert set(spec.totals()) <= set(stated)
    listed = numbers(spec.render().rpartition("Possible totals:")[2])
    assert listed == list(spec.totals())


def test_the_four_details():
    full, score = GATED.render(), GATED.render("score")
    half, adverse = GATED.render("correctness_only"), GATED.render("adverse")
    assert full.splitlines() == [
        "How your answer is scored:",
        "Format:",
        "* +1 if it is long",
        "* -1 otherwise",
        "Answer:",
        "* -3 unless the best score for format was reached; if it was:",
        "* +2 if it has the letter",
        "* -2 otherwise",
        "The total is the sum of the parts. Possible totals: 3, -1, -4.",
    ]
    assert "it is long" not in score and "letter" not in score and numbers(score)
    assert numbers(half) == [2.0, -2.0] and "long" not in half
    assert numbers(adverse) == [-n for n in numbers(full)]
    assert re.sub(r"[-+]?\d+(\.\d+)?", "", adverse) == re.sub(r"[-+]?\d+(\.\d+)?", "", full)
    with pytest.raises(InputError, match="detail: expected full, score, .*, got 'short'"):
        GATED.render("short")


def part(*cases, name="p", gate=None, closed=None):
    return Part(name, cases, gate, closed)


@pytest.mark.parametrize(
    "parts, message",
    [
        ((), "at least one part"),
        ((part(Case(1.0, "x", long)),), "last case must hold in every other case"),
        ((part(),), "last case must hold"),
        ((part(Case(1.0), Case(2.0, "rest")),), "no case can be reached behind 'otherwise'"),
        ((part(Case(float("nan"))),), "expected a finite value, got nan"),
        ((part(Case(1.0, "more than 5 words", long), Case(0.0)),), "without digits"),
        ((part(Case(1.0), name="part 2"),), "name in words without digits"),
        ((FORMAT, FORMAT), "part names must differ, got format, format"),
        ((part(Case(1.0), gate="format", closed=0.0), FORMAT), "gate 'format' is no earlier part"),
        ((part(Case(1.0), gate="p", closed=0.0),), "gate 'p' is no earlier part"),
        ((FORMAT, part(Case(1.0), gate="format")), "come together or not at all"),
        ((FORMAT, part(Case(1.0), closed=1.0)), "come together or not at all"),
        ((FORMAT, part(Case(1.0), gate="format", closed=float("inf"))), "finite closed value"),
        (
            (FORMAT, part(Case(5.0, "it is long", long), Case(0.0))),
            r"'it is long' has two values: \+1 in part 'format' and \+5 in part 'p'",
        ),
        (
            (part(Case(1.0, "it is long", long), Case(2.0, "it is long", has_a), Case(0.0)),),
            "'it is long' has two values",
        ),
    ],
)
def test_specs_that_would_lie_are_refused_when_built(parts, message):
    with pytest.raises(InputError, match=message):
        RewardSpec(tuple(parts))


def test_an_unknown_main_part_and_a_number_in_the_title_are_refused():
    with pytest.raises(InputError, match="main: expected one of"):
        RewardSpec((FORMAT,), main="answer")
    with pytest.raises(InputError, match="title states a number"):
        RewardSpec((FORMAT,), title="The 5 rules")


def test_the_short_text_is_one_line_of_the_same_numbers():
    shape = Part("format", (Case(1.0, "it is long", long, "L"), Case(-1.0)))
    answer = (Case(2.0, "it has the letter", has_a, "A"), Case(-2.0))
    gated = RewardSpec((shape, Part("answer", answer, "format", -3.0)))
    assert gated.render(short=True) == "L+1 -1>A+2 -2"
    assert gated.render("adverse", short=True) == "L-1 +1>A-2 +2"
    assert gated.render("score", short=True) == "+1 -1>+2 -2"
    assert gated.render("correctness_only", short=True) == "A+2 -2"
    assert RewardSpec((shape, Part("answer", answer))).render(short=True) == "L+1 -1;A+2 -2"
    with pytest.raises(InputError, match="part 'format': 'it is long' has no short form"):
        GATED.render(short=True)
    with pytest.raises(InputError, match="words without digits"):
        RewardSpec((Part("a", (Case(1.0, "x", long, "L2"), Case(0.0))),))
