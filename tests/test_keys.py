"""Keys come from the environment and show nowhere: every file, stream and message is searched."""

from __future__ import annotations

import base64
import importlib
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow.parquet
import pytest
from fault_server import MODEL, FaultServer, completion, verdict, whole

from reasonrl import InputError, keys
from reasonrl import config as configs
from reasonrl.chat import ChatClient
from reasonrl.cli import main
from reasonrl.report import write

ROOT = Path(__file__).resolve().parent.parent
CANARY = "canary/0123-4567+89ab"
SMALL = [
    *("task=arithmetic", "cold_start_steps=2", "steps=2", "group=4", "prompts_per_step=2"),
    *("max_completion_length=6", "eval_problems=2", "model_options.layers=1", "save.every=1"),
    *("model_options.width=32", "model_options.heads=2", "filter.rounds=1"),
    *("algo.style=full", "algo.votes=1", "algo.max_tokens=16"),
]


def spellings(secret: str) -> list[str]:
    return [
        secret,
        secret.replace("/", "\\/"),
        json.dumps(secret)[1:-1],
        secret.replace("/", "%2F").replace("+", "%2B"),
        "".join(f"\\u{ord(c):04x}" for c in secret),
        secret.replace("-", "\\u002d"),
        base64.b64encode(secret.encode()).decode().rstrip("="),
        secret[:12],
    ]


def found_in(text: str | bytes) -> list[str]:
    data = text.encode() if isinstance(text, str) else text
    return [s for s in spellings(CANARY) if s.encode() in data]


def searched(folder: Path) -> int:
    """How many files there are; none of them holds the key, packed columns included."""
    files = [p for p in folder.rglob("*") if p.is_file()]
    for path in files:
        assert not found_in(path.read_bytes()), path
        assert not found_in(str(path))
        if path.suffix == ".parquet":
            rows = pyarrow.parquet.read_table(path).to_pylist()
            assert rows and not found_in(json.dumps(rows, default=str)), path
    return len(files)


def command(*words: str, key: str = CANARY) -> subprocess.CompletedProcess[str]:
    """The `reasonrl` command in a process of its own, the key in its environment."""
    run = [sys.executable, "-c", "import sys; from reasonrl.cli import main; sys.exit(main())"]
    environment = os.environ | {"JUDGE_KEY": key, "PYTHONPATH": str(ROOT)}
    return subprocess.run([*run, *words], capture_output=True, text=True, env=environment)


async def tells(message: str, number: int):
    """A judge that repeats the key with every verdict, in ever another spelling."""
    if "[response " not in message:
        return f"the key is {CANARY}"
    inside = message.split("[response ")[1].split("\n", 1)[1].split("\n[end")[0]
    said = completion(f"the key is {CANARY}; " + verdict(message, int(len(inside) % 2)))
    text = json.dumps(said)
    escaped = spellings(CANARY)[(len(inside) + number) % 6]
    return whole(text.replace(CANARY, escaped).encode(), X_Key=CANARY)


async def refuses(message: str, _: int):
    return whole({"error": f"401: {CANARY} is no key", "headers": f"Bearer {CANARY}"}, 401)


def test_a_run_with_a_judge_holds_no_key(tmp_path):
    run = tmp_path / "run"
    with FaultServer(tells) as server:
        served = [f"algo.judge={server.url}", f"algo.judge_model={MODEL}"]
        served += ["algo.judge_key_env=JUDGE_KEY", "algo.outage=fail"]
        done = command("train", "libra", *SMALL, *served, "--out", str(run))
        assert done.returncode == 0, done.stderr
        assert server.keys == {f"Bearer {CANARY}"} and len(server.requests) > 4
        again = command("train", "libra", *SMALL, *served, "steps=3", "--resume", "--out", str(run))
        assert again.returncode == 0, again.stderr
    write([run])
    audit = command("audit", str(run))
    assert (run / "report.html").exists() and list(run.rglob("*.safetensors"))
    assert searched(tmp_path) > 12
    for each in (done, again, audit):
        assert each.stdout and not found_in(each.stdout + each.stderr)


def test_a_server_that_refuses_the_key_does_not_show_it(tmp_path):
    with FaultServer(refuses) as server:
        served = [f"algo.judge={server.url}", f"algo.judge_model={MODEL}"]
        served += ["algo.judge_key_env=JUDGE_KEY"]
        done = command("train", "libra", *SMALL, *served, "--out", str(tmp_path / "run"))
        assert done.returncode == 2 and "status 401" in done.stderr and "***" in done.stderr
        rows = tmp_path / "rows.jsonl"
        rows.write_text(json.dumps({"question": "q", "response": "r", "label": 1}) + "\n")
        words = ["judge", "bench", str(rows), "--judge", server.url, "--judge-model", MODEL]
        asked = command(*words, "--judge-key-env", "JUDGE_KEY")
        assert asked.returncode == 2 and "status 401" in asked.stderr
        assert server.keys == {f"Bearer {CANARY}"}
    for each in (done, asked):
        assert not found_in(each.stdout + each.stderr)
    searched(tmp_path)


