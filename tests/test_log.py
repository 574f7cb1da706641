"""The run log: valid JSON always, resume drops the torn and the future, columns keep types."""

import io
import json
import math
import os
import re
import subprocess
import sys

import pyarrow.parquet
import pytest
import torch

from reasonrl.config import Config, read
from reasonrl.log import RunLog, json_row, read_rows
from reasonrl.log_view import Lines, Pace, Panels, View, printable, view
from reasonrl.progress import duration, phase
from reasonrl.records import InputError
from reasonrl.report.gather import read_table


def run_log(path, resume_step=0, **options):
    return RunLog(path, Config(**options), quiet=True, resume_step=resume_step)


def rows(path, name="metrics.jsonl"):
    return [json.loads(line) for line in (path / name).read_text().splitlines()]


def test_a_step_is_one_json_object(tmp_path):
    log = run_log(tmp_path / "run", steps=2)
    with log.phase("rollout"):
        pass
    with log.phase("update"), log.phase("save"):
        pass
    log.step(1, 2, {"reward": 0.5, "loss": torch.tensor(0.25), "num_tokens": 7, "name": "x"})
    log.step(2, 2, {"reward": 0.75})
    first, second = rows(tmp_path / "run")
    assert list(first)[0] == "step"
    assert {k: first[k] for k in ("step", "reward", "loss", "num_tokens", "name")} == {
        "step": 1,
        "reward": 0.5,
        "loss": 0.25,
        "num_tokens": 7,
        "name": "x",
    }
    assert {k for k in first if k.startswith("time/")} == {
        "time/rollout",
        "time/update",
        "time/save",
    }
    assert second == {"step": 2, "reward": 0.75}
    assert read(tmp_path / "run" / "config.yaml") == Config(steps=2)


def test_phases_add_up_and_survive_errors(tmp_path, monkeypatch):
    clock = iter([0.0, 1.5, 10.0, 10.25, 20.0, 21.0])
    monkeypatch.setattr("reasonrl.log.time.perf_counter", lambda: next(clock))
    log = run_log(tmp_path)
    with log.phase("rollout"):
        pass
    with log.phase("rollout"):
        pass
    with pytest.raises(KeyError), log.phase("update"):
        raise KeyError
    log.step(1, 1, {})
    assert rows(tmp_path) == [{"step": 1, "time/rollout": 1.75, "time/update": 1.0}]


def test_what_json_has_not_becomes_null_and_is_named(tmp_path):
    log = run_log(tmp_path)
    log.step(
        1, 1, {"loss": math.nan, "kl": -math.inf, "entropy": torch.tensor(math.nan), "reward": 1.0}
    )
    text = (tmp_path / "metrics.jsonl").read_text()
    assert "NaN" not in text and "Infinity" not in text
    assert rows(tmp_path) == [
        {
            "step": 1,
            "loss": None,
            "kl": None,
            "entropy": None,
            "reward": 1.0,
            "nonfinite_metrics": ["loss", "kl", "entropy"],
        }
    ]
    assert json_row({"a": 1.0}) == {"a": 1.0}


def test_resume_drops_the_torn_tail_and_everything_beyond_the_checkpoint(tmp_path):
    log = run_log(tmp_path)
    log.evaluation(0, {"eval/accuracy": 0.25})
    for step in (1, 2, 3):
        log.completions(step, {"step": [step], "prompt": ["p"], "completion": ["c"]})
        log.step(step, 5, {"reward": float(step)})
    log.evaluation(3, {"eval/accuracy": 0.5})
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "rew')
    (tmp_path / "completions" / "completions_00004.tmp").write_bytes(b"half")
    log = run_log(tmp_path, resume_step=2)
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
    assert rows(tmp_path, "evals.jsonl") == [{"step": 0, "eval/accuracy": 0.25}]
    assert sorted(os.listdir(tmp_path / "completions")) == [
        "completions_00001.parquet",
        "completions_00002.parquet",
    ]
    log.step(3, 5, {"reward": 9.0})
    assert [row["reward"] for row in rows(tmp_path)] == [1.0, 2.0, 9.0]
    run_log(tmp_path)
    assert rows(tmp_path) == [] and os.listdir(tmp_path / "completions") == []


def test_every_torn_tail_is_cut_off(tmp_path):
    log = run_log(tmp_path)
    log.step(1, 2, {"reward": 1.0})
    log.step(2, 2, {"reward": 2.0})
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    start = whole.index(b"\n") + 1
    for cut in range(start, len(whole) - 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:cut])
        run_log(tmp_path, resume_step=1)
        assert rows(tmp_path) == [{"step": 1, "reward": 1.0}]
    (tmp_path / "metrics.jsonl").write_bytes(whole.replace(b'{"step": 1', b'{"step" 1'))
    with pytest.raises(
        InputError, match="metrics.jsonl: row 1: expected a JSON object with a step"
    ):
        read_rows(tmp_path / "metrics.jsonl")


