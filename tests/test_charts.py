"""Charts: what the pixels show, the steps against picture and text, the splits, the two styles."""

from __future__ import annotations

import itertools
import pickle
import re
import subprocess
import sys
from collections import Counter

import pytest

from reasonrl.choice import texts
from reasonrl.records import InputError
from reasonrl.rewards.thinking import by_rule
from reasonrl.tasks import make_task
from reasonrl.tasks.base import Draws
from reasonrl.tasks.charts_draw import COLOURS, PAPER, Mark, Picture, box

KINDS = ("bars", "count", "compare", "box")


def cells(picture, side=64):
    """Colour letters found in each of the 8 x 8 cells of the pixels, read with no knowledge of how
    they were drawn."""
    image = picture.draw()
    assert image.mode == "RGB" and image.size == (side, side)
    letter = {rgb: name for name, rgb in COLOURS.items()}
    found = {}
    step = side // 8
    for row, column in itertools.product(range(8), repeat=2):
        pixels = image.crop((column * step, row * step, (column + 1) * step, (row + 1) * step))
        found[row, column] = {letter[rgb] for _, rgb in pixels.getcolors() if rgb in letter}
    return found


def seen(kind, picture, side):
    """The numbers that a picture shows, counted in its pixels."""
    found = cells(picture, side)
    assert all(len(letters) <= 1 for letters in found.values())  # no cell holds two colours
    full = [(at, *letters) for at, letters in found.items() if letters]
    if kind == "box":
        rows, columns = {at[0] for at, _ in full}, {at[1] for at, _ in full}
        assert len(full) == len(rows) * len(columns)
        return {"w": len(columns), "h": len(rows)}
    if kind == "bars":
        for letter in {letter for _, letter in full}:
            at = [place for place, own in full if own == letter]
            assert len({column for _, column in at}) == 1 and max(at)[0] == 7
            assert max(at)[0] - min(at)[0] + 1 == len(at)
    return dict(Counter(letter for _, letter in full))


def truth(shown, ask, letters):
    """The answer from the numbers, written down a second time."""
    n = [shown[letter] for letter in letters]
    return {
        "value": lambda: str(n[0]),
        "max": lambda: str(sorted(n)[-1]),
        "min": lambda: str(sorted(n)[0]),
        "sum": lambda: str(sum(n)),
        "minus": lambda: str(n[0] - n[1]),
        "more": lambda: letters[0] if n[0] > n[1] else letters[1],
        "per": lambda: str(2 * (n[0] + n[1])),
        "area": lambda: str(n[0] * n[1]),
    }[ask]()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size, colours, high", [(64, 3, 5), (32, 4, 8), (16, 2, 3)])
def test_the_pixels_show_the_numbers_and_the_answer_is_true(kind, size, colours, high):
    task = make_task(
        "charts", kinds=kind, size=size, colours=colours, high=high, style="compact", seed=size
    )
    asked = set()
    for i in range(60):
        problem = task.problem("train", i)
        (picture,) = problem.images
        shown, ask, letters = (problem.extra[key] for key in ("shown", "ask", "letters"))
        assert seen(kind, picture, size) == shown
        assert problem.answer == truth(shown, ask, letters)
        assert int(problem.answer) >= 0 if ask != "more" else True
        asked.add(ask)
    assert len(asked) == {"bars": 5, "count": 3, "compare": 1, "box": 2}[kind]


def test_a_disc_and_a_triangle_keep_their_margin():
    size = 128  # cells of 16, margin 2
    picture = Picture(size, (Mark("disc", "r", 0, 0), Mark("triangle", "g", 1, 0)))
    image = picture.draw()
    inked = [(x, y) for x in range(size) for y in range(size) if image.getpixel((x, y)) != PAPER]
    assert {min(x for x, _ in inked), min(y for _, y in inked)} == {2}
    disc = sum(1 for x, y in inked if x < 16)
    assert disc == 112  # of the circle of diameter 12: pi * 36 = 113.1
    triangle = [sum(1 for x, y in inked if x >= 16 and y == row) for row in range(16)]
    assert triangle == [0, 0, 2, 2, 4, 4, 6, 6, 8, 8, 10, 10, 12, 12, 0, 0]


