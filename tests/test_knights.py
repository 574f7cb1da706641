"""Knights and Knaves: unique solutions by a second solver, the paper's rewards, the trace."""

import itertools
import re
import time

import pytest

from reasonrl.records import InputError
from reasonrl.tasks import Draws, make_task
from reasonrl.tasks import knights_logic as logic
from reasonrl.tasks import knights_trace as trace
from reasonrl.tasks.knights import (
    Puzzle,
    check_names,
    generate,
    grade,
    perturb,
    reward_spec,
    solve,
    stated_roles,
)
from reasonrl.tasks.knights_words import NAMES, OTHER_NAMES

PUZZLE = Puzzle(("Ann", "Bob", "Cy"), (True, False, True), (), "")  # known by its solution alone


def true_in(statement, world):
    """A second evaluator, written from the definition, one world at a time."""
    head, *rest = statement
    if head == "telling-truth":
        return world[rest[0]]
    if head == "lying":
        return not world[rest[0]]
    values = [true_in(part, world) for part in rest]
    return {
        "not": lambda: not values[0],
        "and": lambda: all(values),
        "or": lambda: any(values),
        "implies": lambda: not values[0] or values[1],
        "iff": lambda: values[0] == values[1],
    }[head]()


def brute(statements):
    worlds = itertools.product((False, True), repeat=len(statements))
    return [w for w in worlds if all(w[i] == true_in(s, w) for i, s in enumerate(statements))]


def test_a_published_row_solves_to_three_knights():
    told = [("iff", ("T", 2), ("T", 0)), ("or", ("T", 1), ("T", 2)), ("<=>", ["L", 0], ["L", 1])]
    statements = [logic.canonical(s, 3) for s in told]
    assert logic.solutions(statements) == [(True, True, True)] == brute(statements)


@pytest.mark.parametrize("people", range(2, 9))
@pytest.mark.parametrize("depth, width", [(2, 2), (3, 3)])
def test_generated_puzzles_have_one_solution(people, depth, width):
    for index in range(20):
        puzzle = generate(5, index, people, depth=depth, width=width)
        assert brute(puzzle.statements) == [puzzle.solution]
        assert len(puzzle.names) == people and all(n in puzzle.prompt for n in puzzle.names)
        assert puzzle == generate(5, index, people, depth=depth, width=width)


def test_solver_agrees_with_the_definition_on_random_statements():
    draws = Draws("statements")
    counts = set()
    for people in (2, 3, 4, 5):
        for _ in range(60):
            told = tuple(logic.draw_statement(draws, i, people, 3, 3) for i in range(people))
            assert sorted(logic.solutions(told)) == sorted(brute(told))
            counts.add(len(brute(told)))
    assert {0, 1, 2} <= counts


def test_ten_thousand_puzzles_of_five_in_ten_seconds():
    start = time.process_time()
    puzzles = [generate(0, index, 5) for index in range(10_000)]
    assert time.process_time() - start < 10
    assert len({p.statements for p in puzzles}) > 9_990
    shares = [sum(p.solution) for p in puzzles]
    assert 2.2 < sum(shares) / len(shares) < 2.8  # neither role is the safe guess


def test_statements_keep_depth_width_and_sense():
    for index in range(300):
        for speaker, statement in enumerate(generate(1, index, 4).statements):
            parts = statement[1:] if statement[0] not in logic.LEAVES else ()
            assert len(parts) <= 2 and all(part[0] in logic.LEAVES for part in parts)
            assert statement not in (("lying", speaker), ("telling-truth", speaker))


def test_names_never_contain_one_another():
    check_names([*NAMES, *OTHER_NAMES])
    with pytest.raises(InputError, match="'Ann' is part of the name 'Joanna'"):
        Puzzle(("Ann", "Joanna"), (True, True), (), "")
    with pytest.raises(InputError, match="without role words, got 'Black Knight'"):
        Puzzle(("Ann", "Black Knight"), (True, True), (), "")


@pytest.mark.parametrize(
    "statements, count",
    [
        ((("lying", 0), ("telling-truth", 0)), 0),
        ((("telling-truth", 1), ("telling-truth", 0)), 2),
        ((("lying", 1), ("lying", 0)), 2),
    ],
)
def test_puzzles_without_one_solution_are_refused_with_the_count(statements, count):
    with pytest.raises(InputError, match=f"expected one solution, got {count}"):
        Puzzle(("Ann", "Bob"), (True, False), statements, "")
    with pytest.raises(InputError, match=f"expected one solution, got {count}"):
        solve(statements)


