"""The JSON of each host, read strictly and written as it expects.

OpenRLHF 0.11: {"query", "prompts", "labels"} -> {"rewards", "scores", "extra_logs"}; a query is the
prompt with the completion behind it, special tokens included; scores lie in [0, 1].
verl 0.9, reward loop: {"model", "input"} to /classify -> data[-1].probs[-1] (its vLLM form) or to
/v1/embeddings -> data[-1].embedding[-1] (its SGLang form); the input is the conversation, rendered
by the reward model's own chat template, or messages.
OpenAI: /v1/chat/completions. What a field asks for and we do not do is refused, never ignored.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from reasonrl.chat.reply import Malformed, parsed
from reasonrl.records import Message, Score
from reasonrl.rows import brief
from reasonrl.segment import completion_of, without_ends

NEUTRAL = {  # fields that say nothing as long as they hold this
    **dict.fromkeys(("stop", "stream_options", "tools", "tool_choice", "response_format"), None),
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p"), 0),
    **dict.fromkeys(("stream", "logprobs"), False),
    **{"repetition_penalty": 1, "logit_bias": None, "top_logprobs": None},
}


class BadRequest(Exception):
    """What the client must change; `status` 4xx."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


class Item(NamedTuple):
    """One completion to score."""

    prompt: str | Sequence[Message]
    completion: str
    label: Any = None


class Ask(NamedTuple):
    """One request for completions."""

    prompt: str | Sequence[Message]
    seed: int | None
    sampling: tuple[int | None, float, float, int, int]  # max_tokens, temperature, top p, k, n


def body_of(data: bytes) -> dict[str, Any]:
    try:
        body = parsed(data, "body")
    except Malformed as error:
        raise BadRequest(str(error)) from None
    if not isinstance(body, dict):
        raise BadRequest(f"the body: expected a JSON object, got {brief(body)}")
    return body


def items(body: Mapping[str, Any]) -> list[Item]:
    """OpenRLHF's rows."""
    columns = []
    for name in ("query", "prompts", "labels"):
        values = body.get(name)
        if not isinstance(values, list):
            raise BadRequest(f"field {name!r}: expected a list, got {brief(values)}")
        columns.append(values)
    if len({len(values) for values in columns}) > 1:
        sizes = ", ".join(str(len(values)) for values in columns)
        raise BadRequest(f"query, prompts, labels: expected equal lengths, got {sizes}")
    out = []
    for i, (query, prompt, label) in enumerate(zip(*columns, strict=True)):
        for name, value in (("query", query), ("prompts", prompt)):
            if not isinstance(value, str):
                raise BadRequest(f"{name}[{i}]: expected a string, got {brief(value)}")
        try:
            out.append(Item(prompt, completion_of(query, prompt), label))
        except ValueError as error:
            raise BadRequest(f"query[{i}]: {error}") from None
    return out


def rewards(scores: Sequence[Score], unscored: float | None) -> dict[str, Any]:
    """OpenRLHF's reply; `unscored` stands where there is no score, and `reasons` says why."""
    values = [unscored if s.value is None else s.value for s in scores]
    return {
        "rewards": values,
        "scores": [None if v is None else min(1.0, max(0.0, v)) for v in values],
        "extra_logs": {"unscored": [float(s.value is None) for s in scores]},
        "reasons": [s.reason or None for s in scores],
        "kinds": [s.kind for s in scores],
    }


def conversation(body: Mapping[str, Any], tokenizer: Any) -> list[Item]:
    """verl's `input`, or `messages`: the last turn is the completion."""
    given = body.get("input", body.get("messages"))
    if isinstance(given, str):
        return [_rendered(given, tokenizer)]
    if isinstance(given, list) and given and all(isinstance(x, str) for x in given):
        return [_rendered(text, tokenizer) for text in given]
    turns = messages_of(given, "input")
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        raise BadRequest("input: expected a conversation that ends with the assistant's turn")
    return [Item(_prompt(turns[:-1]), str(turns[-1]["content"]))]


