"""Knights and Knaves in single characters: rendering, worlds, answers, and the paid letter."""

import itertools
import re

import pytest

from reasonrl.records import InputError, Problem
from reasonrl.tasks import knights_logic as logic
from reasonrl.tasks import make_task
from reasonrl.tasks.knights import solve
from reasonrl.tasks.knights_compact import prompt_text

# S: T lies and U does not. T: S is no knight. U: S lies, or T does not.
TOLD = (
    ("and", ("lying", 1), ("telling-truth", 2)),
    ("not", ("telling-truth", 0)),
    ("or", ("lying", 0), ("telling-truth", 1)),
)
SOLUTION = (False, True, True)
GOLD = "STU>stU;STu>stU;StU>Stu;Stu>stu;sTU>sTU#sTU"


def fixed(name="knights_compact"):
    extra = {"names": tuple("STU"), "solution": SOLUTION, "statements": TOLD, "flipped": False}
    return make_task(name), Problem("x", "", "sTU", "text", name, extra=extra)


def test_a_puzzle_by_hand():
    assert solve(TOLD) == SOLUTION
    assert prompt_text(TOLD) == "S:t&U;T:~S;U:s|T?"
    task, problem = fixed()
    assert task.worked(problem) == GOLD
    nested = ("not", ("implies", ("lying", 0), ("not", ("lying", 1))))
    assert prompt_text((nested, ("iff", ("lying", 0), nested))) == "S:~(s>(~t));T:s=(~(s>(~t)))?"


@pytest.mark.parametrize("name", ["knights_compact", "knights_marks"])
@pytest.mark.parametrize("people", [2, 3, 4])
def test_worked_completions_are_right_and_readable(name, people):
    task = make_task(name, people=people)
    prompts = set()
    for problem in task.problems("train", 0, 60):
        text = task.worked(problem)
        steps = task.steps(problem, text)
        assert task.verdicts([problem], [text])[0].value == 1.0
        assert {s.reward for s in steps} == {1.0} and task.prefix_correct(problem, text) == 1.0
        assert steps[0].start == 0 and steps[-1].end == len(text)
        assert all(a.end == b.start for a, b in itertools.pairwise(steps))
        assert set(problem.prompt) | set(text) <= set(task.alphabet)
        assert solve(problem.extra["statements"]) == problem.extra["solution"]
        assert text.endswith(f"#{problem.answer}") and task.thinking(problem, text) in text
        prompts.add(problem.prompt)
    assert len(prompts) > 45


def test_only_the_true_roles_behind_one_mark_are_right():
    task, problem = fixed()
    texts = [GOLD, "#sTU", "#STU", "#sT", "#sTUV", "#sTu#sTU", "sTU", "#tSU", "#", "", "#sTU "]
    assert [task.grade(problem, text).value for text in texts] == [1.0, 1.0] + [0.0] * 9
    assert task.reward_spec().grade(GOLD, problem) == 1.0


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("", "", [1, 1, 1, 1, 1, 1]),
        ("STu>stU", "STu>sTU", [1, 0, 1, 1, 1, 1]),  # one speaker wrong
        ("STU>stU;", "", [0, 1, 1, 1, 1]),  # a world is missing
        ("Stu>stu;", "Stu>Stu;", [1, 1, 1, 0, 0, 1]),  # "a solution", and it goes on
        ("Stu>stu;", "stu;", [1, 1, 1, 0, 0, 1]),  # not a world and its speakers
        (";sTU>sTU", "", [1, 1, 1, 1, 0]),  # an answer out of nowhere
        ("#sTU", "#STU", [1, 1, 1, 1, 1, 0]),
        ("#sTU", "", [1, 1, 1, 1, 1]),
        ("sTU>sTU#", "sTU>sTU;stU>sTU#", [1, 1, 1, 1, 1, 0, 0]),  # beyond the solution
    ],
)
def test_worlds_are_checked_against_what_was_written(old, new, expected):
    task, problem = fixed()
    assert [s.reward for s in task.steps(problem, GOLD.replace(old, new, 1))] == expected