def test_wrong_puzzles_are_refused():
    told = (("lying", 1), ("or", ("lying", 1), ("lying", 0)))
    assert Puzzle(("Ann", "Bob"), (False, True), told, "").solution == (False, True)
    with pytest.raises(InputError, match="does not fit the statements"):
        Puzzle(("Ann", "Bob"), (True, True), told, "")
    with pytest.raises(InputError, match="expected 2 to 8 people, got 1"):
        Puzzle(("Ann",), (True,), (), "")
    with pytest.raises(InputError, match="a person 0 to 1"):
        Puzzle(("Ann", "Bob"), (True, True), (("lying", 2), ("lying", 0)), "")
    with pytest.raises(InputError, match="a known connective"):
        Puzzle(("Ann", "Bob"), (True, True), (("xor", ("lying", 1), ("lying", 0)),) * 2, "")
    for people in (1, 9):
        with pytest.raises(InputError, match=f"people: expected 2 to 8, got {people}"):
            generate(0, 0, people)


RIGHT = "(1) Ann is a knight\n(2) Bob is a knave\n(3) Cy is a knight"
WRONG = "(1) Ann is a knight\n(2) Bob is a knight\n(3) Cy is a knight"
MISSING = "(1) Ann is a knight\n(2) Bob is a knave"
EXTRA = RIGHT + "\n(4) Dan is a knave"


def tagged(answer):
    return f"<think>because</think>\n<answer>{answer}</answer>"


@pytest.mark.parametrize(
    "completion, gated, plain",
    [
        (tagged(RIGHT), 3, 3),
        (tagged(RIGHT.upper()), 3, 3),
        (tagged(WRONG), -0.5, -0.5),
        (tagged(MISSING), -1, -1),
        (tagged(EXTRA), -1, -1),
        (tagged("Ann is a knight and knave. Bob is a knave."), -1, -1),
        (tagged(""), -1, -1),
        (f"<answer>{RIGHT}</answer>", -3, 1),  # broken tags, right roles
        (f"<think>x</think><answer>{RIGHT}", -3, 1),
        (f"<think>x</think>{RIGHT}", -3, 1),
        (f"<think><answer>{RIGHT}</answer></think>", -3, 1),  # out of order
        (tagged(WRONG) + tagged(RIGHT), -3, 1),  # twice: the last one is read
        (f"<answer>{WRONG}</answer>", -3, -2.5),
        (f"<answer>{MISSING}</answer>", -3, -3),
        ("no idea", -3, -3),
        ("", -3, -3),
    ],
)
def test_rewards_of_the_paper(completion, gated, plain):
    assert grade(completion, PUZZLE) == grade(completion, PUZZLE, how="gated") == gated
    assert grade(completion, PUZZLE, how="sum") == plain
    assert gated in reward_spec("gated").totals() and plain in reward_spec("sum").totals()


def test_totals_and_text_agree():
    assert reward_spec("gated").totals() == (3.0, -0.5, -1.0, -3.0)
    assert reward_spec("sum").totals() == (3.0, 1.0, -0.5, -1.0, -2.5, -3.0)
    full = reward_spec("gated").render("full")
    stated = [float(n) for n in re.findall(r"[-+]?\d+(?:\.\d+)?", full)]
    assert sorted(set(stated)) == [-3.0, -2.0, -1.5, -1.0, -0.5, 1.0, 2.0, 3.0]
    assert stated[-4:] == [3.0, -0.5, -1.0, -3.0]
    with pytest.raises(InputError, match="how: expected gated or sum, got 'mean'"):
        grade("", PUZZLE, how="mean")


@pytest.mark.parametrize("how", ["statement", "leaf", "order", "names", "roles"])
def test_perturbations_are_puzzles_of_their_kind(how):
    moved = 0
    for index in range(15):
        puzzle = generate(9, index, 4)
        other = perturb(puzzle, how)
        assert other == perturb(puzzle, how) and other.prompt != puzzle.prompt
        truthful = tuple(k != other.flipped for k in other.solution)
        assert brute(other.statements) == [truthful]
        changed = [a != b for a, b in zip(puzzle.statements, other.statements, strict=True)]
        roles = dict(zip(puzzle.names, puzzle.solution, strict=True))
        if how in ("statement", "leaf"):
            assert sum(changed) == 1
            moved += other.solution != puzzle.solution
        elif how == "order":
            assert sorted(other.names) == sorted(puzzle.names) and other.names != puzzle.names
            assert dict(zip(other.names, other.solution, strict=True)) == roles
        elif how == "names":
            assert not set(other.names) & set(puzzle.names) and other.solution == puzzle.solution
        else:
            assert [not knight for knight in other.solution] == list(puzzle.solution)
            assert "knights always lie" in other.prompt
            assert perturb(other, "roles").solution == puzzle.solution
    assert moved >= {"statement": 15, "leaf": 13}.get(how, 0)  # few puzzles have no such claim
    with pytest.raises(InputError, match="perturbation: expected one of"):
        perturb(PUZZLE, "colour")


