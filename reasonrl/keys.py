"""Keys stand in the environment and nowhere else: what may not carry one, and cutting one out.

    refuse(values, "recipe.yaml")     InputError where a config holds a key, a password, a header
    hide("401: bad key sk-...")       "401: bad key ***"

A secret is the value of an environment variable that is named like one (..._KEY, _TOKEN, _SECRET,
_PASSWORD) or that `used` has named, the name and password of an address, and what is shaped like
the keys that services hand out. No message of this module repeats what it found.
Left out: secrets shorter than 6 characters outside an address, other encodings than JSON's and %.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from reasonrl.records import InputError

STARS = "***"
SHORTEST = 6  # characters of a secret; a shorter one would blank out words
NAMED = re.compile(
    r"(?i)(?:^|[_.-])(?:api_?key|key|token|secret|passwd|password|passphrase|credentials?"
    r"|authorization)$"
)
SHAPED = re.compile(
    r"\b(?:sk-|hf_|gh[opsu]_|xox[abp]-|AKIA)[A-Za-z0-9_\-./+=]{8,}|(?i:\bbearer\s+)\S{6,}"
)
LOGIN = re.compile(r"(?<=://)[^\s/@][^\s@]*@|(?<=://)@")
VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
_used: set[str] = set()


def used(name: str) -> None:
    """From now on the value of this variable is a secret; InputError where it is no name."""
    if not VARIABLE.fullmatch(name):
        raise InputError(
            "a key's variable: expected its name in capitals; the key itself stands in the"
            " environment only"
        )
    _used.add(name)


def secrets() -> list[str]:
    """The secrets of the environment, longest first."""
    found = {
        value.strip()
        for name, value in os.environ.items()
        if (name in _used or NAMED.search(name)) and len(value.strip()) >= SHORTEST
    }
    return sorted(found, key=lambda secret: (-len(secret), secret))


def spelled(secret: str) -> re.Pattern[str]:
    """A secret as it is, with any of its characters escaped as JSON does, or as addresses do."""
    letters = [
        rf"(?:{re.escape(c)}|\\{re.escape(c)}|\\u(?i:{ord(c):04x})|(?i:{_percent(c)}))"
        for c in secret
    ]
    return re.compile("".join(letters))


def _percent(letter: str) -> str:
    return "".join(f"%{byte:02x}" for byte in letter.encode("utf-8", "surrogatepass"))


def hide(text: str) -> str:
    """The text without secrets."""
    text = LOGIN.sub(f"{STARS}@", text)
    for secret in secrets():
        if secret in text or "\\" in text or "%" in text:
            text = spelled(secret).sub(STARS, text)
    return SHAPED.sub(STARS, text)


def refuse(values: Mapping[str, Any], where: str, path: str = "") -> None:
    """InputError, naming the place, where nested values hold a secret."""
    for name, value in values.items():
        place = f"{path}{name}"
        if NAMED.search(str(name)) and isinstance(value, str) and value:
            raise _held(where, place)
        items = list(value) if isinstance(value, list | tuple) else [value]
        for item in items:
            if isinstance(item, Mapping):
                refuse(item, where, f"{place}.")
            elif isinstance(item, str) and hide(item) != item:
                raise _held(where, place)


def _held(where: str, place: str) -> InputError:
    return InputError(
        f"{where}: {place}: holds a key or a password; those stand in environment variables only"
        " (judge_key_env names one)"
    )


class Hide(logging.Filter):
    """Takes secrets out of a record, its arguments and its traceback."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = hide(record.getMessage()), None
        if record.exc_info:
            record.exc_text = hide("".join(traceback.format_exception(*record.exc_info)).rstrip())
            record.exc_info = None
        return True


def logger(name: str) -> logging.Logger:
    """A logger whose records hold no secrets."""
    found = logging.getLogger(name)
    if not any(isinstance(each, Hide) for each in found.filters):
        found.addFilter(Hide())
    return found


def install() -> None:
    """Uncaught exceptions are shown without secrets, also those of threads."""
    sys.excepthook = excepthook
    threading.excepthook = _threads


def _threads(about: threading.ExceptHookArgs) -> None:
    if about.exc_value is not None:
        excepthook(about.exc_type, about.exc_value, about.exc_traceback)


def excepthook(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """The traceback without secrets."""
    sys.stderr.write(hide("".join(traceback.format_exception(kind, error, trace))))
