"""A user's function that takes private text out before anything is stored or sent.

    def redact(text: str) -> str: ...            --redact mypackage.module:redact

It is called on every string of every row, ids and nested fields included, as soon as a row is read
and before a row is written. What it raises goes through: a text that could not be redacted must
not slip past it.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any, cast

from reasonrl.records import InputError

Redact = Callable[[str], str]


def load(path: str) -> Redact:
    """The function called `module:name`; modules in the working directory are found too."""
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise InputError(f"--redact: expected module:function, got {path!r}")
    sys.path.append("")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        raise InputError(f"--redact: {module}: cannot be imported ({error})") from None
    finally:
        sys.path.remove("")
    if not callable(found):
        raise InputError(f"--redact: {module} has no function {name!r}")
    return cast(Redact, found)


def redacted(value: Any, redact: Redact | None) -> Any:
    """A value with every string in it redacted; keys stay."""
    if redact is None:
        return value
    if isinstance(value, str):
        out = redact(value)
        if not isinstance(out, str):
            raise InputError(f"--redact: expected a string back, got {type(out).__name__}")
        return out
    if isinstance(value, Mapping):
        return {key: redacted(item, redact) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted(item, redact) for item in value]
    return value
