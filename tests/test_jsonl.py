"""Data files: every fault names file, row and field; splits never overlap; answers by type."""

import itertools
import json
import math

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonrl.answer_forms import folded, parse_choice, parse_number
from reasonrl.records import InputError, Problem
from reasonrl.rewards.outcome import grade, word_error_rate
from reasonrl.tasks import make_task
from reasonrl.tasks.jsonl import content
from reasonrl.tasks.rows import read_problems


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def sums(tmp_path):
    rows = [
        {"prompt": f"{a}+{b}", "answer": a + b, "source": a} for a in range(20) for b in range(20)
    ]
    return write(tmp_path / "my sums.jsonl", rows)


def test_rows_become_problems(tmp_path):
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "pictures" / "a.png")
    chat = [{"role": "user", "content": "what?"}]
    path = write(
        tmp_path / "d.jsonl",
        [
            {"prompt": "1+1", "answer": 2, "answer_type": "numerical", "level": 3},
            {"id": 7, "prompt": chat, "answer": "B", "answer_type": "choice", "task": "quiz"},
            {"id": "x", "prompt": "see", "answer": None, "images": ["pictures/a.png"]},
        ],
    )
    first, second, third = read_problems(path)
    assert first == Problem("d-1", "1+1", "2", "numerical", "jsonl", extra={"level": 3})
    assert second == Problem("7", chat, "B", "choice", "quiz")
    assert third.images == (str(tmp_path / "pictures" / "a.png"),) and third.answer is None


def test_json_and_parquet_hold_the_same_rows(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": f"q{i}"}], "answer": str(i)} for i in range(4)]
    (tmp_path / "d.json").write_text(json.dumps(rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    write(tmp_path / "d.jsonl", rows)
    one, two, three = (read_problems(tmp_path / f"d.{end}") for end in ("json", "parquet", "jsonl"))
    assert one == two == three and one[3].answer == "3"


GOOD = b'{"prompt": "p", "answer": "a"}\n'


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "d.jsonl: expected at least one row, got an empty file"),
        (b"\n \n", "expected at least one row"),
        (GOOD + b'{"answer": "a"}', "row 2: field 'prompt': expected a string or chat messages"),
        (b'\n{"prompt": ""}', "row 2: field 'prompt': expected some text, got an empty string"),
        (b'{"prompt": 3}', "row 1: field 'prompt': expected a string or chat messages, got 3"),
        (b'{"prompt": []}', "field 'prompt': expected a string or chat messages, got []"),
        (b'{"prompt": [{"role": "user"}]}', "field 'prompt': message 0: expected role and content"),
        (GOOD + b'{"prompt": "caf\xe9"}', "row 2: not UTF-8 (byte 15)"),
        (GOOD + b'{"prompt": "p",}', "row 2: not JSON"),
        (b"[1, 2]", "row 1: expected an object with fields, got [1, 2]"),
        (b'{"prompt": "p", "prompt": "q"}', "row 1: field 'prompt': stands twice"),
        (b'{"prompt": "\\ud800"}', "field 'prompt': half a character at 0"),
        (
            b'{"prompt": "p", "answer": ["a"]}',
            "field 'answer': expected a string or a number, got ['a']",
        ),
        (
            b'{"prompt": "p", "answer": true}',
            "field 'answer': expected a string or a number, got True",
        ),
        (b'{"prompt": "p", "answer": " "}', "field 'answer': expected some text"),
        (
            b'{"prompt": "p", "answer": "x", "answer_type": "numerical"}',
            "expected a number, got 'x'",
        ),
        (
            b'{"prompt": "p", "answer_type": "numerical"}',
            "expected a numerical answer, got nothing",
        ),
        (
            b'{"prompt": "p", "answer": "yes", "answer_type": "choice"}',
            "expected letters such as B",
        ),
        (
            b'{"prompt": "p", "answer": "\\\\frac{1", "answer_type": "math"}',
            "expected closed braces",
        ),
        (
            b'{"prompt": "p", "answer_type": "maths"}',
            "field 'answer_type': expected numerical, choice",
        ),
        (b'{"prompt": "p", "answer_type": 3}', "field 'answer_type': expected a string, got 3"),
        (b'{"prompt": "p", "id": 1.5}', "field 'id': expected a string or an integer, got 1.5"),
        (b'{"prompt": "p", "images": "a.png"}', "field 'images': expected a list of paths"),
        (b'{"prompt": "p", "images": ["/etc/passwd"]}', "expected a path inside"),
        (b'{"prompt": "p", "images": ["../d.jsonl"]}', "expected a path inside"),
        (b'{"prompt": "p", "images": ["none.png"]}', "expected a file, got 'none.png'"),
        (b'{"prompt": "p", "images": ["a\\u0000"]}', "field 'images': expected a path"),
        (
            b'{"prompt": "p", "id": 1}\n\n{"prompt": "q", "id": "1"}',
            "row 3: field 'id': expected a new one, got '1' as in row 1",
        ),
        (b'{"prompt": ' + b"[" * 100_000, "row 1: not JSON (nested too deeply)"),
        (b'{"prompt": "p", "x": ' + b"9" * 5000 + b"}", "row 1: not JSON (a number too long)"),
    ],
)
def test_every_fault_names_file_row_and_field(tmp_path, data, message):
    path = tmp_path / "d.jsonl"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        make_task(str(path))
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_a_gold_answer_that_is_no_mathematics_is_refused(tmp_path):
    rows = [{"prompt": "q", "answer": a, "answer_type": "math"} for a in ("x+1", "3", "\\sqrt{2}")]
    assert len(read_problems(write(tmp_path / "good.jsonl", rows))) == 3
    rows.append({"prompt": "q", "answer": "?!?", "answer_type": "math", "id": "mine"})
    with pytest.raises(InputError, match="bad.jsonl: row 4: field 'answer': expected mathematics"):
        read_problems(write(tmp_path / "bad.jsonl", rows))


