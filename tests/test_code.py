"""Programs are graded by their tests, and no hostile one gets out, gets through or gets away."""

import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
from escapes.places import descendants

from reasonrl import doctor
from reasonrl.records import InputError
from reasonrl.rewards import _box as module
from reasonrl.rewards import verify_code
from reasonrl.tasks import make_task

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(params=module.NAMES)
def box(request, require, monkeypatch) -> str:
    """Each sandbox in turn, as far as it works here."""
    require(request.param, module.trouble(request.param))
    monkeypatch.setenv(module.CHOICE, request.param)
    return request.param


def one(program, tests, timeout=3.0, fence=True):
    text = f"Here it is.\n```python\n{program}\n```\n" if fence else program
    return verify_code([text], [tests], timeout=timeout)[0]


ADD = "def f(a, b):\n    return a + b"


@pytest.mark.parametrize(
    ("program", "tests", "value"),
    [
        (ADD, ["assert f(1, 2) == 3", "assert f('a', 'b') == 'ab'"], 1.0),
        (ADD, ["assert f(1, 2) == 3", "assert f(1, 2) == 4"], 0.5),
        (ADD, "assert f(1, 2) == 3\nassert f(0, 0) == 1\nassert f(1, 1) == 2", 2 / 3),
        (ADD, "def check(g):\n    assert g(1, 2) == 3\ncheck(f)", 1.0),
        (ADD, "def check(g):\n    assert g(1, 2) == 4\ncheck(f)", 0.0),
        (ADD, "import math\nx = 2\nassert math.isclose(f(x, 0.5), 2.5)", 1.0),
        (ADD, {"inputs": [[1, 2], [3, 4]], "outputs": [3, 8], "fn_name": "f"}, 0.5),
        (ADD, '{"inputs": [[1, 2]], "outputs": [3], "fn_name": "f"}', 1.0),
        ("print(int(input()) * 2)", [{"input": "4\n", "output": "8"}], 1.0),
        ("print(int(input()) * 2)", {"inputs": ["4", "5"], "outputs": ["8\n", "11"]}, 0.5),
        ("import sys\nprint('x')\nsys.exit()", [{"input": "", "output": "x"}], 1.0),
        ("def f(n):\n    yield from range(n)", ["assert list(f(3)) == [0, 1, 2]"], 1.0),
        ("class A:\n    def __init__(s, n): s.n = n\n    def twice(s): return 2 * s.n",
         ["assert A(4).twice() == 8", "assert A(3).n == 3"], 1.0),
        ("def f(): raise KeyError('k')", ["try:\n    f()\nexcept KeyError:\n    pass\nassert True"],
         1.0),
        ("def f(): return {1: (2.5, {3}), 'k': [None, True, b'x', 10**400]}",
         ["assert f() == {1: (2.5, {3}), 'k': [None, True, b'x', 10**400]}"], 1.0),
        ("def f(): return float('nan')", ["x = f()\nassert x != x"], 1.0),
        ("import collections, re, math, itertools, json, random, string, heapq\ndef f(): return 1",
         ["assert f() == 1"], 1.0),
    ],
)  # fmt: skip
def test_the_share_of_tests_passed(program, tests, value, box):
    score = one(program, tests)
    assert score.kind == "scored" and score.value == pytest.approx(value), score


def test_what_the_program_is():
    tests = ["assert f(1, 2) == 3"]
    assert one(ADD, tests, fence=False).value == 1.0
    wrong = "```python\ndef f(a, b): return 0\n```"
    assert one(f"{wrong}\nbetter:\n```py\n{ADD}\n```", tests, fence=False).value == 1.0
    assert one(f"<think>```python\n{ADD}\n```</think> no", tests, fence=False).value == 0.0
    none = one("   ", tests, fence=False)
    assert none.value == 0.0 and "no program" in none.reason


