"""The server's benchmark: its answers are what they are planned to be, and its gate holds."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # bench/ is no part of what is installed

from bench import serve
from reasonrl.rewards import verify_math
from reasonrl.segment import completion_of

GREEN = {"replies": 9, "wrong": 0, "lost_in_the_stop": 0, "exit_status": 0, "green": True}
FOUND = {"requests": 9, "requests_per_second": 4.5, "p50_ms": 1.0, "p95_ms": 2.0, "p99_ms": 3.0}


def test_planned_scores_are_the_verifiers():
    rows = list(itertools.islice(serve.answers(3, 4), 160))
    assert len({prompt for prompt, *_ in rows}) == 40
    said = [completion_of(prompt + text, prompt) for prompt, text, _, _ in rows]
    found = verify_math(said, [gold for *_, gold, _ in rows])
    assert [s.value for s in found] == [score for *_, score in rows]
    assert 0.4 < sum(score for *_, score in rows) / len(rows) < 0.6
    assert len({gold[:5] for *_, gold, _ in rows if "\\" in gold or "x" in gold}) > 3


def test_a_red_gate_leaves_no_number(monkeypatch, tmp_path, capsys):
    cpu = {"cpu_ms_per_request": {"server": 1.0, "workers": 1.0, "load": 0.1}}
    for gate, status in ((GREEN, 0), (GREEN | {"wrong": 1, "green": False}, 1)):
        monkeypatch.setattr(serve, "measure", lambda _, g=gate: FOUND | cpu | {"gate": g})
        assert serve.main(["--out", str(tmp_path / str(status))]) == status
        (path,) = (tmp_path / str(status)).glob("serve-*.json")
        report = json.loads(path.read_text())
        assert ("requests_per_second" in report) == (status == 0)
        assert ("4.5 requests/s" in capsys.readouterr().out) == (status == 0)
        assert report["settings"]["group"] == 8 and report["machine"]["cores"] >= 1