@pytest.mark.parametrize("people", [2, 3, 5, 8])
@pytest.mark.parametrize("reward, best", [("binary", 1.0), ("gated", 3.0), ("sum", 3.0)])
def test_worked_completions_are_right_line_by_line(people, reward, best):
    task = make_task("knights", people=people, reward=reward)
    for problem in task.problems("sft", 0, 10):
        text = task.worked(problem)
        steps = task.steps(problem, text)
        assert task.grade(problem, text).value == best
        assert [s.reward for s in steps] == [1.0] * len(steps)
        assert task.prefix_correct(problem, text) == 1.0
        assert steps[0].start == 0 and steps[-1].end == len(text)
        assert all(a.end == b.start for a, b in itertools.pairwise(steps))
        assert problem.answer in text


def test_a_flipped_puzzle_is_worked_and_checked_in_its_own_roles():
    puzzle = perturb(generate(3, 0, 4), "roles")
    text = trace.worked(puzzle)
    assert stated_roles(text, puzzle.names) == puzzle.solution and grade(text, puzzle) == 3
    assert all(s.reward == 1.0 for s in trace.check(puzzle, text, puzzle.solution))


# Ann: Bob lies and Cy does not. Bob: Ann lies. Cy: Ann does not lie, or I do.
SMALL = Puzzle(
    ("Ann", "Bob", "Cy"),
    (True, False, True),
    (
        ("and", ("lying", 1), ("telling-truth", 2)),
        ("lying", 0),
        ("or", ("telling-truth", 0), ("lying", 2)),
    ),
    "",
)
GOLD = """<think>
Suppose Ann is a knight: possible.
Suppose Ann is a knight, Bob is a knight: contradiction.
Suppose Ann is a knight, Bob is a knave: possible.
Suppose Ann is a knight, Bob is a knave, Cy is a knight: possible.
</think>
<answer>
(1) Ann is a knight
(2) Bob is a knave
(3) Cy is a knight
</answer>"""


def rewards(text):
    return [s.reward for s in trace.check(SMALL, text, stated_roles(text, SMALL.names))]


def test_the_search_is_what_one_does_by_hand():
    assert brute(SMALL.statements) == [(True, False, True)]
    assert trace.worked(SMALL) == GOLD


@pytest.mark.parametrize(
    "old, new, expected",
    [
        ("", "", [1, 1, 1, 1, 1]),
        ("knight: contradiction", "knight: possible", [1, 0, 0, 1, 1]),  # false verdict
        ("Bob is a knave: possible", "Bob is a knave: contradiction", [1, 1, 0, 0, 1]),
        ("Suppose Ann is a knight: possible.\n", "", [0, 1, 1, 1]),  # a line is missing
        ("Ann is a knight: possible.", "Ann is a knight: fine.", [0, 0, 1, 1, 1]),
        ("</think>", "Suppose Ann is a knave: possible.\n</think>", [1, 1, 1, 1, 0, 0]),
        ("(2) Bob is a knave", "(2) Bob is a knight", [1, 1, 1, 1, 0]),
        ("</think>\n", "", [1, 1, 1, 1, 0, 0, 0, 0, 0]),
    ],
)
def test_lines_are_checked_against_what_was_written(old, new, expected):
    assert rewards(GOLD.replace(old, new, 1)) == expected


def test_positions_splits_and_contents():
    task = make_task("knights", people=3)
    held = {logic.identity(p.extra["statements"]) for p in task.problems("test", 0, 200)}
    seen = {logic.identity(task.problem("train", i).extra["statements"]) for i in range(400)}
    assert len(held) == 200 and not held & seen
    assert task.problem("train", 7) == make_task("knights", people=3).problem("train", 7)


def test_identity_ignores_the_order_of_few_people():
    for index in range(10):
        puzzle = generate(2, index, 4)
        again = logic.identity(perturb(puzzle, "order").statements)
        assert again == logic.identity(puzzle.statements)
        assert logic.identity(perturb(puzzle, "leaf").statements) != again


def test_nested_statements_are_worded_without_ambiguity():
    told = ("not", ("and", ("telling-truth", 0), ("implies", ("lying", 1), ("telling-truth", 0))))
    assert logic.wording(told, ["Ann", "Bob"], "knight", "knave") == (
        "it is not the case that (Ann is a knight and (if Bob is a knave then Ann is a knight))"
    )


def test_a_partial_assignment_decides_what_it_can():
    either = ("or", ("telling-truth", 0), ("telling-truth", 1))
    both = ("and", ("telling-truth", 0), ("lying", 1))
    assert logic.partial_truth(either, [True]) is True
    assert logic.partial_truth(either, [False]) is None
    assert logic.partial_truth(both, [False]) is False
    assert logic.partial_truth(both, [True]) is None
    assert logic.partial_truth(("implies", *both[1:]), [False]) is True
    assert logic.partial_truth(("iff", *both[1:]), [False]) is None
    assert logic.partial_truth(("not", either), [True]) is False


def test_options_without_any_puzzle_are_refused():
    """Two people who only name a role have no puzzle with one solution."""
    with pytest.raises(InputError, match="none with one solution"):
        generate(0, 0, 2, depth=1)
