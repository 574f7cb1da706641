"""The task `guesses`: a guess counts as a step, and the cold start has the habit it says."""

import pytest

from reasonrl.records import InputError
from reasonrl.tasks import make_task


def fixed():
    """3*1-4+2 mod 5: 3, 4, 1."""
    task = make_task("guesses")
    problem = task.problem("train", 0)
    extra = dict(problem.extra) | {"operands": (3, 1, 4, 2), "ops": ("*", "-", "+")}
    return task, type(problem)(**(vars(problem) | {"extra": extra, "answer": "1"}))


def test_a_right_guess_is_right():
    task, problem = fixed()
    rows = {
        "3*1=3;3-4=4;4+2=1#1": (1.0, [1, 1, 1, 1]),
        "3*1?3;3-4=4;4+2?1#1": (1.0, [1, 1, 1, 1]),
        "3*1?2;2-4=3;3+2=0#0": (0.0, [0, 1, 1, 1]),  # one slip costs one step
        "3*1?2;2-4?4;4+2=1#1": (1.0, [0, 0, 1, 1]),  # lucky
        "3*1?3;3-4=4;4+2?1#?": (0.0, [1, 1, 1, 0]),
        "": (0.0, []),
    }
    for text, (outcome, steps) in rows.items():
        assert task.grade(problem, text).value == outcome, text
        assert [s.reward for s in task.steps(problem, text)] == steps, text
    assert task.worked(problem) == "3*1=3;3-4=4;4+2=1#1"
    assert task.thinking(problem, "3*1?3;3-4=4#1") == "3*1?3;3-4=4"


def test_the_habit_of_the_cold_start():
    task = make_task("guesses", lessons=100)
    seen = {0: [], 1: []}
    for index in range(4000):
        problem = task.problem("sft", index)
        text = task.worked(problem)
        assert set(text + problem.prompt) <= set(task.alphabet)
        if index < 100:
            assert "?" not in text and task.grade(problem, text).value == 1.0
            continue
        steps = task.steps(problem, text)
        signs = [c for c in text if c in "=?"]
        assert len(signs) == 3 and steps[-1].reward == 1.0  # the answer repeats the last value
        pairs = list(zip(signs, (s.reward for s in steps), strict=False))
        assert all(right == 1.0 for sign, right in pairs if sign == "=")
        seen[problem.extra["operands"][0] % 2] += pairs
    for odd, share in ((0, 0.95), (1, 0.05)):
        guesses = [right for sign, right in seen[odd] if sign == "?"]
        assert len(guesses) / len(seen[odd]) == pytest.approx(share, abs=0.01)
        assert sum(guesses) / len(guesses) == pytest.approx(0.3, abs=0.07)
    assert task.problem("sft", 777) == make_task("guesses", lessons=100).problem("sft", 777)
    assert "slips" not in task.problem("train", 777).extra


@pytest.mark.parametrize(
    "options, message",
    [
        ({"style": "chat"}, "style: expected compact, got 'chat'"),
        ({"mod": None, "ops": "+-"}, "mod: expected a modulus, got None"),
        ({"share": 1.5}, "share: expected a probability from 0 to 1, got 1.5"),
        ({"wrong": -0.1}, "wrong: expected a probability"),
        ({"lessons": -1}, "lessons: expected 0 or more, got -1"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(InputError, match=f"task guesses: {message}"):
        make_task("guesses", **options)