def test_the_cold_start_has_a_file_of_its_own_and_resumes(tmp_path):
    log = run_log(tmp_path)
    for step in (1, 2, 3):
        log.cold_step(step, 5, {"loss": float(step)})
    again = run_log(tmp_path)
    again.cold_step(3, 5, {"loss": 30.0})
    again.cold_step(4, 5, {"loss": 40.0})
    assert [row["loss"] for row in rows(tmp_path, "cold_start.jsonl")] == [1.0, 2.0, 30.0, 40.0]
    assert not (tmp_path / "metrics.jsonl").exists()


def test_completions_keep_their_types_whatever_a_step_holds(tmp_path):
    log = run_log(tmp_path)
    full = {
        "step": [1, 1],
        "prompt": ["p", "q\ud800"],
        "completion": ["a", ""],
        "reward": [1.0, None],
        "advantage": [0.5, -0.5],
        "steps": [[(0, 1), (1, 3)], []],
        "step_rewards": [[1.0, None], []],
        "step_advantages": [[0.5, 0.25], []],
        "finished": [True, False],
        "accuracy_reward": [1, 0],
    }
    empty = {name: values[:1] for name, values in full.items()} | {
        "reward": [None],
        "steps": [[]],
        "step_rewards": [[]],
        "step_advantages": [[]],
        "accuracy_reward": [None],
    }
    log.completions(1, full)
    log.completions(2, empty)
    paths = [tmp_path / "completions" / f"completions_0000{k}.parquet" for k in (1, 2)]
    first, second = map(pyarrow.parquet.read_table, paths)
    assert first.schema.equals(second.schema)
    assert first.column("steps").to_pylist() == [[[0, 1], [1, 3]], []]
    assert first.column("step_rewards").to_pylist() == [[1.0, None], []]
    assert first.column("reward").to_pylist() == [1.0, None]
    assert first.column("prompt").to_pylist() == ["p", "q?"]
    assert first.column("finished").to_pylist() == [True, False]


def test_a_row_is_on_the_disk_when_the_process_dies(tmp_path):
    code = (
        "import os, sys; from reasonrl.log import RunLog; from reasonrl.config import Config\n"
        f"log = RunLog({str(tmp_path)!r}, Config(), quiet=True)\n"
        "log.step(1, 2, {'reward': 1.0}); os._exit(9)"
    )
    env = os.environ | {"PYTHONPATH": ":".join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 9
    assert rows(tmp_path) == [{"step": 1, "reward": 1.0}]


def test_completions_are_on_the_disk_before_they_have_their_name(tmp_path, monkeypatch):
    log, seen = run_log(tmp_path), []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda n: (seen.append(os.fstat(n).st_ino), sync(n)))
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(str(b)), replace(a, b)))
    log.completions(1, {"step": [1], "prompt": ["p"], "completion": ["c"]})
    path = tmp_path / "completions" / "completions_00001.parquet"
    assert seen == [path.stat().st_ino, str(path)]


def test_an_unwritable_folder_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="file/run: cannot be written"):
        run_log(tmp_path / "file" / "run")


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_backend_names_its_package(tmp_path, monkeypatch, name):
    for module in ("tensorboard", "torch.utils.tensorboard", "wandb", "trackio"):
        monkeypatch.setitem(sys.modules, module, None)
    message = f"log.{name}: the package {name} is not installed"
    with pytest.raises(InputError, match=message):
        run_log(tmp_path, log={name: True})


