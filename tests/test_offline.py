"""A whole run stays on this machine: nothing connects to, or looks up, anything but loopback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

WATCHED = """
import sys

reached = []

def watch(event, args):
    if event in ("socket.connect", "socket.sendto"):
        where = args[1]
        local = not isinstance(where, tuple) or str(where[0]).startswith(("127.", "::1"))
        if not local:
            reached.append((event, where))
    elif event in ("socket.getaddrinfo", "socket.gethostbyname"):
        if str(args[0]) not in ("localhost", "127.0.0.1", "::1", "None"):
            reached.append((event, args[0]))

sys.addaudithook(watch)
from reasonrl.cli import main

small = ["task_options={terms: 3, ops: '+-', mod: 7, low: 0, high: 6, style: compact}"]
small += ["model_options={layers: 1, width: 32, heads: 2}", "max_completion_length=12"]
small += ["dtype=fp32", "threads=1"]
run = ["train", "reasonflux", *small, "steps=1", "cold_start_steps=2", "prompts_per_step=2"]
run += ["group=2", "eval_problems=4", "algo.prm_problems=4", "algo.prm_steps=2", "--out", "run"]
label = ["prm", "label", "tiny", *small, "--problems", "4", "--group", "2", "--out", "rows.jsonl"]
train = ["prm", "train", "rows.jsonl", "model=run/checkpoint-1", "steps=2", "delimiter=';'"]
train += ["--out", "prm", "--quiet"]
score = ["score", "prm", "rows.jsonl", "--out", "scored.jsonl"]
for command in (run, label, train, score, ["report", "run"]):
    assert main(command) == 0, command
if "PROBE" in __import__("os").environ:  # the watch itself must see a connection
    import socket

    try:
        socket.create_connection(("192.0.2.1", 9), timeout=0.01)
    except OSError:
        pass
print("REACHED", reached)
"""


def outside(folder: Path, **more: str) -> str:
    environment = {**os.environ, **more, "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1]


def test_nothing_leaves_the_machine(tmp_path):
    assert outside(tmp_path) == "REACHED []"


def test_the_watch_sees(tmp_path):
    assert "192.0.2.1" in outside(tmp_path, PROBE="1")