def test_held_out_puzzles_are_not_trained_on():
    task = make_task("knights_compact")
    held = {logic.identity(p.extra["statements"]) for p in task.problems("test", 0, 500)}
    seen = {
        logic.identity(task.problem(s, i).extra["statements"])
        for s in ("sft", "train")
        for i in range(300)
    }
    assert len(held) == 500 and not held & seen


def test_only_the_connectives_asked_for_are_used():
    for joins in ("&|", "=", "&|>="):
        task = make_task("knights_marks", joins=joins)
        used = {c for p in task.problems("train", 0, 80) for c in p.prompt if c in "&|>="}
        assert used == set(joins)


def test_the_reward_behind_the_paid_letter_by_hand():
    task, problem = fixed("knights_marks")
    cases = {"p" + GOLD: 3.0, "p#sTU": 3.0, "p#STU": -0.5, "p" + GOLD[:-1]: -1.0, "p": -1.0}
    cases |= {"a" + GOLD: -3.0, GOLD: -3.0, "": -3.0, "pp#sTU": 3.0}
    assert {text: task.grade(problem, text).value for text in cases} == cases
    assert set(cases.values()) == set(task.reward_spec().totals())
    right = [s.value for s in task.verdicts([problem] * 4, ["a" + GOLD, GOLD, "z" + GOLD, "b#STU"])]
    assert right == [1.0, 0.0, 0.0, 0.0]
    assert [s.reward for s in task.steps(problem, "p" + GOLD)] == [1.0] * 6


def test_a_lesson_does_what_it_is_told_and_names_other_letters():
    task = make_task("knights_marks", reading=150)
    spec = task.reward_spec()
    texts = {spec.render(detail, short=True)[1:]: detail for detail in ("full", "adverse")}
    texts |= {spec.render(detail, short=True): detail for detail in ("score", "correctness_only")}
    kinds: dict[str, int] = {}
    letters = set()
    for index, problem in enumerate(task.problems("sft", 0, 700)):
        worked, first = task.worked(problem), index < 150
        right = task.verdicts([problem], [worked])[0].value == 1.0
        assert len(problem.extra["names"]) == (2 if first else 3)
        shape = r"[a-p]#[STst]{2}" if first else r"[a-p][STUstu>;]+#[STUstu]{3}"
        assert re.fullmatch(shape, worked)
        kind = "none"
        if not isinstance(problem.prompt, str):
            text = problem.prompt[0]["content"]
            kind = texts.get(text) or texts[text[1:]]
            if kind in ("full", "adverse"):
                assert (text[0] == worked[0]) == (kind == "full")
                letters.add(text[0])
        assert right == (kind != "adverse") and (kind in ("full", "adverse") or not first)
        kinds[kind] = kinds.get(kind, 0) + 1
    assert len(kinds) == 5 and min(kinds.values()) > 40
    assert letters == set(task.marks)
    assert all(isinstance(p.prompt, str) for p in task.problems("train", 0, 40))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("knights_compact", {"reward": "gated"}, "reward: expected binary, there are no tags"),
        ("knights_compact", {"joins": ""}, "joins: expected some of & [|] > =, got ''"),
        ("knights_compact", {"joins": "&!"}, "joins: expected some of & [|] > =, got '&!'"),
        ("knights_compact", {"people": 9}, "people: expected 2 to 8, got 9"),
        ("knights_marks", {"paid": "z"}, "paid: expected one of marks, got 'z'"),
        ("knights_marks", {"reward": "sum"}, "reward: expected binary"),
        ("knights_marks", {"reading": -1}, "reading: expected 0 or more, got -1"),
        ("knights_marks", {"people": 1}, "people: expected 2 to 8, got 1"),
    ],
)
def test_bad_options_are_named(name, options, message):
    with pytest.raises(InputError, match=f"task {name}: {message}"):
        make_task(name, **options)