def test_pictures_are_data():
    make = lambda seed: box(3, 2, "rg", 64, Draws(seed))  # noqa: E731
    one, other = make(1), make(2)
    assert one == make(1) and hash(one) == hash(make(1)) and one.key == make(1).key
    assert one != other and one.key != other.key and len({one, make(1), other}) == 2
    assert one.key != Picture(32, one.marks, True).key != Picture(32, one.marks).key
    assert pickle.loads(pickle.dumps(one)) == one
    assert one.draw().tobytes() == make(1).draw().tobytes() != other.draw().tobytes()
    run = "from reasonrl.tasks import make_task; p = make_task('charts').problem('train', 5)"
    run += "; import hashlib; (i,) = p.images"
    run += "; print(i.key, hashlib.md5(i.draw().tobytes()).hexdigest())"
    keys = {subprocess.run([sys.executable, "-c", run], capture_output=True).stdout for _ in "ab"}
    assert len(keys) == 1 and len(keys.pop().split()) == 2


@pytest.mark.parametrize("style", ["compact", "chat"])
def test_worked_completions_are_right_in_every_step(style):
    task = make_task("charts", style=style)
    for problem in task.problems("train", 0, 150):
        worked = task.worked(problem)
        steps = task.steps(problem, worked)
        assert task.grade(problem, worked).value == 1.0
        assert [s.reward for s in steps] == [1.0] * len(steps)
        assert steps[0].start == 0 and steps[-1].end == len(worked)
        assert all(a.end == b.start for a, b in itertools.pairwise(steps))
        assert task.prefix_correct(problem, worked) == 1.0 and not task.lucky(problem, worked)
        assert set(worked) <= set(task.alphabet)
        if style == "compact":
            assert set(problem.prompt) <= set(task.alphabet)
            assert task.thinking(problem, worked) == worked.split("#")[0]
        else:
            (message,) = problem.prompt
            image, text = message["content"]
            assert image == {"type": "image"} and text["type"] == "text"
            assert f"<think>{task.thinking(problem, worked)}</think>" in worked


def find(task, shown, ask):
    """The first training problem that asks so, its numbers replaced by ours."""
    for i in itertools.count():
        problem = task.problem("train", i)
        if problem.extra["ask"] == ask:
            problem.extra["shown"].clear()
            problem.extra["shown"].update(shown)
            return problem


SUM = {"r": 3, "g": 7, "b": 2}