def test_a_backend_gets_the_finite_numbers_of_every_step(tmp_path, monkeypatch):
    calls = []

    class Fake:
        init = staticmethod(lambda **options: calls.append(("init", options["config"]["steps"])))
        log = staticmethod(lambda metrics, step: calls.append((step, metrics)))
        finish = staticmethod(lambda: calls.append("finish"))

    monkeypatch.setitem(sys.modules, "trackio", Fake)
    log = run_log(tmp_path, steps=3, log={"trackio": True})
    log.step(1, 3, {"reward": 1.0, "loss": math.nan, "text": "x", "num_tokens": 3})
    log.close()
    assert calls == [("init", 3), (1, {"reward": 1.0, "num_tokens": 3}), "finish"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_view_fits_the_stream(tmp_path, monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert type(view(True, Terminal())) is View
    assert type(view(False, io.StringIO())) is Lines
    made = view(False, Terminal())
    assert type(made) is Panels
    made.close(True, tmp_path)
    monkeypatch.setenv("TERM", "dumb")
    assert type(view(False, Terminal())) is Lines


def test_plain_lines(tmp_path, monkeypatch):
    clock = iter([100.0, 102.0])
    monkeypatch.setattr("reasonrl.log_view.time.monotonic", lambda: next(clock))
    stream = io.StringIO()
    log = RunLog(tmp_path, Config(), stream=stream)
    log.step(1, 100, {"reward": 0.5, "learning_rate": 3e-5, "loss": math.nan, "other": 1})
    log.step(2, 100, {"reward": 0.512345})
    log.evaluation(2, {"eval/accuracy": 0.625})
    log.note("evil \x1b[31m")
    log.close(complete=False)
    assert stream.getvalue().splitlines() == [
        "RL 1/100  reward 0.5  loss nan  learning_rate 3e-05",
        "RL 2/100  reward 0.5123  left 3m16s",
        "evaluation at step 2  eval/accuracy 0.625",
        "evil \u00b7[31m",
        f"stopped: {tmp_path} goes on with --resume",
    ]


def test_the_panel_shows_phase_metrics_and_a_harmless_completion(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("NO_COLOR", "1")
    stream = Terminal()
    log = RunLog(tmp_path, Config(), stream=stream)
    with log.phase("rollout"), phase("sampling", 8, "completions") as part:
        part.add(2)
        log.view.live.refresh()
    row = {"reward": 0.25, "num_tokens": 500, "step_time": 2.0}
    log.step(1, 4, row, sample="7+1=8\n\x1b]0;owned\x07")
    log.evaluation(1, {"eval/accuracy": 0.5})
    log.close()
    shown = stream.getvalue()
    for part in ("RL 1/4", "rollout", "reward", "0.25", "7+1=8", "eval/accuracy 0.5", "done"):
        assert part in shown
    assert "sampling 2/8 completions" in shown and "250 tokens/s" in shown
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown).splitlines()
    assert any(line.split() == ["reward", "0.25"] for line in lines)
    assert "\x1b]0;" not in shown and "\x07" not in shown
    assert "\x1b[1m" in shown or "\x1b[3" not in shown  # NO_COLOR: no colours


def test_quiet_says_nothing(tmp_path, capsys):
    log = RunLog(tmp_path, Config(), quiet=True)
    log.step(1, 1, {"reward": 1.0})
    log.note("x")
    log.close()
    assert capsys.readouterr().out == ""


def test_words_for_time_and_text():
    assert [duration(s) for s in (0.4, 59.4, 60, 3599, 3600, 90_061)] == [
        "0s",
        "59s",
        "1m00s",
        "59m59s",
        "1h00m",
        "25h01m",
    ]
    assert printable("a\tb\r\n\x1b[0m\u202e") == "a\u00b7b\u00b7\n\u00b7[0m\u00b7"


def test_the_pace_of_the_last_steps(monkeypatch):
    clock = iter(range(100, 200, 10))
    monkeypatch.setattr("reasonrl.log_view.time.monotonic", lambda: next(clock))
    pace = Pace()
    assert pace.words("cold start", 1, 2, {"tokens": 30.0, "step_time": 3.0}) == ["10 tokens/s"]
    row = {"tokens": 7.0, "num_tokens": 50, "step_time": 2.0}  # num_tokens: of the run so far
    assert pace.words("RL", 1, 5, row) == ["25 tokens/s"]
    said = pace.words("RL", 2, 5, row | {"num_tokens": 150})
    assert said == ["50 tokens/s", "left 30s"]
    resumed = Pace()
    assert resumed.words("RL", 8, 9, row) == []  # the tokens of eight steps, the time of one
    assert resumed.words("RL", 9, 9, row | {"num_tokens": 70}) == ["10 tokens/s", "left 0s"]


def test_steps_are_called_what_they_are(tmp_path):
    for algorithm, name in (("sft", "SFT"), ("dpo", "DPO"), ("prime", "RL")):
        stream = io.StringIO()
        log = RunLog(tmp_path / algorithm, Config(algorithm=algorithm), stream=stream)
        log.step(1, 2, {"loss": 0.5})
        assert stream.getvalue().startswith(f"{name} 1/2  loss 0.5")


def test_a_flipped_bit_in_the_completions_is_seen(tmp_path):
    """Pages carry checksums: damaged text is never shown as what a model wrote."""
    log = RunLog(tmp_path / "run", Config(model="tiny", task="arithmetic"), quiet=True)
    words = [f"3+{i}=8;so the answer is {i * 7919}" for i in range(400)]
    log.completions(1, {"step": [1] * 400, "completion": words, "reward": [0.5] * 400})
    (file,) = (tmp_path / "run" / "completions").glob("*.parquet")
    whole = file.read_bytes()
    assert [row["completion"] for row in read_table(file)] == words
    caught = 0
    for at in range(40, len(whole) // 2, 97):  # pages; the footer is behind them
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        try:
            assert [row["completion"] for row in read_table(file)] == words, at
        except InputError:
            caught += 1
    assert caught > 10
