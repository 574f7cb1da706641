"""What a user may hand to the chain of process rewards, and the one line it answers with."""

from __future__ import annotations

import copy
import json

import pytest

from reasonrl import models
from reasonrl.cli import main
from reasonrl.records import InputError
from reasonrl.stepwise import write_rows
from reasonrl.train import train

GOOD = {"prompt": "1+1%5:", "completions": ["1+1=2", "#2"], "labels": [1, 1]}
TINY = "model_options={width: 32, layers: 1, heads: 2}"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    policy = models.load("tiny", dtype="fp32", width=32, layers=1, heads=2, context=64)
    policy.model.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def answer(capsys, *words):
    """Exit status and the last line on standard error."""
    status = main(list(map(str, words)))
    return status, capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"labels": [1, 1, 1]}, "row 2: field 'labels': expected 2, one for each step, got 3"),
        ({"labels": [1]}, "row 2: field 'labels': expected 2, one for each step, got 1"),
        ({"completions": ["1+1=2", " "]}, "row 2: field 'completions': step 1: expected some text"),
        ({"completions": [], "labels": []}, "row 2: field 'completions': expected at least one"),
        ({"completions": ["1", "1" * 80]}, "row 2: step 1: 84 tokens of completion, the context"),
        ({"completions": ["1", "π"]}, "row 2: step 1: the tokenizer has no token"),
        ({"labels": [1, 1.2]}, "row 2: field 'labels[1]': expected true, false or a number"),
        ({"labels": [1, -0.1]}, "row 2: field 'labels[1]'"),
        ({"labels": [1, None]}, "row 2: field 'labels[1]'"),
        ({"labels": [1, "yes"]}, "row 2: field 'labels[1]'"),
        ({"final": 2}, "row 2: field 'final'"),
        ({"id": "rows-1"}, "row 2: field 'id': expected a new one, got 'rows-1' as in row 1"),
        ({"completions": ["1+1=2;", "#2"]}, "row 2: step 0: holds the separator token"),
    ],
)
def test_a_faulty_row_is_named(base, tmp_path, capsys, change, named):
    data = tmp_path / "rows.jsonl"
    write_rows(data, [GOOD, {**GOOD, **change}])
    words = ["prm", "train", data, f"model={base}", "separator=';'", "--out", tmp_path / "prm"]
    status, line = answer(capsys, *words)
    assert status == 2 and named in line and str(data) in line


def test_when_the_split_leaves_nothing_to_learn_it_says_why(base, tmp_path, capsys):
    data = tmp_path / "rows.jsonl"
    write_rows(data, [GOOD, GOOD])
    words = ["prm", "train", data, f"model={base}", "held_out=0.999999"]
    status, line = answer(capsys, *words, "--out", tmp_path / "prm")
    assert status == 2 and "all 2 are held out, set held_out=0" in line


def test_nothing_that_cannot_be_scored_is_scored_zero_or_lost(base, tmp_path, capsys):
    rows, out = tmp_path / "rows.jsonl", tmp_path / "scores.jsonl"
    write_rows(rows, [GOOD])
    words = ["prm", "train", rows, f"model={base}", "steps=1", "held_out=0.0", "delimiter=';'"]
    assert main(list(map(str, [*words, "--out", tmp_path / "prm", "--quiet"]))) == 0
    texts = ["1+1=2;#2", "1" * 80, "  ;1", "π;2"]
    write_rows(rows, [{"prompt": "1+1%5:", "completion": text} for text in texts])
    assert main(["score", str(tmp_path / "prm"), str(rows), "--out", str(out)]) == 0
    found = [json.loads(line) for line in out.open()]
    assert len(found) == 4 and found[0]["score"] is not None and found[2]["score"] is not None
    for row, reason in ((found[1], "context"), (found[3], "no token")):
        assert row["score"] is None and row["step_scores"] is None and reason in row["reason"]
    assert "2 of 4 completions scored" in capsys.readouterr().out


def test_prime_refuses_a_reward_model_of_another_vocabulary(base, tmp_path):
    policy = models.load(str(base), dtype="fp32")
    tokenizer = copy.deepcopy(policy.tokenizer)
    tokenizer.add_tokens(["<extra>"])
    policy.model.resize_token_embeddings(len(tokenizer))
    policy.model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    from reasonrl import config

    keys = [TINY, "steps=1", "cold_start_steps=0", "eval_problems=0", "threads=1"]
    keys += [f"algo={{prm: '{tmp_path}/other'}}", "prompts_per_step=1", "group=2"]
    with pytest.raises(InputError, match=r"algo.prm: .*vocabulary differs"):
        train(config.load("prime", keys), tmp_path / "run", quiet=True)


def test_a_reward_model_is_no_policy(base, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    write_rows(rows, [GOOD])
    words = ["prm", "train", rows, f"model={base}", "steps=1", "held_out=0.0"]
    assert main(list(map(str, [*words, "--out", tmp_path / "prm", "--quiet"]))) == 0
    model = f"model={tmp_path / 'prm' / 'checkpoint-1'}"
    status, line = answer(capsys, "train", "tiny", model, "steps=1", "--out", tmp_path / "run")
    assert status == 2 and "expected a language model, got a process reward model" in line
