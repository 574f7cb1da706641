"""One confined process for text that must not be trusted, and which sandbox confines it here.

    with Process("code", seconds=5.0, box=choose()) as process:
        process.send({...}); process.receive(5.0)

Two sandboxes, the first that works is used. `bubblewrap`: namespaces of its own (users, processes,
network, IPC) and a file system that holds Python's library and nothing else, read-only. `landlock`:
user namespaces where the host allows them, and Landlock for files. Both with the limits and the
list of system calls of _confine.py, both without root; every process checks its layers from inside
before it reads a word. REASONRL_SANDBOX names one of the two; where none works nothing is run.
"""

from __future__ import annotations

import functools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from reasonrl.records import InputError

WORKER = Path(__file__).with_name("_code_worker.py")
PYTHON = os.path.realpath(sys.executable)  # no virtual environment: nothing installed is needed
NAMES = ("bubblewrap", "landlock")
CHOICE = "REASONRL_SANDBOX"
MEMORY = 1 << 30  # bytes of address space
STARTUP = 30.0  # seconds a worker may take to be ready
LINE = 1 << 23  # bytes of one message, at most
INSIDE = "/worker"  # where bubblewrap shows the worker's two files


class Stopped(Exception):
    """The process gave no answer; `fault`: whether that is the completion's own doing."""

    def __init__(self, reason: str, fault: bool):
        super().__init__(reason)
        self.fault = fault


class Box(NamedTuple):
    """The sandbox in use, and in words why no better one is."""

    name: str
    why: str


def choose() -> Box:
    """The sandbox that works here; InputError, with the reasons, where none does."""
    return _chosen(os.environ.get(CHOICE, ""), str(WORKER))


@functools.lru_cache
def _chosen(wanted: str, _: str) -> Box:
    if wanted not in ("", *NAMES):
        raise InputError(f"{CHOICE}: expected bubblewrap or landlock, got {wanted!r}")
    tried = []
    for name in [wanted] if wanted else NAMES:
        missing = trouble(name)
        if missing is None:
            return Box(name, "; ".join(tried) or (f"{CHOICE} names it" if wanted else "it works"))
        tried.append(f"{name}: {missing}")
    raise InputError(f"model-written code cannot be confined here: {'; '.join(tried)}")


def trouble(name: str) -> str | None:
    """Why a sandbox does not work here, found by starting it; None where it does."""
    if name == "bubblewrap" and shutil.which("bwrap") is None:
        return "bwrap is not installed"
    try:
        with Process("tests", 1.0, Box(name, "")):
            return None
    except Stopped as stopped:
        return str(stopped)


def _bubblewrap() -> list[str]:
    """The command up to the one that is run inside."""
    library = os.path.join(sys.base_prefix, "lib")
    words = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-all",
        "--die-with-parent",
        "--cap-drop",
        "ALL",
        "--clearenv",
    ]
    words += ["--setenv", "LANG", "C.UTF-8", "--hostname", "box", "--ro-bind-try"]
    words += ["/etc/ld.so.cache", "/etc/ld.so.cache"]
    for place in ("/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/lib", "/lib64", library):
        if os.path.islink(place) and os.path.realpath(place).startswith("/usr/lib"):
            words += ["--symlink", os.readlink(place), place]
        elif os.path.isdir(place):
            words += ["--ro-bind", place, place]
    words += ["--ro-bind", PYTHON, PYTHON]
    for file in (WORKER, WORKER.with_name("_confine.py")):
        words += ["--ro-bind", str(file), f"{INSIDE}/{file.name}"]
    return [*words, "--remount-ro", "/", "--chdir", "/", "--"]


class Process:
    """One confined process; `send` a message, `receive` its answer; killed at the end."""

    def __init__(self, kind: str, seconds: float, box: Box):
        self.kind, self.buffer, self.box = kind, b"", box
        self.cpu = int(2 * seconds) + 5
        command, worker = [PYTHON], str(WORKER)
        if box.name == "bubblewrap":
            command = [*_bubblewrap(), PYTHON]
            worker = f"{INSIDE}/{WORKER.name}"
        limits = [str(MEMORY), str(self.cpu), box.name, str(os.getpid())]
        self.process = subprocess.Popen(
            [*command, "-I", "-S", "-B", worker, kind, *limits],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"LANG": "C.UTF-8"},
            start_new_session=True,
        )
        os.set_blocking(self.process.stdout.fileno(), False)  # type: ignore[union-attr]
        try:
            ready = self.receive(STARTUP)
        except Stopped as stopped:
            self.kill()
            raise Stopped(f"no confined process could start: {stopped}", False) from None
        if "ready" not in ready:
            self.kill()
            raise Stopped(f"model code cannot be confined here: {ready.get('refused')}", False)
        self.layers: list[str] = ready["ready"]

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def send(self, message: dict) -> None:
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")  # type: ignore[union-attr]
            self.process.stdin.flush()  # type: ignore[union-attr]
        except BrokenPipeError:
            pass  # its death shows when the answer is read

    def receive(self, seconds: float) -> dict:
        """The next message; Stopped where none comes in time, or none that is one."""
        until = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            if len(self.buffer) > LINE:
                raise Stopped("its answer is too long", True)
            data = self._read(until)
            if not data:
                raise self._ended()
            self.buffer += data
        line, _, self.buffer = self.buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise Stopped("its answer is no message", True)
        return message

    def _read(self, until: float) -> bytes:
        stream = self.process.stdout.fileno()  # type: ignore[union-attr]
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            if not selector.select(max(0.0, until - time.monotonic())):
                raise Stopped("timeout", True)
        return os.read(stream, 1 << 16)

    def _ended(self) -> Stopped:
        """Why the stream closed. SIGKILL can only be somebody else's: no limit sends it, the code
        may not, and may not end with the status that looks like it."""
        try:
            status = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return Stopped("it closed its channel", True)
        if status in (-signal.SIGKILL, 128 + signal.SIGKILL):
            return Stopped("the process was killed from outside", False)
        if status in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
            return Stopped(f"it used up {self.cpu} s of CPU time", True)
        return Stopped(f"the process ended (status {status})", True)

    def kill(self) -> None:
        if self.process.returncode is None:
            try:
                os.killpg(self.process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                pipe.close()  # type: ignore[union-attr]
            except BrokenPipeError:
                pass
        self.process.wait()