def test_faults_of_other_files(tmp_path):
    for name, data, message in [
        ("a.json", b"{}", "a.json: expected a list of rows, got dict"),
        ("b.json", b"[3]", "b.json: row 1: expected an object"),
        ("c.json", b"[", "c.json: not JSON"),
        ("d.parquet", b"PAR1 no", "d.parquet: not parquet"),
        ("e.json", b"[]", "e.json: expected at least one row"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=message):
            read_problems(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        make_task(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="cannot be read"):
        (tmp_path / "folder.jsonl").mkdir()
        make_task(str(tmp_path / "folder.jsonl"))


def test_a_link_out_of_the_data_folder_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "data" / "link.png").symlink_to(tmp_path / "secret.png")
    path = write(tmp_path / "data" / "d.jsonl", [{"prompt": "p", "images": ["link.png"]}])
    with pytest.raises(InputError, match="expected a path inside"):
        read_problems(path)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=80)
    | st.text(max_size=60).map(str.encode)
    | st.dictionaries(
        st.sampled_from(["prompt", "answer", "answer_type", "id", "images", "task"]),
        st.none()
        | st.booleans()
        | st.integers()
        | st.text(max_size=5)
        | st.lists(st.integers(), max_size=2),
    ).map(lambda row: json.dumps(row).encode())
)
def test_any_bytes_give_problems_or_a_typed_error(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("d") / "d.jsonl"
    path.write_bytes(data)
    try:
        problems = read_problems(path)
    except InputError as error:
        assert str(path) in str(error)
    else:
        assert all(isinstance(p, Problem) and p.prompt for p in problems)


def test_splits_share_nothing_and_ignore_seed_and_order(sums, tmp_path):
    tasks = [make_task(sums, seed=seed) for seed in (0, 1)]
    split = {
        s: {content(p) for p in tasks[0].problems(s, 0, 1000)} for s in ("train", "dev", "test")
    }
    assert not split["test"] & split["train"] and not split["dev"] & (
        split["train"] | split["test"]
    )
    assert 50 < len(split["test"]) < 110 and 20 < len(split["dev"]) < 60
    assert len(split["test"]) + len(split["dev"]) + len(split["train"]) == 400
    assert tasks[0].problems("test", 0, 1000) == tasks[1].problems("test", 0, 1000)
    rows = [json.loads(line) for line in open(sums, encoding="utf-8")]
    shorter = make_task(write(tmp_path / "half.jsonl", rows[::-2]))
    assert {content(p) for p in shorter.problems("test", 0, 1000)} <= split["test"]


def test_training_walks_through_every_row_each_pass(sums):
    task = make_task(sums, seed=3)
    count = len({p.id for p in task.problems("train", 0, 2000)})
    laps = [[p.id for p in task.problems("train", lap * count, count)] for lap in (0, 1)]
    assert len(set(laps[0])) == count and set(laps[0]) == set(laps[1]) and laps[0] != laps[1]
    assert [task.problem("train", i).id for i in (count + 1, 1)] == [laps[1][1], laps[0][1]]
    assert make_task(sums, seed=3).problem("train", count + 5).id == laps[1][5]
    assert make_task(sums, seed=4).problems("train", 0, 9) != task.problems("train", 0, 9)


@pytest.mark.parametrize("rows", [2, 3, 5, 10])
def test_small_files_still_have_held_out_rows(tmp_path, rows):
    path = write(tmp_path / "d.jsonl", [{"prompt": f"q{i}", "answer": "a"} for i in range(rows)])
    task = make_task(path)
    found = {s: {p.id for p in task._splits[s]} for s in ("train", "dev", "test")}
    assert found["train"] and found["test"] and (found["dev"] or rows == 2)
    assert sum(map(len, found.values())) == rows
    assert len(task.problems("test", 0, 500)) == len(found["test"])


def test_a_single_row_trains_and_has_no_test(tmp_path):
    task = make_task(write(tmp_path / "d.jsonl", [{"prompt": "q", "answer": "a"}]))
    assert task.problem("train", 5).prompt == "q"
    with pytest.raises(InputError, match="no row is left for split 'test'"):
        task.problems("test", 0, 1)


def test_the_same_prompt_twice_stays_in_one_split(tmp_path):
    rows = [{"prompt": f"q{i % 10}", "answer": "a"} for i in range(40)]
    task = make_task(write(tmp_path / "d.jsonl", rows), dev=0.3, test=0.4)
    splits = {s: [content(p) for p in task._splits[s]] for s in ("train", "dev", "test")}
    for one, other in itertools.combinations(splits.values(), 2):
        assert not set(one) & set(other)
    assert len(splits["test"]) == len(set(splits["test"]))
    assert len(splits["train"]) == 4 * len(set(splits["train"]))


def test_an_evaluation_file_is_the_test_split_and_leaves_training(sums, tmp_path, caplog):
    held = write(
        tmp_path / "held.jsonl", [{"prompt": "3+4", "answer": 7}, {"prompt": "new", "answer": 1}]
    )
    task = make_task(sums, eval_file=held)
    assert [p.prompt for p in task.problems("test", 0, 2)] == ["3+4", "new"]
    assert "1 rows stand in" in caplog.text
    caplog.clear()
    for _ in range(2):  # an evaluation asks every time, and a run makes its task anew
        task.problems("test", 0, 1000)
    assert caplog.text.count("test problems, 1000 asked for") == 1
    assert "3+4" not in {p.prompt for p in task.problems("train", 0, 1000)}
    with pytest.raises(InputError, match="unknown option 'evalfile'; did you mean 'eval_file'"):
        make_task(sums, evalfile=held)
    with pytest.raises(InputError, match="leave some for training"):
        make_task(sums, dev=0.5, test=0.5)


@pytest.mark.parametrize(
    "kind, gold, completion, value",
    [
        ("text", "Paris", "<answer> paris. </answer>", 1),
        ("text", "New  York", "I think\nnew york", 1),
        ("text", "Paris", "Paris is nice", 0),
        ("text", "42", "so \\boxed{42}", 1),
        ("text", "42", "", 0),
        ("text", "x", "<think>x</think>", 0),
        ("numerical", "1234.5", "#### 1,234.50", 1),
        ("numerical", "0.5", "<answer>1/2</answer>", 1),
        ("numerical", "0.333333", "<answer>1/3</answer>", 1),
        ("numerical", "0.33", "<answer>1/3</answer>", 0),
        ("numerical", "-3", "The answer is \u22123", 0),
        ("numerical", "-3", "The answer is -3.", 1),
        ("numerical", "40%", "<answer>0.4</answer>", 1),
        ("numerical", "0", "<answer>0.0000001</answer>", 0),
        ("numerical", "1000000", "<answer>1000001</answer>", 0),
        ("numerical", "7", "<answer>seven</answer>", 0),
        ("choice", "B", "<answer>(b)</answer>", 1),
        ("choice", "A, C", "<answer>C,A</answer>", 1),
        ("choice", "(B) Paris", "<answer>B</answer>", 1),
        ("choice", "B", "<answer>AB</answer>", 0),
        ("ocr", "a b c d", "<answer>a b c d</answer>", 1),
        ("ocr", "a b c d", "<answer>a x c</answer>", math.exp(-0.5)),
        ("math", "\\frac{1}{2}", "<answer>0.5</answer>", 1),
        ("math", "4", "<answer>5</answer>", 0),
    ],
)
def test_outcomes_by_answer_type(tmp_path, kind, gold, completion, value):
    row = {"prompt": "q", "answer": gold, "answer_type": kind}
    task = make_task(write(tmp_path / "d.jsonl", [row]))
    score = task.grade(task.problem("train", 0), completion)
    assert score.kind == "scored" and score.value == pytest.approx(value)


def test_what_cannot_be_graded_is_unscorable_never_zero():
    for problem in (
        Problem("a", "q"),
        Problem("b", "q", "print(1)", "code"),
        Problem("c", "q", "many", "numerical"),
        Problem("d", "q", "yes", "choice"),
    ):
        (score,) = grade([problem], ["<answer>A</answer>"])
        assert score.kind == "unscorable" and score.value is None and score.reason


def test_grades_keep_their_places(tmp_path):
    rows = [
        {"prompt": "a", "answer": "1", "answer_type": "math"},
        {"prompt": "b", "answer": "x"},
        {"prompt": "c", "answer": "3", "answer_type": "math"},
    ]
    problems = read_problems(write(tmp_path / "d.jsonl", rows))
    task = make_task(str(tmp_path / "d.jsonl"))
    got = task.grades(problems, ["<answer>2</answer>", "x", "<answer>3</answer>"])
    assert [score.value for score in got] == [0.0, 1.0, 1.0]


def test_numbers_and_choices():
    assert parse_number(" $-1,000.5$ ") == -1000.5 and parse_number("1e3") == 1000
    for text in ("", "x", "1/0", "1 2", "--1", "1e9999", "9" * 100, "nan", "inf", "\u0663"):
        assert parse_number(text) is None
    assert parse_choice("C: blue") == {"C"} and parse_choice("a,b") == {"A", "B"}
    for text in ("", "AB", "yes", "A and B", "1"):
        assert parse_choice(text) is None


def test_words():
    assert folded("\u201cA  b\u201d") != "" and folded(" **Yes!** ") == "yes" == folded("\uff39ES.")
    assert word_error_rate("a b", "a b") == 0 and word_error_rate("", "a b") == 1
    assert word_error_rate("b a", "a b") == 1 and word_error_rate("a b c d e f", "a b") == 2


def test_worked_completions_come_from_the_row(tmp_path):
    rows = [{"prompt": "q", "answer": "1", "worked": "so 1"}]
    task = make_task(write(tmp_path / "d.jsonl", rows))
    problem = task.problem("sft", 0)
    assert task.worked(problem) == "so 1"
    assert task.worked(Problem("a", "q", "7")) == "<answer>7</answer>"
    assert task.worked(Problem("a", "q")) is None
    assert task.steps(problem, "so 1") is None and task.prefix_correct(problem, "so 1") is None
    assert set("q\n1") <= set(task.alphabet)
