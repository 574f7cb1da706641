"""From a completion to its parts: steps, think and answer spans, and the step of every token.

One tokenisation for training, scoring and evaluation: ids are what the policy wrote, the text is
`decode` of them, and `pieces` ties the two together by character offsets. Nothing here turns text
back into ids.

    text = decode(tokenizer, ids)
    token_steps(split_steps(text), pieces(tokenizer, ids))    ->  step index per token, -1 = none

A character belongs to the token that holds its first byte, so a token that only continues a
character has width zero, like a special token. T tokens, S steps.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

from reasonrl.records import Step

ENDS = re.compile(r"(?:\s*(?:<\|[^<>|]{1,40}\|>|</s>|<eos>|<pad>|<end_of_turn>))+\s*$")
DECODE = "decode", "_decode"
LOST = "\ufffd"  # what a decoder writes for bytes that are no character


def split_steps(text: str, delimiter: str = "\n") -> list[Step]:
    """Steps as adjoining spans, each up to and including its delimiter; they cover the text.

    A part that holds only white space and delimiters is no step: it goes to the step before it, or,
    at the very start, to the first one. A text without any other character has no steps.
    """
    if not delimiter:
        raise ValueError("delimiter must be a non-empty string, got ''")
    spans: list[list[int]] = []
    start = 0
    while start < len(text):
        found = text.find(delimiter, start)
        end = len(text) if found < 0 else found + len(delimiter)
        blank = not text[start:end].replace(delimiter, "").strip()
        if blank and spans:
            spans[-1][1] = end
        elif not blank:
            spans.append([spans[-1][1] if spans else 0, end])
        start = end
    return [Step(a, b) for a, b in spans]


def completion_of(query: str, prompt: str) -> str:
    """What stands behind the prompt in one text, without the special tokens at its end; ValueError
    where the prompt is not in it."""
    at = query.find(prompt)
    if at < 0:
        raise ValueError(f"expected the prompt in the query, got {query[:60]!r}")
    return without_ends(query[at + len(prompt) :])


def without_ends(text: str) -> str:
    """A text without the special tokens at its end (<|...|>, </s>, <eos>, ...)."""
    return ENDS.sub("", text)


def think_span(text: str, *, opened: bool = False) -> tuple[int, int] | None:
    """Characters between the first <think> and the </think> after it, or None.

    opened: the prompt ended with <think>, so the completion starts inside.
    """
    start = 0 if opened else text.find("<think>") + len("<think>")
    if not opened and start < len("<think>"):
        return None
    end = text.find("</think>", start)
    return None if end < 0 else (start, end)


def answer_span(text: str) -> tuple[int, int] | None:
    """Characters inside the last closed <answer> ... </answer>, or None."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, end) if end >= 0 else -1
    return None if start < 0 else (start + len("<answer>"), end)


def token_steps(steps: Sequence[Step], pieces: Sequence[int]) -> list[int]:
    """Step index of every token (T of them), -1 for a token in no step.

    Token t covers characters [pieces[t], pieces[t + 1]) and belongs to the step that contains the
    first of them which lies in any step. A token without width (EOS, the rest of a split
    character) belongs to the step of the last character before it, to none (-1) without one.
    Steps must be in order and must not overlap (ValueError).
    """
    for before, after in zip(steps, steps[1:], strict=False):
        if after.start < before.end:
            raise ValueError(f"steps must be in order and apart, got {before} then {after}")
    out = []
    s = 0
    for start, end in zip(pieces, pieces[1:], strict=False):
        if end < start:
            raise ValueError(f"pieces must not decrease, got {start} then {end}")
        first, last = (start, end) if end > start else (start - 1, start)
        while s < len(steps) and steps[s].end <= first:
            s += 1
        back = s
        while back > 0 and steps[back - 1].end > first:
            back -= 1
        inside = back < len(steps) and max(steps[back].start, first) < min(steps[back].end, last)
        out.append(back if inside else -1)
    return out


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, without special tokens, not cleaned up: what `pieces` indexes."""
    options: dict[str, bool] = {"skip_special_tokens": True}
    if _backed(tokenizer):  # without its look at every id's type
        return tokenizer.backend_tokenizer.decode(list(ids), **options)
    if hasattr(tokenizer, "clean_up_tokenization_spaces"):
        options["clean_up_tokenization_spaces"] = False
    return tokenizer.decode(list(ids), **options)


def _backed(tokenizer: Any) -> bool:
    """Whether it decodes as transformers' tokenizers of the tokenizers library all do."""
    known = getattr(sys.modules.get("transformers"), "PreTrainedTokenizerFast", None)
    ways = (getattr(getattr(tokenizer, name, 0), "__func__", 0) for name in DECODE)
    return known is not None and [*ways] == [getattr(known, name, None) for name in DECODE]


