"""What an attempt could reach if it got out, planted where it can be looked at afterwards."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import threading
from pathlib import Path

VICTIM = """
import ctypes, os, sys
b = ctypes.create_string_buffer(os.environ["TOKEN"].encode())
print(ctypes.addressof(b), flush=True)
for line in sys.stdin:
    print(b.value.decode(), os.getpriority(0, 0), flush=True)
"""


def descendants(pid: int) -> set[int]:
    """A process, its children, and theirs."""
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            rest = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        parents[int(path.parent.name)] = int(rest[1])
    found = {pid}
    while more := {p for p, parent in parents.items() if parent in found} - found:
        found |= more
    return found


class Victim:
    """Another process of the same user, with a token in its memory, environment, arguments."""

    def __init__(self, python: str):
        self.token = f"VICTIM-{secrets.token_hex(8)}"
        self.process = subprocess.Popen(
            [python, "-I", "-S", "-c", VICTIM, self.token],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={"TOKEN": self.token},
            text=True,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.address = int(self.process.stdout.readline())

    def harm(self) -> str:
        """What was done to it, or ""."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if self.process.poll() is not None:
            return f"the victim ended ({self.process.returncode})"
        state = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0]
        if state in "Tt":
            return "the victim was stopped"
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        told = self.process.stdout.readline().split()
        return "" if told == [self.token, "0"] else f"the victim was changed: {told}"

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


class Listeners:
    """Loopback TCP and UDP, a Unix and an abstract socket; `heard` is all that came."""

    def __init__(self, folder: Path):
        self.heard: list[bytes] = []
        self.abstract = f"escape-{secrets.token_hex(6)}"
        self.unix = str(folder / "socket")
        self.tcp, self.udp = socket.socket(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        named, hidden = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
        loopback = ("127.0.0.1", 0)
        for one, place in (
            *((self.tcp, loopback), (self.udp, loopback)),
            *((named, self.unix), (hidden, f"\0{self.abstract}")),
        ):
            one.bind(place)
            if one is not self.udp:
                one.listen(64)
            threading.Thread(target=self._hear, args=(one,), daemon=True).start()

    def _hear(self, one: socket.socket) -> None:
        while True:
            if one is self.udp:
                self.heard.append(one.recv(999))
                continue
            other, _ = one.accept()
            other.settimeout(2.0)
            try:
                self.heard.append(other.recv(999) or b"a connection without a word")
            except OSError as error:
                self.heard.append(f"a connection, {error}".encode())
            other.close()


class Place:
    """A secret and a folder for one attempt."""

    def __init__(self, folder: Path, name: str):
        self.name, self.token = name, f"TOKEN-{secrets.token_hex(8)}"
        self.secret, self.out = folder / f"{name}.secret", folder / name
        self.secret.write_text(self.token + "\n")
        self.out.mkdir()
        (self.out / "empty").mkdir()
        (self.out / "keep").write_text("kept")
        (self.out / "planted.py").write_text(f"TOKEN = {self.token!r}\n")
        (self.out / "planted.ini").write_text(f"[a]\ntoken = {self.token}\n")
        (self.out / self.token).write_text("")
        (self.out / "link").symlink_to(self.token)
        self.before = self._seen()

    def changes(self) -> str:
        """What is different, or ""."""
        left = [f for f in (f"/tmp/{self.name}", f"/dev/shm/{self.name}") if os.path.exists(f)]
        for file in left:
            os.unlink(file)
        return f"left {left}" if left else "" if self._seen() == self.before else "files changed"

    def _seen(self) -> list[tuple]:
        found = []
        for path in (self.secret, self.out, *sorted(self.out.rglob("*"))):
            if not os.path.lexists(path):
                return [(path, "gone")]
            about = path.lstat()
            data = path.read_bytes() if path.is_file() and about.st_size < 999 else b""
            times = () if path.is_dir() else (about.st_mtime_ns,)
            found.append((path, about.st_mode, about.st_nlink, about.st_size, *times, data))
        return found
