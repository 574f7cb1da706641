"""What was expensive to know, kept on disk under the hash of what it was asked about.

One SQLite file; a key is SHA-256 over a kind and its contents (the model among them), so a changed
text or model is asked anew and nothing is ever out of date. A value is written before it is used:
work that breaks off goes on where it was. `Cache(None)` remembers for this process only.
    cache = Cache(Path("cache")); cache.get("judge", name, prompt); cache.put(reply, "judge", ...)
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path

from reasonrl.records import InputError

FILE = "cache.sqlite"


class Cache:
    """Bytes by content. folder: where the file lies; made where it is missing."""

    def __init__(self, folder: str | Path | None):
        self.path = ":memory:"
        if folder is not None:
            Path(folder).mkdir(parents=True, exist_ok=True)
            self.path = str(Path(folder) / FILE)
        try:
            self.db = sqlite3.connect(self.path, timeout=60)
            self.db.execute("create table if not exists kept (key text primary key, value blob)")
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self.path}: not a cache of ours ({error}); remove it") from None
        self.hits = self.misses = 0

    def get(self, kind: str, *content: object) -> bytes | None:
        """The value kept for this content, or None."""
        key = _key(kind, content)
        row = self.db.execute("select value from kept where key = ?", (key,)).fetchone()
        self.hits += row is not None
        self.misses += row is None
        return None if row is None else row[0]

    def put(self, value: bytes, kind: str, *content: object) -> None:
        with self.db:
            self.db.execute(
                "insert or replace into kept values (?, ?)", (_key(kind, content), value)
            )


def fingerprint(folder: str | Path) -> str:
    """What tells two model folders apart: names, sizes and both ends of every file."""
    found = hashlib.sha256()
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        size = path.stat().st_size
        found.update(f"{path.relative_to(folder)}\x1f{size}\x1f".encode())
        with path.open("rb") as file:
            found.update(file.read(ENDS))
            file.seek(max(0, size - ENDS))
            found.update(file.read(ENDS))
    return found.hexdigest()


ENDS = 1 << 20


def _key(kind: str, content: tuple[object, ...]) -> str:
    text = json.dumps([kind, *content], ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