def _rendered(text: str, tokenizer: Any) -> Item:
    """Prompt and completion of one turn in the scorer's own chat template."""
    if not getattr(tokenizer, "chat_template", None):
        raise BadRequest("input: this scorer has no chat template; send messages instead")
    probe = "\ue000"
    turn = [{"role": "user", "content": probe}]
    opened = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    before, _, after = opened.partition(probe)
    at = text.find(after, len(before))
    if not text.startswith(before) or at < 0:
        raise BadRequest(
            "input: expected one user turn and one of the assistant in this scorer's chat template;"
            " send messages instead"
        )
    return Item(text[len(before) : at], without_ends(text[at + len(after) :]))


def values(scores: Sequence[Score], model: str, name: str) -> dict[str, Any]:
    """verl's reply; name: probs or embedding. BadRequest (422) where there is no number."""
    for score in scores:
        if score.value is None:
            raise BadRequest(f"{score.kind}: {score.reason}", 503 if score.kind == "infra" else 422)
    rows = [{"index": i, "object": name, name: [s.value]} for i, s in enumerate(scores)]
    return {"object": "list", "model": model, "data": rows, "created": int(time.time())}


def _prompt(turns: Sequence[Message]) -> str | Sequence[Message]:
    """One user turn is a plain prompt; a model without a chat template reads it as it stands."""
    return turns[0]["content"] if [t["role"] for t in turns] == ["user"] else turns


def messages_of(given: Any, name: str) -> list[Message]:
    if not isinstance(given, list) or not given:
        raise BadRequest(f"field {name!r}: expected chat messages, got {brief(given)}")
    for i, message in enumerate(given):
        whole = isinstance(message, dict) and isinstance(message.get("role"), str)
        if not whole or not isinstance(message.get("content"), str):
            raise BadRequest(
                f"{name}[{i}]: expected role and content as text, got {brief(message)}"
            )
    return given


def ask_of(body: Mapping[str, Any]) -> Ask:
    """A request to /v1/chat/completions."""
    body = dict(body)
    prompt = _prompt(messages_of(body.pop("messages", None), "messages"))
    for name in ("model", "user"):
        body.pop(name, None)
    limits = [body.pop(name, None) for name in ("max_tokens", "max_completion_tokens")]
    limit = next((v for v in limits if v is not None), None)
    if limit is not None:
        limit = int(_number("max_tokens", limit, 1, 1 << 20, whole=True))
    heat = _number("temperature", body.pop("temperature", None), 0, 100, 1.0)
    top_p = _number("top_p", body.pop("top_p", None), 1e-6, 1, 1.0)
    top_k = body.pop("top_k", None)
    top_k = 0 if top_k == -1 else int(_number("top_k", top_k, 0, 1 << 20, 0, whole=True))
    count = int(_number("n", body.pop("n", None), 1, 128, 1, whole=True))
    seed = body.pop("seed", None)
    if seed is not None:
        seed = int(_number("seed", seed, -(2**63), 2**63 - 1, whole=True))
    for name, value in body.items():
        if name not in NEUTRAL or (value is not None and value != NEUTRAL[name]):
            raise BadRequest(f"field {name!r}: not supported here, got {brief(value)}")
    return Ask(prompt, seed, (limit, heat, top_p, top_k, count))


def completion(model: str, texts: Sequence[tuple[str, bool, int]], prompt: int) -> dict[str, Any]:
    """texts: (text, whether it ended by itself, tokens); prompt: its tokens."""
    choices = [
        {
            "index": i,
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop" if ended else "length",
        }
        for i, (text, ended, _) in enumerate(texts)
    ]
    made = sum(tokens for _, _, tokens in texts)
    usage = {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
    about = {"id": "chatcmpl-0", "object": "chat.completion", "created": int(time.time())}
    return about | {"model": model, "choices": choices, "usage": usage}


def error(status: int, message: str) -> bytes:
    """OpenAI's form of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return json.dumps({"error": {"message": message, "type": kind, "code": status}}).encode()


def _number(name: str, value: Any, low: float, high: float, absent: float = 0, *, whole=False):
    if value is None:
        return absent
    kinds = int if whole else (int, float)
    right = isinstance(value, kinds) and not isinstance(value, bool)
    if not right or not math.isfinite(value) or not low <= value <= high:
        what = "a whole number" if whole else "a number"
        raise BadRequest(f"field {name!r}: expected {what} in [{low}, {high}], got {brief(value)}")
    return value
