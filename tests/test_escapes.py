"""No program gets out of the sandbox: hundreds of attempts as an unprivileged user, each looked at
from outside; and without a sandbox, or one layer of it, the same attempts succeed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from escapes import files, kernel, limits, network, processes, verdict
from escapes.places import descendants

from reasonrl.rewards import _box

ROOT = Path(__file__).resolve().parent.parent


def driven(require, mode: str, *names: str) -> dict:
    """What the attempts came to: tests/escapes/driver.py in a process of its own."""
    command = [sys.executable, str(ROOT / "tests/escapes/driver.py"), str(ROOT), mode, *names]
    environment = os.environ | {"TOKEN": f"PARENT-{os.urandom(8).hex()}"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    require("an unprivileged user", done.stdout if done.returncode == 77 else None)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["uid"] != 0 and found["good"] == [1.0, 0.0]
    return found


def test_every_attempt_is_a_program():
    """An attempt with a slip in it would fail for the wrong reason."""
    count = 0
    for module in (files, kernel, limits, network, processes, verdict):
        for table in ("SAFE", "OTHER", "ENDLESS", "FLOATS", "SCRIPTS"):
            for body in getattr(module, table, {}).values():
                ast.parse("def f():\n" + textwrap.indent(body, "    "))
                count += 1
    assert count >= 360


@pytest.mark.parametrize("name", _box.NAMES)
def test_nothing_gets_out(name, require):
    require(name, _box.trouble(name))
    found = driven(require, name)
    outcomes = found["outcomes"]
    assert found["box"][0] == name and len(outcomes) >= 350
    escaped = [o for o in outcomes if o["signs"]]
    assert not escaped, escaped
    assert (found["harm"], found["survivors"], found["heard"]) == ("", {}, 0)
    assert found["grown_mib"] < 256  # by floods of answers


def test_nothing_gets_out_where_the_host_forbids_namespaces(require):
    require("landlock", _box.trouble("landlock"))
    names = [f"network: {name}" for name in network.SAFE]
    names += [f"processes: {name}" for name in processes.SAFE]
    names += [f"limits: {name}" for name in limits.SAFE]
    found = driven(require, "alone", *names)
    assert len(found["outcomes"]) == len(names)
    assert not [o for o in found["outcomes"] if o["signs"]], found["outcomes"]
    assert (found["harm"], found["survivors"], found["heard"]) == ("", {}, 0)


def test_without_a_sandbox_they_do(require):
    """Or the test above could not fail. Some depend on the host: most, and every kind of sign."""
    require("landlock", _box.trouble("landlock"))
    found = driven(require, "bare")
    lost = [o["name"] for o in found["outcomes"] if not o["signs"]]
    assert len(found["outcomes"]) >= 120 and len(lost) <= 20, lost
    signs = {sign for o in found["outcomes"] for sign in o["signs"]}
    assert {"it came out", "files changed", "a listener heard it"} <= signs
    assert "changed" in found["harm"]  # its priority
    assert "files: open" not in lost and "processes: the arguments of the victim" not in lost
    tricked = found["tricked"]
    assert len(tricked) >= 15 and sum(tricked.values()) >= len(tricked) - 3, tricked


OFF = {
    "files": ("files: open", "files: dots out of the library", "files: scandir"),
    "calls": ("processes: fork", "kernel: a memory file", "processes: is the victim there"),
    "limits": ("limits: 300 descriptors", "limits: 2 GiB of addresses", "limits: 2 GiB by malloc"),
}


@pytest.mark.parametrize("mode", OFF)
def test_every_layer_is_needed(mode, require):
    require("landlock", _box.trouble("landlock"))
    outcomes = driven(require, mode, *OFF[mode])["outcomes"]
    assert len(outcomes) == len(OFF[mode]) and sum(bool(o["signs"]) for o in outcomes) >= 2, (
        outcomes
    )


ORPHAN = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
from reasonrl.rewards import _box
process = _box.Process("code", 60.0, _box.Box(sys.argv[2], ""))
process.send({"do": "execute", "code": "import time\\nwhile True: time.sleep(600)"})
print(process.process.pid, flush=True)
time.sleep(600)
"""


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("name", _box.NAMES)
def test_a_program_dies_with_a_killed_trainer(name, require):
    require(name, _box.trouble(name))
    command = [sys.executable, "-c", ORPHAN, str(ROOT), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        pids = descendants(int(trainer.stdout.readline()))
        assert len(pids) == (3 if name == "bubblewrap" else 1) and all(map(alive, pids))
        trainer.kill()
    for _ in range(3000):
        if not any(map(alive, pids)):
            return
        time.sleep(0.01)
    pytest.fail(f"still alive: {[p for p in pids if alive(p)]}")