HOSTILE = {
    "reads a file": "def f(): return open('/etc/passwd').read()",
    "lists a folder": "import os\ndef f(): return os.listdir('/')",
    "writes a file": "def f():\n    open('/tmp/reasonrl_was_here', 'w').write('x')\n    return 1",
    "makes a folder": "import os\ndef f():\n    os.mkdir('/tmp/reasonrl_was_here')\n    return 1",
    "reads the parent": "import os\ndef f(): return open(f'/proc/{os.getppid()}/environ').read()",
    "reads its maps": "def f(): return open('/proc/self/maps').read()",
    "forks": "import os\ndef f():\n    os.fork()\n    return 1",
    "runs a program": "import os\ndef f():\n    os.execv('/bin/true', ['true'])\n    return 1",
    "starts a process": "import subprocess\ndef f(): return subprocess.run(['id']).returncode + 1",
    "opens a socket": "import socket\ndef f():\n    socket.socket()\n    return 1",
    "opens a unix socket": "import socket\ndef f():\n    socket.socketpair()\n    return 1",
    "kills its parent": "import os\ndef f():\n    os.kill(os.getppid(), 9)\n    return 1",
    "kills everybody": "import os\ndef f():\n    os.kill(-1, 9)\n    return 1",
    "kills its group": "import os\ndef f():\n    os.killpg(0, 9)\n    return 1",
    "unshares": "import ctypes\nlibc = ctypes.CDLL(None)\ndef f():\n"
    "    assert libc.unshare(0x10000000) == 0\n    return 1",
    "traces": "import ctypes\ndef f():\n    assert ctypes.CDLL(None).ptrace(0, 0, 0, 0) == 0\n"
    "    return 1",
    "asks by number": "import ctypes\ndef f():\n"
    "    assert ctypes.CDLL(None).syscall(41, 2, 1, 0) >= 0\n    return 1",
    "makes a memory file": "import os\ndef f():\n    os.memfd_create('x')\n    return 1",
    "lifts its limits": "import resource\ndef f():\n"
    "    resource.setrlimit(resource.RLIMIT_AS, (-1, -1))\n    return 1",
    "changes its user": "import os\ndef f():\n    os.setuid(0)\n    return 1",
    "leaves with success": "import os\ndef f(): os._exit(0)",
    "leaves at once": "import sys\nsys.exit(0)",
    "leaves when deleted": "import os\nclass D:\n    def __del__(s): os._exit(0)\nd = D()\ndel d",
    "eats memory": "def f(): return len([0] * (1 << 34)) and 1",
    "overflows the stack": "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()",
    "crashes": "import ctypes\ndef f(): return ctypes.string_at(0)",
    "equals everything": "class E:\n    def __eq__(s, o): return True\n"
    "    def __ne__(s, o): return False\ndef f(): return E()",
    "is an int that equals everything": "class E(int):\n    def __eq__(s, o): return True\n"
    "def f(): return E(5)",
    "lends a builtin": "def abs(x): return 0\ndef len(x): return 1\ndef f(): return 5",
    "changes builtins": "import builtins\nbuiltins.int.real\nbuiltins.abs = lambda x: 0\n"
    "def f(): return 5",
    "patches ast": "import ast, json\nast.Assert = int\n"
    "json.dumps = lambda x: '{\"verdict\": [\"\"]}'\ndef f(): return 5",
    "writes a verdict": "import os\nos.write(3, b'{\"verdict\": [\"\"]}\\n')\n"
    "os.write(1, b'{\"verdict\": [\"\"]}\\n')\nfor fd in range(3, 20):\n    try:\n"
    "        os.write(fd, b'{\"verdict\": [\"\"]}\\n')\n    except OSError: pass\n"
    "def f(): return 5",
    "writes rubbish": "import os\nfor fd in range(3, 20):\n    try:\n"
    "        os.write(fd, b'[[[[\\n' * 9)\n    except OSError: pass\ndef f(): return 5",
    "closes everything": "import os\nos.closerange(0, 64)\ndef f(): return 1",
    "answers with a flood": "def f(): return 'x' * (1 << 26)",
    "a bottomless answer": "a = []\na.append(a)\ndef f(): return a",
}  # fmt: skip