@pytest.mark.parametrize(
    "override",
    [
        f"algo.api_key={CANARY}",
        f"api_key={CANARY}",
        f"algo.judge_key_env={CANARY}",
        f"algo.judge=http://user:{CANARY}@127.0.0.1:1/v1",
        f"algo.judge=http://{CANARY}@127.0.0.1:99999/v1",
        f"model_options.token={CANARY}",
        f"task_options.headers.authorization={CANARY}",
        f"algo.extra=[Bearer {CANARY}]",
        f"model={CANARY}",  # what the environment holds, under whatever name
        f"algo.note=asked with {CANARY} once",
    ],
)
def test_a_config_that_carries_a_key_is_refused(override, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JUDGE_KEY", CANARY)
    out = tmp_path / "run"
    more = [] if override.startswith("algo.judge=") else ["algo.judge=http://127.0.0.1:1/v1"]
    words = [*SMALL, *more, "algo.judge_model=m", override]
    assert main(["train", "libra", *words, "--out", str(out)]) == 2
    said = capsys.readouterr()
    assert override.partition("=")[0] in said.err or "key's variable" in said.err
    assert not found_in(said.err + said.out)
    assert not out.exists() or not searched(out)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(configs.load("libra", SMALL).to_yaml())
    with pytest.raises(InputError) as refused:
        key, _, value = override.partition("=")
        configs.changed(configs.read(recipe), [f"{key}={json.dumps(value)}"])
        raise InputError("only where it is used")  # a variable's name is checked by who reads it
    assert not found_in(str(refused.value))


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{CANARY}@host:1/v1",
        f"http://user:{CANARY}@host:99999/v1",
        f"http://{CANARY}@[bad/v1",
        f"ftp://user:{CANARY}@host/v1",
        f"http://host/v1?key={CANARY}",
        f"http://host/v1#{CANARY}",
    ],
)
def test_an_address_with_a_password_is_not_repeated(url):
    with pytest.raises(InputError, match="address") as refused:
        ChatClient(url, MODEL)
    assert not found_in(str(refused.value))


def test_the_name_of_a_variable_is_no_key():
    for wrong in (CANARY, "sk-canary", "lower_case", "", "A B"):
        with pytest.raises(InputError, match="its name in capitals") as refused:
            ChatClient("http://127.0.0.1:1/v1", MODEL, key_env=wrong)
        assert not wrong or wrong not in str(refused.value)


def test_what_is_hidden(monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    for spelling in spellings(CANARY)[:6]:
        assert keys.hide(f"a {spelling} b") == "a *** b"
    assert keys.hide("http://me:pa/ss@host/v1 and x@y") == "http://***@host/v1 and x@y"
    assert keys.hide("Authorization: Bearer abcdefgh") == "Authorization: ***"
    assert keys.hide("sk-abcdefgh12 hf_abcdefghij sk-ip") == "*** *** sk-ip"
    monkeypatch.setenv("SOME_API_KEY", "short")
    monkeypatch.setenv("ORDINARY", "ordinary words")
    assert keys.hide("short ordinary words") == "short ordinary words"
    keys.refuse({"a": {"last_token": True, "max_tokens": 3, "key_env": "SOME_API_KEY"}}, "x")


def test_logs_and_tracebacks_hide_them(monkeypatch, caplog, capsys):
    importlib.import_module("reasonrl.serve.listener")
    monkeypatch.setenv("SOME_TOKEN", CANARY)
    for name in ("reasonrl", "reasonrl.chat", "reasonrl.checkpoint", "reasonrl.serve"):
        log = logging.getLogger(name)
        log.warning("asked with %s", CANARY)
        try:
            raise RuntimeError(f"no {CANARY}")
        except RuntimeError:
            log.exception("failed")
    assert len(caplog.records) == 8 and "asked with ***" in caplog.text
    assert "RuntimeError: no ***" in caplog.text and not found_in(caplog.text)
    before = sys.excepthook, threading.excepthook
    monkeypatch.setattr(sys, "excepthook", before[0])
    monkeypatch.setattr(threading, "excepthook", before[1])
    keys.install()

    def fail() -> None:
        raise ValueError(f"in a thread: {CANARY}")

    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    try:
        raise KeyError(CANARY)
    except KeyError as error:
        sys.excepthook(KeyError, error, error.__traceback__)
    said = capsys.readouterr().err
    assert "in a thread: ***" in said and "KeyError: '***'" in said and not found_in(said)


def test_every_logger_of_the_package_hides():
    for path in (ROOT / "reasonrl").rglob("*.py"):
        assert path.name == "keys.py" or "getLogger(" not in path.read_text(), path