@pytest.mark.parametrize(
    "ask, shown, completion, rewards, thinking",
    [
        ("sum", SUM, "r3;g7;b2;3+7=10;10+2=12#12", [1, 1, 1, 1, 1, 1], "r3;g7;b2;3+7=10;10+2=12"),
        # another order of reading, and of adding with it
        ("sum", SUM, "b2;r3;g7;2+3=5;5+7=12#12", [1, 1, 1, 1, 1, 1], "b2;r3;g7;2+3=5;5+7=12"),
        # one misread bar: what follows from it stays right, the outcome is wrong
        ("sum", SUM, "r3;g6;b2;3+6=9;9+2=11#11", [1, 0, 1, 1, 1, 1], "r3;g6;b2;3+6=9;9+2=11"),
        # a false sum; the next one starts from what was written
        ("sum", SUM, "r3;g7;b2;3+7=11;11+2=13#13", [1, 1, 1, 0, 1, 1], None),
        # two slips that cancel: right answer, wrong steps
        ("sum", SUM, "r3;g7;b2;3+7=11;11+2=12#12", [1, 1, 1, 0, 0, 1], None),
        # no step at all, a calculation before its readings, twice the same reading
        ("sum", SUM, "#12", [0], ""),
        ("sum", SUM, "3+7=10;10+2=12#12", [0, 0, 0], None),
        ("sum", SUM, "r3;r3;g7;b2;3+7=10;10+2=12#12", [1, 0, 1, 1, 1, 1, 1], None),
        ("sum", SUM, "r3;g7;b2#12", [1, 1, 1, 0], None),
        ("sum", SUM, "r3;g7;b2;3+7=10;10+2=12#12#12", [1, 1, 1, 1, 1, 1, 0], None),
        ("sum", SUM, "", [], ""),
        ("sum", SUM, "r03;y1;x;+#", [0, 0, 0, 0, 0], None),
        ("max", SUM, "r3;g7;b2#7", [1, 1, 1, 1], "r3;g7;b2"),
        ("max", SUM, "r3;g7;b1#7", [1, 1, 0, 1], None),  # lucky
        ("max", SUM, "r3;g6;b2#7", [1, 0, 1, 0], None),  # lucky, the answer from nowhere
        ("min", SUM, "r3;g7;b2#2", [1, 1, 1, 1], None),
        ("per", {"w": 4, "h": 2}, "w4;h2;4+2=6;6+6=12#12", [1, 1, 1, 1, 1], None),
        ("per", {"w": 4, "h": 2}, "w4;h2;4+2=7;7+7=14#14", [1, 1, 0, 1, 1], None),
        ("area", {"w": 4, "h": 2}, "w2;h4;2*4=8#8", [0, 0, 1, 1], None),  # lucky
    ],
)
def test_steps_against_the_picture_and_against_what_was_written(
    ask, shown, completion, rewards, thinking
):
    task = make_task("charts", style="compact", kinds="bars,box")
    problem = find(task, shown, ask)
    problem = type(problem)(
        **{**vars(problem), "answer": truth(shown, ask, problem.extra["letters"])}
    )
    steps = task.steps(problem, completion)
    assert [s.reward for s in steps] == rewards
    assert "".join(completion[s.start : s.end] for s in steps) == completion
    right = completion.count("#") == 1 and completion.endswith(f"#{problem.answer}")
    assert task.grade(problem, completion).value == float(right)
    assert task.lucky(problem, completion) == (right and 0 in rewards)
    leading = len(rewards) if 0 not in rewards else rewards.index(0)
    expected = {"sum": 6, "max": 4, "min": 4, "per": 5, "area": 4}[ask]
    assert task.prefix_correct(problem, completion) == min(leading, expected) / expected
    if thinking is not None:
        assert task.thinking(problem, completion) == thinking


@pytest.mark.parametrize(
    "completion, rewards, grade",
    [
        ("<think>red: 3\ngreen: 5</think>\n<answer>green</answer>", [1, 1, 1], 1),
        ("<think>\nred: 3\n\ngreen: 5\n</think>\n<answer> green </answer>\n", [1, 1, 1], 1),
        ("<think>red: 3\ngreen: 2</think>\n<answer>green</answer>", [1, 0, 0], 1),  # lucky
        ("<think>red: 3\ngreen: 5</think>\n<answer>red</answer>", [1, 1, 0], 0),
        ("<think>red: 3\ngreen: 3</think>\n<answer>red</answer>", [1, 0, 0], 0),
        ("<think>blue: 1\nred: 3 green: 5</think>\n<answer>green</answer>", [0, 0, 0], 1),
        ("red: 3\ngreen: 5\n<answer>green</answer>", [1, 1, 1], 0),  # no tags around the thinking
        ("<think>red: 3\ngreen: 5</think>\n<answer>green</answer> so", [1, 1, 0], 0),
        ("so <think>red: 3\ngreen: 5</think>\n<answer>green</answer>", [0, 1, 0], 0),
        ("<think>a</think><think>red: 3</think>\n<answer>green</answer>", [0, 0], 0),
        ("<think>red: 3\n<answer>green</answer></think>\n<answer>green</answer>", [1, 0, 0], 0),
    ],
)
def test_the_chat_style_wants_its_tags(completion, rewards, grade):
    task = make_task("charts", kinds="compare", colours=2)
    problem = find(task, {"r": 3, "g": 5}, "more")
    problem = type(problem)(**{**vars(problem), "answer": "green"})
    assert problem.extra["letters"] == ("r", "g")
    assert task.grade(problem, completion).value == grade
    assert [s.reward for s in task.steps(problem, completion)] == rewards
    assert task.lucky(problem, completion) == (grade == 1 and 0 in rewards)


