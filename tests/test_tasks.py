"""Tasks: positions are integers, splits never overlap, every step of a chain is checked by rule."""

import subprocess
import sys

import pytest

from reasonrl.records import InputError, Problem, Step
from reasonrl.tasks import TASKS, Draws, make_task, split_of


def chain(prompt="7+1-5-6", **options):
    """A fixed problem: the prompt of the documentation."""
    task = make_task("arithmetic", **options)
    extra = {"operands": (7, 1, 5, 6), "ops": ("+", "-", "-")}
    return task, Problem("x", prompt, "-3", "numerical", "arithmetic", extra=extra)


def rewards(task, problem, completion):
    return [step.reward for step in task.steps(problem, completion)]


def test_draws_are_the_same_everywhere():
    draws = Draws("a", 0, "train", 7)
    assert [draws.next64() for _ in range(3)] == [
        4373567689996799046,
        17936572895830093196,
        13573014030896018591,
    ]
    draws.state = 0  # splitmix64: first output of the all-zero state
    assert draws.next64() == 0xE220A8397B1DCDAF
    draws = Draws("b")
    sample = [draws.below(10) for _ in range(10_000)]
    assert all(900 < sample.count(k) < 1100 for k in range(10))
    assert sorted(Draws("c").shuffled(range(50))) == list(range(50))
    assert {Draws("d", k).between(-1, 1) for k in range(50)} == {-1, 0, 1}


def test_problems_are_fixed_by_seed_split_and_index_across_processes():
    code = (
        "from reasonrl.tasks import make_task;"
        "t = make_task('arithmetic', seed=3);"
        "print([p.answer + p.prompt[0]['content'] for p in t.problems('train', 5, 4)])"
    )
    task = make_task("arithmetic", seed=3)
    here = str([p.answer + p.prompt[0]["content"] for p in task.problems("train", 5, 4)])
    for hash_seed in ("0", "1"):
        env = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)}
        out = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert out.stdout.strip() == here, out.stderr
    assert task.problem("train", 5) == task.problems("train", 4, 2)[1]
    assert task.problem("train", 5) != make_task("arithmetic", seed=4).problem("train", 5)
    assert task.problem("train", 5) != task.problem("sft", 5)


def test_a_held_out_position_does_not_depend_on_what_was_asked_before():
    ahead = make_task("arithmetic").problem("test", 30)
    task = make_task("arithmetic")
    assert task.problems("test", 0, 31)[30] == ahead == task.problem("test", 30)


@pytest.mark.parametrize("options", [{}, {"terms": 4, "mod": 10, "style": "compact"}])
def test_splits_never_overlap_whatever_the_seeds(options):
    contents: dict = {}
    for split in ("sft", "train", "dev", "test"):
        problems = make_task("arithmetic", seed=len(split), **options).problems(split, 0, 400)
        contents[split] = {str(p.prompt) for p in problems}
    assert len(contents["dev"]) == len(contents["test"]) == 400
    assert not contents["test"] & (contents["train"] | contents["sft"] | contents["dev"])
    assert not contents["dev"] & (contents["train"] | contents["sft"])


def test_split_shares_are_kept():
    counts = [split_of(f"content {i}") for i in range(20_000)]
    assert abs(counts.count("test") / 20_000 - 0.2) < 0.01
    assert abs(counts.count("dev") / 20_000 - 0.1) < 0.01


def test_more_held_out_problems_than_exist_is_an_input_error():
    with pytest.raises(InputError, match="500 distinct test problems asked for, 38 exist"):
        make_task("arithmetic", terms=2).problems("test", 0, 500)


@pytest.mark.parametrize("style", ["chat", "compact"])
@pytest.mark.parametrize("mod", [None, 10])
def test_worked_completions_are_right_in_every_style(style, mod):
    task = make_task("arithmetic", style=style, mod=mod, ops="+-*", low=0, terms=5)
    for problem in task.problems("sft", 0, 60):
        text = task.worked(problem)
        assert task.grade(problem, text).value == 1.0
        assert rewards(task, problem, text) == [1.0] * 5
        assert task.prefix_correct(problem, text) == 1.0
        shown = problem.prompt if style == "compact" else problem.prompt[0]["content"]
        assert set(text + shown) <= set(task.alphabet)


