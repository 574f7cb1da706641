"""Runs the attempts as an unprivileged user; prints what each one came to, as JSON.

    python tests/escapes/driver.py ROOT bubblewrap|landlock|alone|bare|files|calls|limits [NAME ...]

`alone`: landlock on a host that forbids namespaces. `bare`: nothing is confined. `files`, `calls`,
`limits`: the landlock sandbox without this layer. TOKEN in the environment is one of the secrets.
Root becomes nobody first, with an interpreter that nobody may run. An attempt has a success where a
token comes out, its folder changes, a listener hears it, it says that it won, or its verdict is any
other than "wrong". What happens to the victim, to the driver, and what lives on shows at the end.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT, MODE, WANTED = Path(sys.argv[1]), sys.argv[2], set(sys.argv[3:])
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from escapes import files, kernel, limits, network, places, processes, verdict  # noqa: E402
from reasonrl.rewards import _box, verify_code  # noqa: E402

NOBODY = 65534
PREAMBLE = (ROOT / "tests/escapes/preamble.py").read_text()
OFF = {
    "bare": ("    libc = ctypes.CDLL(None, use_errno=True)\n", "    return ['nothing']\n"),
    "files": ("        _landlock(libc)\n", ""),
    "calls": ("    _seccomp(libc)\n", ""),
    "limits": ("    _limits(memory, cpu)\n", ""),
}


def attempts(bare: bool) -> dict[str, tuple[str, list, float]]:
    """Name -> program, tests, seconds."""
    found: dict[str, tuple[str, list, float]] = {}
    never = ["assert f() == 'never'"]
    script = [{"input": "", "output": "never"}]  # one process an attempt
    for module in (files, network, processes, kernel, limits):
        table = module.SAFE if bare else {**module.SAFE, **module.OTHER}
        place = module.__name__.rpartition(".")[2]
        tests = never if module is limits else script
        found |= {f"{place}: {name}": (body, tests, 5.0) for name, body in table.items()}
    if not bare:
        found |= {f"limits: {n}": (body, never, 1.0) for n, body in limits.ENDLESS.items()}
        tables = [(verdict.SAFE, "call"), (verdict.OTHER, "call"), (verdict.FLOATS, "float")]
        for table, kind in (*tables, (verdict.SCRIPTS, "script")):
            tests = verdict.TESTS[kind]
            found |= {f"verdict: {n}, {kind}": (body, tests, 3.0) for n, body in table.items()}
    return found


def program(body: str, place: places.Place, common: dict) -> str:
    """A whole program: the attempt as the body of f, unless it brings its own."""
    if not any(line.startswith("def f(") for line in body.splitlines()):
        body = "def f(*_):\n" + textwrap.indent(body, "    ")
    about = common | {"secret": str(place.secret), "out": str(place.out), "name": place.name}
    return f"PLACES = {about!r}\n{PREAMBLE}\n{body}\nif __name__ == '__main__': f()\n"


def worker(folder: Path) -> None:
    """The worker's files where anybody may read them, weakened as MODE says."""
    for name in ("_code_worker.py", "_confine.py"):
        text = (ROOT / "reasonrl/rewards" / name).read_text()
        if name == "_confine.py" and MODE == "alone":
            assert "libc.unshare(NAMESPACES) == 0" in text
            text = text.replace("libc.unshare(NAMESPACES) == 0", "False")
        elif name == "_confine.py" and MODE in OFF:
            old, new = OFF[MODE]
            assert old in text and "    _check()\n" in text
            text = text.replace(old, new + "    _check()\n" * (not new)).replace(
                "    _check()\n", ""
            )
        (folder / name).write_text(text)
    _box.WORKER = folder / "_code_worker.py"


