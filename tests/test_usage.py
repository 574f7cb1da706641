"""What a wrong usage is told to do next: one line on stderr, exit status 2."""

from __future__ import annotations

import json

import pytest

from reasonrl import checkpoint
from reasonrl.cli import main

ROWS = {
    "plain.jsonl": {"prompt": "1+1", "completion": "2"},
    "steps.jsonl": {"prompt": "1+1", "completions": ["2"], "labels": [True]},
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A place to work in: rows, and a run with a checkpoint."""
    monkeypatch.chdir(tmp_path)
    for name, row in ROWS.items():
        (tmp_path / name).write_text(json.dumps(row) + "\n")
    (tmp_path / "run").mkdir()
    checkpoint.save(tmp_path / "run", 6, lambda new: (new / "a").write_text("a"), {}, keep=1)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "next_step"),
    [
        ("report nowhere", "give the --out folder of `reasonrl train`"),
        ("audit nowhere", "give the --out folder of `reasonrl train`"),
        ("plot nowhere --out x.png", "give the --out folder of `reasonrl train`"),
        ("plot nowhere --kind credit --out x.png", "give the --out folder of `reasonrl train`"),
        ("train mine.yaml", "no such file; give a YAML file or a recipe's name (built in: dpo,"),
        ("train tiny model=./nowhere", "give a model's folder, a hub id, smollm2 or tiny"),
        ("eval tiny model=run", "a run's models are its checkpoints, as run/checkpoint-6"),
        ("train tiny --resume --out new", "start it without --resume"),
        ("score nowhere plain.jsonl", "give the --out folder of `reasonrl prm train`"),
        ("score run plain.jsonl", "found none; `reasonrl prm train` makes one"),
        ("prm train plain.jsonl --out p", "(`reasonrl prm label` writes such rows)"),
        ("prm label --out x.jsonl", "expected a recipe, or --source scores, or --ask K"),
        ("judge train steps.jsonl --stage rl --out j", "`reasonrl judge data` writes such rows"),
        ("pairs steps.jsonl --out p.jsonl", "score the rows first (`reasonrl score PRM FILE"),
        ("train sophia --stage trm --out s", "--stage trm-data makes it"),
    ],
)
def test_it_says_what_to_do(folder, capsys, words, next_step):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert next_step in error and error.count("\n") == 1 and error.startswith("reasonrl: ")


def test_what_is_missing_is_what_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["eval"])
    assert capsys.readouterr().err.endswith("arguments are required: recipe\n")