def test_the_documented_chain():
    task, problem = chain()
    assert task.worked(problem) == "7+1=8\n8-5=3\n3-6=-3\nAnswer: -3"
    compact, problem = chain(style="compact")
    assert compact.worked(problem) == "7+1=8;8-5=3;3-6=-3#-3"
    spans = compact.steps(problem, "7+1=8;8-5=3;3-6=-3#-3")
    assert spans == [Step(0, 6, 1.0), Step(6, 12, 1.0), Step(12, 18, 1.0), Step(18, 21, 1.0)]


@pytest.mark.parametrize(
    "completion, expected, outcome, prefix",
    [
        ("7+1=9\n9-5=4\n4-6=-2\nAnswer: -2", [0, 1, 1, 1], 0, 0.0),  # one slip costs one step
        ("7+1=8\n8-5=4\n4-6=-3\nAnswer: -3", [1, 0, 0, 1], 1, 0.25),  # right by two wrongs
        ("7+1=8\n8+5=13\n13-6=7\nAnswer: 7", [1, 0, 1, 1], 0, 0.25),  # wrong operation
        ("7+1=8\n7-5=2\n2-6=-4\nAnswer: -4", [1, 0, 1, 1], 0, 0.25),  # not the written value
        ("7+1=8\n8-5=3\n3-6=-3\nAnswer: 3", [1, 1, 1, 0], 0, 0.75),
        ("7+1=8\n8-5=3\nAnswer: 3", [1, 1, 0], 0, 0.5),  # a step is missing
        ("7+1=8\n8-5=3\n3-6=-3\nAnswer: -3\nso", [1, 1, 1, 1, 0], 0, 1.0),  # one too many
        ("7+1=8\noops\n3-6=-3\nAnswer: -3", [1, 0, 0, 1], 1, 0.25),
        ("Answer: -3", [0], 1, 0.0),
        ("7+1=8\n8-5=3\n3-6=-3\n", [1, 1, 1], 0, 0.75),
        ("7+1=8\n8-5=3\n3-6=-3\nAnswer: -3\nAnswer: -3", [1, 1, 1, 1, 0], 0, 1.0),
        ("7+1=8\n8-5=3\n3-6=-3\nAnswer: -03", [1, 1, 1, 0], 0, 0.75),
        ("7+1=8\n8-5=3\n3-6=-3\nAnswer: −3", [1, 1, 1, 0], 0, 0.75),  # another minus sign
        ("7+1=8 \n8-5=3\n3-6=-3\nAnswer: -3\n", [0, 0, 1, 1], 1, 0.0),
        ("7+1=" + "8" * 5000, [0], 0, 0.0),
        ("", [], 0, 0.0),
    ],
)
def test_steps_are_checked_locally(completion, expected, outcome, prefix):
    task, problem = chain()
    assert rewards(task, problem, completion) == expected
    assert task.grade(problem, completion).value == outcome
    assert task.prefix_correct(problem, completion) == prefix


def test_grades_say_why():
    task, problem = chain()
    assert task.grade(problem, "no idea").reason == "expected one answer, got 0"
    assert task.grade(problem, "Answer: 4").reason == "answer 4, expected -3"
    assert task.grade(problem, "Answer: four").reason == "the last step is not a well-formed answer"


@pytest.mark.parametrize(
    "options, message",
    [
        ({"term": 3}, "unknown option 'term'; did you mean 'terms'"),
        ({"terms": "4"}, "terms: .*integer, got '4'"),
        ({"terms": 1}, "terms: expected 2 to 32, got 1"),
        ({"ops": "+/"}, r"ops: expected some of \+ - \*, got '\+/'"),
        ({"low": 5, "high": 3}, "low: expected"),
        ({"mod": 1}, "mod: expected"),
        ({"style": "prose"}, "style: .*got 'prose'"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        make_task("arithmetic", **options)


def test_an_unknown_task_names_the_nearest():
    with pytest.raises(InputError, match="unknown task 'arithmetics'; did you mean 'arithmetic'"):
        make_task("arithmetics")
    assert "arithmetic" in TASKS


def test_unknown_splits_and_positions_are_refused():
    task = make_task("arithmetic")
    with pytest.raises(InputError, match="split: expected one of sft, train, dev, test, got 'val'"):
        task.problem("val", 0)
    with pytest.raises(InputError, match="index must be >= 0"):
        task.problem("train", -1)
