"""Answers kept on disk under the hash of what was asked, so that nothing is paid for twice.

The name of a file is the BLAKE2b of the server's address and the request (model, messages, limits,
seed); inside are the text and its own hash. Files appear whole or not at all (written beside, then
renamed). One that does not hold what its hash says counts as absent and is asked for again. Prompts
and keys are not stored. Left out: eviction; delete the folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from pathlib import Path

from reasonrl.records import InputError


def key_of(url: str, body: bytes) -> str:
    return hashlib.blake2b(url.encode() + b"\0" + body, digest_size=24).hexdigest()


class Cache:
    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cache {folder}: {error.strerror or error}") from None

    def get(self, key: str) -> str | None:
        try:
            held = json.loads(self._path(key).read_bytes())
            text = held["text"]
            return text if held["check"] == _check(key, text) else None
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None  # torn or changed: as if it were not there

    def put(self, key: str, text: str) -> None:
        path = self._path(key)
        beside = path.with_name(f".{key}.{os.getpid()}.{threading.get_ident()}")
        try:
            path.parent.mkdir(exist_ok=True)
            beside.write_text(json.dumps({"text": text, "check": _check(key, text)}))
            os.replace(beside, path)
        except OSError as error:
            raise InputError(f"cache {self.folder}: {error.strerror or error}") from None

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"


def _check(key: str, text: str) -> str:
    data = f"{key}\0{text}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(data, digest_size=16).hexdigest()