def pieces(
    tokenizer: Any,
    ids: Sequence[int],
    text: str | None = None,
    known: Mapping[int, str] | None = None,  # `parts_of` it, where other rows have asked already
) -> list[int]:
    """Where every token starts in `text`, which is `decode(tokenizer, ids)`: T + 1 offsets, the
    last the length.

    Special tokens have width zero. Exact for byte-level BPE, where bytes are counted, and where
    tokens are plain parts of the text (characters, words); other tokenizers are read by decoding
    every prefix, which costs T decodes.
    """
    text = decode(tokenizer, ids) if text is None else text
    if not hasattr(tokenizer, "convert_ids_to_tokens") or not ids:
        return _prefix_pieces(tokenizer, ids, text)
    known = parts_of(tokenizer, [ids]) if known is None else known
    parts = [known[i] for i in ids]
    joined = "".join(parts)
    if joined == text:
        return [0, *accumulate(map(len, parts))]
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if type(getattr(backend, "decoder", None)).__name__ == "ByteLevel":
        offsets = _whole_pieces(parts, joined, text)
        offsets = offsets or _byte_pieces([_token_bytes(part) for part in parts], text)
        if offsets is not None:
            return offsets
    return _prefix_pieces(tokenizer, ids, text)


def parts_of(tokenizer: Any, rows: Sequence[Sequence[int]]) -> dict[int, str]:
    """What the tokenizer calls every token of these rows, nothing where it is special; none where
    it has no names."""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return {}
    ids, special = [*set().union(*rows)], set(tokenizer.all_special_ids)
    names = tokenizer.convert_ids_to_tokens(ids)
    return {i: "" if i in special else name or "" for i, name in zip(ids, names, strict=True)}


def _whole_pieces(parts: Sequence[str], joined: str, text: str) -> list[int] | None:
    """Offsets where every character of the tokens is one byte and the bytes are whole characters;
    None elsewhere."""
    data = joined.translate(_plain())
    if max(data, default="") > "\xff" or data.encode("latin-1") != text.encode("utf-8"):
        return None
    ends = [0, *accumulate(map(len, parts))]
    if len(data) == len(text):
        return ends
    before = [0, *accumulate("\x80" > c or c >= "\xc0" for c in data)]  # characters that begin
    return [before[end] for end in ends]


def _byte_pieces(parts: Sequence[bytes], text: str) -> list[int] | None:
    """Offsets from the bytes of each token; None where these bytes are not the text."""
    data = b"".join(parts)
    if data.decode("utf-8", "replace") != text:
        return None
    starts = _character_starts(data)
    out, position, c = [], 0, 0
    for part in [*parts, b""]:
        while c < len(starts) and starts[c] < position:
            c += 1
        out.append(c)
        position += len(part)
    return out


def _character_starts(data: bytes) -> list[int]:
    """Byte position of every character; undecodable bytes count as the decoder counts them."""
    starts, position = [], 0
    while position < len(data):
        good, broken = len(data), len(data)
        try:
            data[position:].decode("utf-8")
        except UnicodeDecodeError as error:
            good, broken = position + error.start, position + error.end
        starts += [at for at in range(position, good) if not 0x80 <= data[at] < 0xC0]
        if broken > good:
            starts.append(good)
        position = broken
    return starts


def _prefix_pieces(tokenizer: Any, ids: Sequence[int], text: str) -> list[int]:
    out = [0]
    for t in range(1, len(ids)):
        prefix = decode(tokenizer, ids[:t])
        settled = len(prefix.rstrip(LOST))
        if len(prefix) > settled and not text.startswith(prefix):
            reached = settled + 1  # a character that has begun and will be completed
        else:
            reached = len(prefix)
        out.append(max(out[-1], min(reached, len(text))))
    return [*out, len(text)] if ids else [len(text)]


@lru_cache(maxsize=1 << 16)
def _token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; an added token outside that alphabet is plain text."""
    table = _byte_of()
    if all(character in table for character in token):
        return bytes(table[character] for character in token)
    return token.encode("utf-8")


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Character -> byte: visible Latin-1 stands for itself, the rest is moved to U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in visible]
    table = {chr(b): b for b in visible}
    return table | {chr(0x100 + i): b for i, b in enumerate(hidden)}


@lru_cache(maxsize=1)
def _plain() -> dict[int, int]:
    return {ord(character): byte for character, byte in _byte_of().items()}
