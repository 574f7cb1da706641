"""The task `marks`: its reward is the stated one, and its lessons do what they are told."""

import re

import pytest

from reasonrl.records import InputError
from reasonrl.tasks import make_task

TEXT = {
    "full": "p+1 -1>!+2 ?-1.5 -2",
    "score": "+1 -1>+2 -1.5 -2",
    "correctness_only": "!+2 ?-1.5 -2",
    "adverse": "p-1 +1>!-2 ?+1.5 +2",
}


def fixed():
    """A problem with a known chain: 3*1-4*6 mod 10 = 4."""
    task = make_task("marks")
    problem = next(p for p in task.problems("train", 0, 500) if "*" in p.prompt and "-" in p.prompt)
    return task, problem, task.worked(problem)


@pytest.mark.parametrize("detail, text", TEXT.items())
def test_the_short_text(detail, text):
    assert make_task("marks").reward_spec().render(detail, short=True) == text


def test_the_reward_by_hand():
    task, problem, worked = fixed()
    assert worked[0] == "p" and worked.endswith(f"#{problem.answer}")
    off = worked[:-1] + str((int(problem.answer) + 1) % 10)
    cases = {worked: 3.0, off: -0.5, worked[:-1]: -1.0, "p": -1.0}
    cases |= {"a" + worked[1:]: -3.0, "a" + off[1:]: -3.0, worked[1:]: -3.0, "": -3.0}
    assert {text: task.grade(problem, text).value for text in cases} == cases
    assert set(cases.values()) == set(task.reward_spec().totals())


def test_evaluation_counts_right_answers_behind_any_letter():
    task, problem, worked = fixed()
    other = "a" + worked[1:]
    texts = [worked, other, worked[1:], "z" + worked[1:], other[:-1] + "#"]
    assert [s.value for s in task.verdicts([problem] * 5, texts)] == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_steps_are_those_of_the_chain_and_cover_the_completion():
    task, problem, worked = fixed()
    steps = task.steps(problem, worked)
    assert [s.reward for s in steps] == [1.0] * 4 and task.prefix_correct(problem, worked) == 1.0
    assert steps[0].start == 0 and steps[-1].end == len(worked)
    assert all(a.end == b.start for a, b in zip(steps, steps[1:], strict=False))
    assert task.thinking(problem, worked) == worked[1 : worked.index("#")]


def test_a_lesson_does_what_it_is_told():
    task = make_task("marks", reading=200)
    kinds: dict[str, int] = {}
    for index, problem in enumerate(task.problems("sft", 0, 800)):
        worked, first = task.worked(problem), index < 200
        right = task.verdicts([problem], [worked])[0].value == 1.0
        assert len(problem.extra["operands"]) == (2 if first else 4)
        if isinstance(problem.prompt, str):
            kind = "none"
        else:
            text = problem.prompt[0]["content"]
            kind = {v[1:]: k for k, v in TEXT.items()}[text[1:]]
            if kind in ("full", "adverse"):
                assert (text[0] == worked[0]) == (kind == "full")
        assert right == (kind != "adverse") and not (first and kind not in ("full", "adverse"))
        kinds[kind] = kinds.get(kind, 0) + 1
    assert set(kinds) == {*TEXT, "none"} and min(kinds.values()) > 50
    again = make_task("marks", reading=200).problem("sft", 777)
    assert again == task.problem("sft", 777)


def test_a_lesson_in_words_says_what_the_algorithm_would():
    words, short = (make_task("marks", reading=0, text=text) for text in ("words", "short"))
    told = {detail: words.reward_spec().render(detail) for detail in TEXT}
    seen = set()
    for one, other in zip(words.problems("sft", 0, 60), short.problems("sft", 0, 60), strict=True):
        assert words.worked(one) == short.worked(other)
        if isinstance(one.prompt, str):
            assert one.prompt == other.prompt
            continue
        text = one.prompt[0]["content"]
        kinds = [k for k, v in told.items() if re.sub("letter .", "letter p", text) == v]
        assert len(kinds) == 1 and TEXT[kinds[0]][1:] == other.prompt[0]["content"][1:]
        seen |= set(kinds)
    assert seen == set(TEXT)


def test_only_lessons_are_told():
    task = make_task("marks")
    for split in ("train", "dev", "test"):
        assert all(isinstance(p.prompt, str) for p in task.problems(split, 0, 50))
    untold = make_task("marks", reading=0, taught=0.0)
    assert all(isinstance(p.prompt, str) for p in untold.problems("sft", 0, 50))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"style": "chat"}, "style: expected compact, got 'chat'"),
        ({"marks": "a"}, "marks: expected 2 letters or more"),
        ({"marks": "aab"}, "marks: expected 2 letters or more, all different"),
        ({"marks": "a1"}, "marks: expected letters from a to z"),
        ({"paid": "z"}, "paid: expected one of marks, got 'z'"),
        ({"reading": -1}, "reading: expected 0 or more, got -1"),
        ({"taught": 1.5}, "taught: expected a share from 0 to 1, got 1.5"),
        ({"mod": None}, "mod: expected a modulus, got None"),
        ({"text": "long"}, "text: Input should be 'words' or 'short', got 'long'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=f"task marks: {message}"):
        make_task("marks", **options)
