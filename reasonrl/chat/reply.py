"""What counts as an answer of a chat server: strict, so that nothing broken is ever taken for one.

One JSON object in UTF-8 with no name twice, no NaN; from the model that was asked; one choice or
more, the first with text. Everything else is Malformed with its reason; what a person must mend
(address, key, model, arguments) is a configuration error; what may pass is Trouble.
"""

from __future__ import annotations

import json
import math
from typing import Any

from reasonrl.chat.exchange import HTTPReply
from reasonrl.chat.outage import is_trouble
from reasonrl.records import InputError

SHOWN = 200  # characters of a server's own words in a message


class Malformed(Exception):
    """The server answered, and not with an answer."""


class Unanswerable(Exception):
    """This request cannot be answered by this server, however often it is asked."""


class Trouble(Exception):
    """The server's trouble; `retry_after`: its header of that name."""

    def __init__(self, reason: str, retry_after: str | None = None):
        super().__init__(reason)
        self.retry_after = retry_after


def object_of(reply: HTTPReply) -> dict[str, Any]:
    """The JSON object of a reply; Trouble, Malformed, Unanswerable or InputError."""
    if is_trouble(reply.status):
        raise Trouble(f"status {reply.status}{_words(reply)}", reply.headers.get("retry-after"))
    if 300 <= reply.status < 400:
        target = brief(reply.headers.get("location", "nowhere"))
        raise InputError(f"status {reply.status}: it redirects to {target}; give that address")
    if reply.status in (400, 413, 422) and _is_too_long(reply):
        raise Unanswerable("the prompt is too long")
    if reply.status != 200:
        raise InputError(f"status {reply.status}{_words(reply)}{_advice(reply.status)}")
    if reply.headers.get("content-encoding", "identity").lower() != "identity":
        raise Malformed("the reply is compressed")
    body = parsed(reply.body)
    if not isinstance(body, dict):
        raise Malformed("the reply is no JSON object")
    return body


def text_of(reply: HTTPReply, model: str) -> str:
    """The text of a reply to /chat/completions; Trouble, Malformed, Unanswerable or InputError."""
    body = object_of(reply)
    served = body.get("model")
    if isinstance(served, str) and not _is_same(served, model):
        raise Malformed(f"the server answered as model {brief(served)}")
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Malformed("the reply has no choices")
    message = choices[0].get("message")
    content = message.get("content") if isinstance(message, dict) else None
    if not isinstance(content, str):
        if content is None and choices[0].get("finish_reason") == "length":
            raise Unanswerable("cut at max_tokens before any text")
        raise Malformed(f"the content is {brief(repr(content))}, not text")
    return content


def parsed(data: bytes, what: str = "reply") -> Any:
    """JSON, strictly; Malformed, which names `what`."""
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_once,
            parse_constant=_refuse,
            parse_float=_finite,
        )
    except UnicodeDecodeError:
        raise Malformed(f"the {what} is not UTF-8") from None
    except RecursionError:
        raise Malformed(f"the {what} is nested too deeply") from None
    except ValueError as error:
        shown = brief(data[:SHOWN].decode("utf-8", "replace"))
        raise Malformed(f"the {what} is not JSON ({error}): {shown}") from None


def brief(text: str) -> str:
    """Somebody else's words on one line, without control characters, cut."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= SHOWN else line[: SHOWN - 3] + "..."


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name stands twice")
    return out


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is no JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text[:20]} is no number that can be held")
    return value


def _words(reply: HTTPReply) -> str:
    """What the server says about an error, in its own words."""
    text = brief(reply.body[: 4 * SHOWN].decode("utf-8", "replace"))
    return f": {text}" if text else ""


def _is_too_long(reply: HTTPReply) -> bool:
    text = reply.body[: 1 << 14].decode("utf-8", "replace").lower()
    return reply.status == 413 or "context length" in text or "context_length" in text


def _is_same(served: str, asked: str) -> bool:
    """Servers name a model as asked, by its last part, or with a date behind the name."""
    return served == asked or served.startswith(f"{asked}-") or asked.endswith(f"/{served}")


def _advice(status: int) -> str:
    if status in (401, 403):
        return " (the key comes from the environment variable that --judge-key-env names)"
    return " (is the address right? it ends in /v1; is the model served?)" if status == 404 else ""
