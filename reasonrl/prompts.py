"""From a prompt (text or chat messages) to the token ids that the policy reads.

With a chat template the prompt becomes turns plus the opening of the assistant's turn; a string is
one user turn. Without one it is plain text: every message's content on lines of its own.

No system turn is ever added that nobody asked for. Some templates (SmolLM2's) write one of their
own when the messages bring none; how a template treats the first turn is found out by rendering,
and what it puts in front unasked is cut off. Try: render(tokenizer, "7+1-5-6").
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from reasonrl.records import InputError, Message

PLACE = "<|vision_start|><|image_pad|><|vision_end|>"  # of an image, where no template writes it
PROBE = "0"  # content of the turns rendered only to learn the template's manners


def render(
    tokenizer: Any,
    prompt: str | Sequence[Message],
    *,
    system: str | None = None,
    template: bool | None = None,
    images: int = 0,
) -> list[int]:
    """Token ids of a prompt, up to where the completion begins.

    system: text of the system turn (added below the prompt's own one if it has one); None = no more
    than the prompt brings. template: use the tokenizer's chat template; None = where there is one.
    images: how many belong to it; a prompt without places for them gets them in front.
    """
    prompt = with_places(prompt, images)
    text, plain = render_text(tokenizer, prompt, system=system, template=template, marks=images > 0)
    ids = list(tokenizer(text, add_special_tokens=plain)["input_ids"])
    if not ids:
        raise InputError("prompt: expected some text, got none")
    unknown = getattr(tokenizer, "unk_token_id", None)
    if unknown is not None and unknown in ids and str(tokenizer.unk_token) not in text:
        raise InputError(f"prompt: the tokenizer has no token for a part of {text[:80]!r}")
    return ids


def render_text(
    tokenizer: Any,
    prompt: str | Sequence[Message],
    *,
    system: str | None = None,
    template: bool | None = None,
    marks: bool = False,
) -> tuple[str, bool]:
    """The text of `render`, and whether it is plain (without a chat template); images leave their
    marks in plain text where asked to."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if template and not has_template:
        raise InputError("prompt: the tokenizer has no chat template")
    messages = with_system(_messages(prompt), system)
    if not (has_template if template is None else template):
        if isinstance(prompt, str) and system is None:
            return prompt, True
        write = _written if marks else text_of
        if isinstance(prompt, Places) and system is None:
            return write(messages[0]["content"]), True
        return "".join(f"{write(message['content'])}\n" for message in messages), True
    if messages[0]["role"] == "system":
        return _apply(tokenizer, messages, True), False
    return _without_default_system(tokenizer, messages), False


class Places(list):
    """A text and the places of its images, as chat messages that were none."""


def with_places(prompt: str | Sequence[Message], images: int) -> str | Sequence[Message]:
    """The prompt with a place for each of its images: as it is where it has some, else in front of
    its first user turn."""
    if not images:
        return prompt
    messages = _messages(prompt)
    if any(_places(message["content"]) for message in messages):
        return prompt
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
    text = {"type": "text", "text": text_of(messages[first]["content"])}
    turn = {**messages[first], "content": [*({"type": "image"} for _ in range(images)), text]}
    made = [*messages[:first], turn, *messages[first + 1 :]]
    return Places(made) if isinstance(prompt, str) else made


def plain(prompt: str | Sequence[Message]) -> str:
    """A prompt as one text: of chat messages, their contents."""
    return "\n".join(text_of(message["content"]) for message in _messages(prompt))


def with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    """The messages with a system text put first, or added to the system message they have."""
    if system is None:
        return list(messages)
    if messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    own = {**messages[0], "content": f"{text_of(messages[0]['content'])}\n\n{system}"}
    return [own, *messages[1:]]


def _messages(prompt: str | Sequence[Message]) -> list[Message]:
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    for i, message in enumerate(prompt):
        whole = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        if not whole or not isinstance(message.get("content"), str | list | tuple):
            raise InputError(f"prompt: message {i}: expected role and content, got {message!r}")
    if not prompt:
        raise InputError("prompt: expected a message, got an empty list")
    return list(prompt)


def text_of(content: Any) -> str:
    """The text of a content that may be a list of parts (text, images)."""
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content if isinstance(part, Mapping))


def _places(content: Any) -> int:
    parts = () if isinstance(content, str) else content
    return sum(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)


def _written(content: Any) -> str:
    """A content as text, its images as their marks."""
    if isinstance(content, str):
        return content
    parts = [part for part in content if isinstance(part, Mapping)]
    return "".join(PLACE if p.get("type") == "image" else p.get("text", "") for p in parts)


def _apply(tokenizer: Any, messages: Sequence[Message], answer_next: bool) -> str:
    try:
        return tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=answer_next
        )
    except TemplateError as error:
        roles = ", ".join(message["role"] for message in messages)
        raise InputError(f"prompt: the chat template refuses turns ({roles}): {error}") from None


def _without_default_system(tokenizer: Any, messages: list[Message]) -> str:
    """The rendered turns without what the template puts before the first of them unasked.

    The same turns are rendered behind some earlier turns; what they add there is theirs. Only the
    beginning-of-text token that the template writes first is kept.
    """
    plain = _apply(tokenizer, messages, True)
    turns = _turns_alone(tokenizer, messages)
    if turns is None or not plain.endswith(turns):
        before = plain[: max(plain.find(text_of(messages[0]["content"])), 0)]
        if "system" in before.lower():
            raise InputError(
                "prompt: the chat template adds a system turn that cannot be told apart; "
                "give `system` a text of your own"
            )
        return plain
    begin = getattr(tokenizer, "bos_token", None) or ""
    keep = begin if plain.startswith(begin) and not turns.startswith(begin) else ""
    return keep + turns


def _turns_alone(tokenizer: Any, messages: list[Message]) -> str | None:
    """What the messages render to behind earlier turns; None where the template forbids them."""
    user, reply = {"role": "user", "content": PROBE}, {"role": "assistant", "content": PROBE}
    for earlier in ([user], [user, reply]):
        try:
            head = _apply(tokenizer, earlier, False)
            full = _apply(tokenizer, [*earlier, *messages], True)
        except InputError:
            continue
        if full.startswith(head):
            return full[len(head) :]
    return None