@pytest.mark.parametrize(
    "completion, review",
    [
        ("r5;g3#2", "r5+;g3+;?"),
        ("r5;g3;5-3=2#9", "r5+;g3+;5-3=2+"),  # the answer is no step of the thinking
        ("r4;g3;4-3=2#2", "r5-;g3+;4-3=1-"),  # with the numbers that it takes
        ("r5;r5;b2;x;5-3=2#2", "r5+;r5-;b2-;-;5-3=2-"),  # twice, of no use, nothing, too early
        ("#2", "?;?;?"),
    ],
)
def test_a_review_puts_every_step_right(completion, review):
    """And its marks are the rule's score: right steps among those written or expected."""
    task = make_task("charts", style="compact", kinds="bars", colours=2)
    problem = find(task, {"r": 5, "g": 3}, "minus")
    assert task.review(problem, completion) == review
    marks = review.split(";")
    (score,) = by_rule(task)(texts([problem], [completion]))
    assert (score.value or 0.0) == sum(mark[-1] == "+" for mark in marks) / len(marks)
    chat = make_task("charts", kinds="bars", colours=2)
    lines = completion.partition("#")[0].split(";")
    said = [re.sub("([rg])([0-9])", r"\1: \2", line) for line in lines]
    said = [re.sub("([0-9])-([0-9])=", r"\1 - \2 = ", line) for line in said]
    said = "\n".join(said).replace("r:", "red:").replace("g:", "green:").replace("b2", "blue: 2")
    found = chat.review(problem, f"<think>{said}</think>\n<answer>2</answer>")
    assert [line[-1] for line in found.split("\n")] == [mark[-1] for mark in marks]


def test_the_split_is_decided_by_numbers_and_question():
    key = lambda p: (p.extra["kind"], str(p.extra["shown"]), p.prompt)  # noqa: E731
    task, other = (make_task("charts", style="compact", seed=seed, size=32) for seed in (0, 9))
    held = {split: {key(p) for p in task.problems(split, 0, 60)} for split in ("dev", "test")}
    assert all(len(found) == 60 for found in held.values())
    training = {key(p) for t in (task, other) for p in t.problems("train", 0, 800)}
    training |= {key(p) for p in task.problems("sft", 0, 300)}
    assert not (held["dev"] & held["test"]) and not (training & (held["dev"] | held["test"]))
    # the same numbers in other places fall into the same split
    places = {}
    for i in range(2000):
        content, problem = task.candidate(Draws("again", i), "x")
        places.setdefault((*key(problem), content), set()).add(problem.images[0].key)
    assert len({k[:3] for k in places}) == len(places)  # the places are no part of the content
    assert max(map(len, places.values())) > 2
    assert task.problem("train", 7) == make_task("charts", style="compact", size=32).problem(
        "train", 7
    )


def test_a_small_pool_says_how_many_there_are():
    task = make_task("charts", kinds="box", high=2)
    with pytest.raises(InputError, match=r"distinct test problems asked for, \d+ exist"):
        task.problems("test", 0, 50)


@pytest.mark.parametrize(
    "knobs, message",
    [
        ({"kinds": "bars,pies"}, "kinds: expected some of bars, count, compare, box"),
        ({"kinds": " , "}, "kinds: expected some of"),
        ({"size": 60}, "size: expected a multiple of 8"),
        ({"size": 8}, "size: expected a multiple of 8"),
        ({"colours": 5}, "colours: expected 2 to 4, got 5"),
        ({"high": 9}, "high: expected 2 to 8, got 9"),
        ({"style": "prose"}, "style"),
        ({"bars": 3}, "unknown option 'bars'"),
    ],
)
def test_knobs_are_checked(knobs, message):
    with pytest.raises(InputError, match=message):
        make_task("charts", **knobs)
