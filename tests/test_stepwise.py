"""Stepwise rows: what is read, and that every fault names its row and field."""

from __future__ import annotations

import json

import pytest

from reasonrl import InputError
from reasonrl.stepwise import read_traces, trace_row, write_rows

GOOD = {"id": "a", "prompt": "2+2", "completions": ["2+2=4\n", "#4"], "labels": [True, 0.5]}


def rows(tmp_path, *items):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(i) + "\n" for i in items))
    return path


def test_a_row_is_read_and_written_back(tmp_path):
    more = GOOD | {"id": "b", "final": 1, "model": "m", "labels": [True, False]}
    first, second = read_traces(rows(tmp_path, GOOD, more))
    assert (first.labels, first.boolean, first.final) == ([1.0, 0.5], False, None)
    assert (second.labels, second.boolean, second.final) == ([1.0, 0.0], True, 1.0)
    assert second.extra == {"model": "m"} and second.text == "2+2=4\n#4"
    again = tmp_path / "again.jsonl"
    assert write_rows(again, map(trace_row, (first, second))) == 2
    assert [t.labels for t in read_traces(again)] == [[1.0, 0.5], [1.0, 0.0]]
    assert read_traces(again)[1].boolean and read_traces(again)[1].extra == {"model": "m"}


def test_plain_completions_are_cut(tmp_path):
    path = rows(
        tmp_path,
        {"prompt": "p", "completion": "a;b;c"},
        {"prompt": "p", "completion": "a;b;c", "steps": [[0, 4], [4, 5]]},
    )
    cut, spans = read_traces(path, labelled=False, delimiter=";")
    assert cut.steps == ["a;", "b;", "c"] and spans.steps == ["a;b;", "c"]
    assert (cut.id, spans.id) == ("rows-1", "rows-2")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"labels": [True]}, "field 'labels': expected 2, one for each step, got 1"),
        ({"labels": None}, "field 'labels': expected one label for each step"),
        ({"labels": [True, 1.5]}, r"field 'labels\[1\]': expected true, false or a number"),
        ({"labels": [True, "yes"]}, r"field 'labels\[1\]'"),
        ({"labels": [True, float("nan")]}, r"field 'labels\[1\]'.*nan"),
        ({"completions": ["a", "  "]}, "field 'completions': step 1: expected some text"),
        ({"completions": []}, "field 'completions': expected at least one step"),
        ({"completions": None}, "field 'completions': expected a list of steps, got nothing"),
        ({"completions": "ab"}, "field 'completions': expected a list of steps, got 'ab'"),
        ({"prompt": None}, "field 'prompt'"),
        ({"id": "a"}, "field 'id': expected a new one, got 'a' as in row 1"),
        ({"id": 1.5}, "field 'id': expected a string or an integer"),
        ({"final": -1}, "field 'final'"),
        (
            {"completions": None, "completion": "ab", "steps": [[0, 1]]},
            "up to 2, got up to 1",
        ),
        ({"completions": None, "completion": "ab", "steps": [[1, 2]]}, r"expected \[0, end\]"),
        ({"completions": None, "completion": "ab", "steps": [[0, 9]]}, "an end in 1..2, got 9"),
    ],
)
def test_faults_name_row_and_field(tmp_path, change, says):
    path = rows(tmp_path, GOOD, GOOD | {"id": "b"} | change)
    with pytest.raises(InputError, match=rf"rows.jsonl: row 2: .*{says}"):
        read_traces(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "out.jsonl"
    write_rows(path, [{"a": 1}])

    def broken():
        yield {"a": 2}
        raise RuntimeError("sampling stopped")

    with pytest.raises(RuntimeError):
        write_rows(path, broken())
    assert path.read_text() == '{"a": 1}\n'


KI = "\u043a\u0438"
SHEPHERD = {
    "input": f"Ann has 2. How many? Step 1: She has 2. {KI}\nStep 2: So 3. {KI}",
    "label": "Ann has 2. How many? Step 1: She has 2. +\nStep 2: So 3. -",
    "task": "GSM8K",
}


def rated(*ratings, chosen=0):
    return {
        "completions": [{"text": f"s{r}", "rating": r} for r in ratings],
        "chosen_completion": chosen,
    }


PRM800K = {
    "labeler": "x",
    "question": {"problem": "1+1", "ground_truth_answer": "2"},
    "label": {
        "steps": [
            rated(1),
            rated(-1, 0, chosen=1),
            {"completions": None, "human_completion": {"text": "by hand", "rating": None}},
            rated(1),
        ]
    },
}


def test_published_rows_are_read(tmp_path):
    wrong = json.loads(json.dumps(PRM800K))
    wrong["label"]["steps"][1] = rated(-1, chosen=None)
    empty = {"question": {"problem": "p"}, "label": {"steps": []}}
    path = rows(tmp_path, SHEPHERD, PRM800K, wrong, empty)
    one, two, three = read_traces(path)
    assert one.prompt == "Ann has 2. How many?" and one.boolean
    assert one.steps == ["Step 1: She has 2.\n", "Step 2: So 3.\n"] and one.labels == [1.0, 0.0]
    assert one.extra == {"task": "GSM8K"}
    assert two.steps == ["s1\n", "s0\n", "by hand\n", "s1\n"] and two.labels == [1.0] * 4
    assert two.extra["answer"] == "2" and three.labels == [1.0, 0.0]  # it ends at the wrong step


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (SHEPHERD | {"label": SHEPHERD["label"].replace("+", "?")}, "'label': step 0: expected"),
        (SHEPHERD | {"label": SHEPHERD["label"].replace("So 3", "So 4")}, "'label': step 1"),
        (SHEPHERD | {"label": SHEPHERD["label"] + "more"}, "ends otherwise"),
        ({"input": "Step 1: a", "label": "Step 1: a"}, "'input': expected a mark"),
        (PRM800K | {"label": {"steps": [rated(3)]}}, "step 0: expected a rating -1, 0 or 1, got 3"),
        (PRM800K | {"label": {"steps": [rated(1, chosen=4)]}}, "chosen_completion 4 of 1"),
        (PRM800K | {"question": {}}, "'question': expected problem"),
    ],
)
def test_faults_in_published_rows(tmp_path, row, says):
    with pytest.raises(InputError, match=f"row 1: .*{says}"):
        read_traces(rows(tmp_path, row))