@pytest.mark.parametrize("program", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_program_scores_nothing_and_does_nothing(program, box):
    before = set(os.listdir("/tmp"))
    score = one(program, ["assert f() == 1"], timeout=5.0)
    assert (score.kind, score.value) == ("scored", 0.0), score
    assert "reasonrl_was_here" not in set(os.listdir("/tmp")) - before
    assert one(ADD, ["assert f(1, 2) == 3"]).value == 1.0  # and the next one is graded as ever


@pytest.mark.parametrize(
    "program",
    ["def f():\n    while True: pass", "import time\ntime.sleep(99)", "def f(): return 10**10**9"],
)
def test_a_program_without_end_is_wrong_in_time(program, box):
    score = one(program, ["assert f() == 1"], timeout=0.5)
    assert score.value == 0.0 and "timeout" in score.reason


def test_a_test_led_astray_by_a_value_is_the_programs_fault(monkeypatch):
    """A huge number keeps the tests themselves busy: wrong, not unscorable."""
    real = module.Process.receive
    monkeypatch.setattr(
        module.Process, "receive", lambda self, seconds: real(self, min(seconds, 2.0))
    )
    score = one("def f(): return 10**9", ["assert sum(1 for _ in range(f())) == 1"])
    assert score.value == 0.0 and "did not come to an end" in score.reason


def test_tests_kept_busy_to_their_limit_are_the_programs_fault(box):
    """The CPU limit kills the tests here before the wall clock does; that is nobody outside."""
    score = one("def f(): return 10**10", ["assert sum(1 for _ in range(f())) == 1"], timeout=0.1)
    assert score.value == 0.0 and "did not come to an end" in score.reason, score


def test_a_plain_value_that_keeps_the_tests_busy_is_the_programs_fault(monkeypatch):
    real = module.Process.receive
    monkeypatch.setattr(
        module.Process, "receive", lambda self, seconds: real(self, min(seconds, 2.0))
    )
    tests = ["assert sum(1 for _ in range(N)) == 1"]
    score = one("N = 10**10", tests)
    assert score.value == 0.0 and "did not come to an end" in score.reason
    score = one("N = 10**10", ["while True: pass", *tests])  # these would not end without it either
    assert score.kind == "unscorable" and "neither asserts" in score.reason
    score = one("N = 10**10", ["x = iter(int, 1)\nassert 5 in x"])
    assert score.kind == "unscorable" and "did not come to an end" in score.reason


@pytest.mark.parametrize(
    ("tests", "reason"),
    [
        ([], "expected tests"),
        (None, "expected tests"),
        (["assert f(("], "never closed"),
        (["def check(f):\n    assert f(1)"], "neither asserts"),
        ([{"input": 3, "output": "x"}], "test 1"),
        ('{"inputs": [1]', "not valid JSON"),
        ({"inputs": [1], "outputs": []}, "same length"),
        ({"inputs": [1], "outputs": [1], "fn_name": "os.system"}, "fn_name"),
        (["assert f(lambda x: x, 1) == 2"], "only plain values can cross"),
    ],
)
def test_tests_that_are_none_make_it_unscorable(tests, reason):
    score = one(ADD, tests)
    assert score.kind == "unscorable" and score.value is None and reason in score.reason, score


@pytest.mark.parametrize("victim", ["all", "the last"])
def test_a_process_killed_from_outside_is_infra(victim, monkeypatch, box):
    """All of its processes, or only the innermost one, which bubblewrap reports as a status."""
    real = module.Process.send

    def killed(self, message):
        if self.kind == "code":
            found = descendants(self.process.pid)
            for pid in sorted(found) if victim == "all" else [max(found)]:
                os.kill(pid, signal.SIGKILL)
        real(self, message)

    monkeypatch.setattr(module.Process, "send", killed)
    score = one(ADD, ["assert f(1, 2) == 3"])
    assert score.kind == "infra" and "killed from outside" in score.reason


def weakened(folder: Path, monkeypatch, *changes: tuple[str, str]) -> None:
    """The worker with a text of _confine.py changed."""
    for name in ("_code_worker.py", "_confine.py"):
        text = (ROOT / "reasonrl" / "rewards" / name).read_text()
        for old, new in changes if name == "_confine.py" else ():
            assert old in text
            text = text.replace(old, new)
        (folder / name).write_text(text)
    folder.chmod(0o755)
    monkeypatch.setattr(module, "WORKER", folder / "_code_worker.py")


LAYERS = {
    "landlock": ("        _landlock(libc)\n", "        pass\n", "Landlock did not take effect"),
    "seccomp": ("    _seccomp(libc)\n", "", "seccomp did not take effect"),
    "no seccomp": ("machine not in ARCHITECTURES", "True", "no system call list for"),
    "limits": ("setrlimit(kind, pair)", "setrlimit(kind, (1, pair[1]))", "a resource limit"),
    "no landlock": ("if abi < 1", "if True", "this kernel has no Landlock"),
    "parent": ("os.getppid() != parent", "True", "outlive its parent"),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_without_a_layer_nothing_is_run(name, tmp_path, monkeypatch):
    old, new, reason = LAYERS[name]
    weakened(tmp_path, monkeypatch, (old, new))
    monkeypatch.setenv(module.CHOICE, "landlock")
    with pytest.raises(InputError, match=reason):
        one("open('/etc/passwd').read()\ndef f(): return 1", ["assert f() == 1"])
    (line,) = [c for n, c in doctor.CHECKS if n == "code sandbox"]
    found = doctor._tried("code sandbox", line)
    assert found.state == "missing" and reason in found.text


def test_the_sandbox_is_chosen_and_told(monkeypatch, require, tmp_path):
    """bubblewrap first; where it is missing or does not work, landlock, with the reason."""
    require("landlock", module.trouble("landlock"))
    monkeypatch.delenv(module.CHOICE, raising=False)
    (line,) = [c for n, c in doctor.CHECKS if n == "code sandbox"]
    monkeypatch.setenv("PATH", str(tmp_path))
    module._chosen.cache_clear()
    assert module.choose() == ("landlock", "bubblewrap: bwrap is not installed")
    assert line().startswith("landlock (bubblewrap: bwrap is not installed): limits, ")
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    module._chosen.cache_clear()
    name, why = module.choose()
    assert name == "landlock" and "the process ended (status 1)" in why
    arguments = f"tests {1 << 30} 9 bubblewrap 1"  # a bwrap that builds nothing
    python, worker = shlex.quote(sys.executable), shlex.quote(str(module.WORKER))
    broken.write_text(f"#!/bin/sh\nexec {python} -I -S -B {worker} {arguments}\n")
    assert "bubblewrap made no process namespace" in str(module.trouble("bubblewrap"))
    monkeypatch.setenv(module.CHOICE, "docker")
    with pytest.raises(InputError, match="REASONRL_SANDBOX: expected bubblewrap or landlock"):
        one(ADD, ["assert f(1, 2) == 3"])
    module._chosen.cache_clear()


def test_bubblewrap_is_preferred(monkeypatch, require):
    require("bubblewrap", module.trouble("bubblewrap"))
    monkeypatch.delenv(module.CHOICE, raising=False)
    module._chosen.cache_clear()
    assert module.choose() == ("bubblewrap", "it works")
    with module.Process("code", 1.0, module.choose()) as process:
        assert process.layers == ["limits", "bubblewrap", "seccomp"]


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="one entry for each"):
        verify_code(["a"], [])
    with pytest.raises(ValueError, match="timeout"):
        verify_code(["a"], ["assert 1"], timeout=0)
    with pytest.raises(ValueError, match=r"completions\[0\]"):
        verify_code([None], ["assert 1"])  # type: ignore[list-item]
    assert verify_code([], []) == []


def test_the_task_grades_its_worked_programs_and_their_slips():
    task = make_task("code")
    problems = task.problems("train", 0, 4)
    worked = [task.worked(p) for p in problems]
    assert [s.value for s in task.grades(problems, worked)] == [1.0] * 4
    spoiled = [w.replace("return ", "return 1 + ") for w in worked]
    assert [s.value for s in task.verdicts(problems, spoiled)] == [0.0] * 4
    shown = problems[0].prompt[0]["content"]
    assert not any(t.split("(", 1)[1].split(")")[0] in shown for t in problems[0].extra["tests"])
    content = {(p.extra["rule"], p.extra["end"]) for p in task.problems("test", 0, 50)}
    assert len(content) == 50
    train = {(p.extra["rule"], p.extra["end"]) for p in task.problems("train", 0, 200)}
    assert not content & train
    with pytest.raises(InputError, match="tests"):
        make_task("code", tests=0)