def unprivileged(folder: Path) -> None:
    """Become nobody where this is root; the exit status 77 says that it cannot be done."""
    if os.getuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: /proc shows it, as to any user
    for python in (_box.PYTHON, "/usr/local/bin/python3", "/usr/bin/python3"):
        if os.access(python, os.X_OK):
            _box.PYTHON = os.path.realpath(python)
            about = "import sys; print(sys.base_prefix)"
            asked = [_box.PYTHON, "-I", "-S", "-c", about]
            sys.base_prefix = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
            return
    print("no Python here may be run by an unprivileged user")
    sys.exit(77)


def naive(body: str) -> bool:
    """Program and tests in one process, passed by its exit status."""
    text = "\n".join([body, *verdict.TESTS["call"]])
    command = [_box.PYTHON, "-I", "-S", "-c", text]
    return subprocess.run(command, capture_output=True, timeout=60).returncode == 0


def alive() -> dict[int, str]:
    """The living children of this process; orphans come to it (it is their reaper)."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            pid, rest = int(path.parent.name), path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if rest[0] != "Z" and int(rest[1]) == os.getpid():
            found[pid] = path.parent.joinpath("cmdline").read_text().replace("\0", " ")[:200]
    return found


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="escapes-", dir="/tmp"))
    worker(folder)
    folder.chmod(0o755)
    unprivileged(folder)
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
    os.environ[_box.CHOICE] = "bubblewrap" if MODE == "bubblewrap" else "landlock"
    box = _box.choose()
    victim, listeners = places.Victim(_box.PYTHON), places.Listeners(folder)
    open_file = os.open(folder / "_confine.py", os.O_RDONLY)
    os.set_inheritable(open_file, True)
    known = set(alive())
    common = {"parent": os.getpid(), "victim": victim.process.pid, "address": victim.address}
    common |= {"tcp": listeners.tcp.getsockname()[1], "udp": listeners.udp.getsockname()[1]}
    common |= {"unix": listeners.unix, "abstract": listeners.abstract, "root": str(ROOT)}
    todo = {n: a for n, a in attempts(MODE in OFF).items() if not WANTED or n in WANTED}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def run(numbered: tuple[int, str]) -> dict:
        number, name = numbered
        body, tests, seconds = todo[name]
        place = places.Place(folder, f"attempt-{number}-{os.urandom(4).hex()}")
        if not name.startswith("verdict:"):
            body = program(body, place, common)
        (score,) = verify_code([f"```python\n{body}\n```"], [tests], timeout=seconds)
        signs = []
        if (score.kind, score.value) != ("scored", 0.0):
            signs.append(f"the verdict {score.kind} {score.value}")
        told = [t for t in (place.token, victim.token, os.environ["TOKEN"]) if t in score.reason]
        if told or "WON " in score.reason:
            signs.append("it came out")
        signs += [change] if (change := place.changes()) else []
        return {"name": name, "signs": signs, "reason": score.reason, "place": place.name}

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)) + 1) as threads:
        outcomes = list(threads.map(run, enumerate(todo)))
    time.sleep(0.2)  # for what listeners are just reading
    for outcome in outcomes:
        if any(outcome["place"].encode() in heard for heard in listeners.heard):
            outcome["signs"].append("a listener heard it")
    for _ in range(100):
        left = {pid: line for pid, line in alive().items() if pid not in known}
        if not left:
            break
        time.sleep(0.02)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    tricked = {n: naive(body) for n, body in verdict.SAFE.items()} if MODE == "bare" else {}
    good = verify_code(["def f(x): return x + 1"] * 2, [["assert f(1) == 2"], ["assert f(1) == 3"]])
    facts = {
        "good": [score.value for score in good],
        "uid": os.getuid(),
        "box": box,
        "kernel": platform.release(),
        "survivors": left,
    }
    facts |= {"harm": victim.harm(), "heard": len(listeners.heard), "grown_mib": grown >> 10}
    victim.end()
    shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(facts | {"outcomes": outcomes, "tricked": tricked}))


if __name__ == "__main__":
    main()
