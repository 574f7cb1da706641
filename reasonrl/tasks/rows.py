"""Problems from rows: every field of a problem checked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reasonrl.answer_forms import parse_choice, parse_number
from reasonrl.images import BadImage, check
from reasonrl.records import InputError, Problem
from reasonrl.rewards.verify import verify_math
from reasonrl.rows import Refused, brief, clean, field_of, prompt_of, read_rows

ANSWER_TYPES = ("numerical", "choice", "ocr", "text", "math", "code")
FIELDS = ("id", "prompt", "answer", "answer_type", "task", "images")
MATHS = 500  # gold answers that are tried at most when a file is read


def read_problems(path: str | Path, bad: list[str] | None = None) -> list[Problem]:
    """The problems of a data file in order; ids are the rows' own or "<file>-<row number>".

    A row with a bad field is an InputError, or, where there is a list `bad`, left out and told
    there. What makes the file unreadable (no JSON, an id twice) stops in both cases.
    """
    path = Path(path)
    seen: dict[str, int] = {}
    problems = []
    for number, row in read_rows(path):
        try:
            problem = _problem(row, path, f"{path.stem}-{number}")
        except Refused as error:
            if bad is None:
                raise InputError(f"{path}: row {number}: {error}") from None
            bad.append(f"row {number}: {error}")
            continue
        if problem.id in seen:
            raise InputError(
                f"{path}: row {number}: field 'id': expected a new one, "
                f"got {problem.id!r} as in row {seen[problem.id]}"
            )
        seen[problem.id] = number
        problems.append(problem)
    if not problems:
        raise InputError(f"{path}: no row can be used; {bad[0] if bad else 'it is empty'}")
    _check_maths(path, problems, seen)
    return problems


def _check_maths(path: Path, problems: list[Problem], rows: Mapping[str, int]) -> None:
    """InputError for the first gold answer that the verifier cannot read.

    Plain numbers need no look, and of very many others only some get one: the rest turn up as
    unscorable when they are graded.
    """
    gold = [(p.answer, rows[p.id]) for p in problems if p.answer_type == "math" and p.answer]
    gold = [(answer, row) for answer, row in gold if parse_number(answer) is None]
    gold = gold[:: 1 + len(gold) // MATHS]
    answers = [answer for answer, _ in gold]
    for (answer, row), score in zip(gold, verify_math(answers, answers), strict=True):
        if score.kind == "unscorable":
            raise InputError(
                f"{path}: row {row}: field 'answer': expected mathematics, got {brief(answer)}"
            )


def _problem(row: Mapping[str, Any], path: Path, default_id: str) -> Problem:
    kind = field_of(row, "answer_type", str, "a string") or "text"
    if kind not in ANSWER_TYPES:
        raise Refused(f"field 'answer_type': expected {', '.join(ANSWER_TYPES)}, got {kind!r}")
    images = field_of(row, "images", list, "a list of paths") or []
    prompt = prompt_of(row)
    _check_places(prompt, len(images))
    own = row.get("id")
    if own is not None and (isinstance(own, bool) or not isinstance(own, str | int)):
        raise Refused(f"field 'id': expected a string or an integer, got {brief(own)}")
    return Problem(
        id=default_id if own is None else str(own),
        prompt=prompt,
        answer=_answer(row, kind),
        answer_type=kind,
        task=field_of(row, "task", str, "a string") or "jsonl",
        images=tuple(_image(image, path.parent) for image in images),
        extra={key: value for key, value in row.items() if key not in FIELDS},
    )


def _answer(row: Mapping[str, Any], kind: str) -> str | None:
    answer = row.get("answer")
    if answer is None:
        if kind in ("numerical", "choice"):
            raise Refused(f"field 'answer': expected a {kind} answer, got nothing")
        return None
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise Refused(f"field 'answer': expected a string or a number, got {brief(answer)}")
    text = clean("answer", str(answer))
    if kind != "code" and not text.strip():
        raise Refused("field 'answer': expected some text, got an empty string")
    if kind == "numerical" and parse_number(text) is None:
        raise Refused(f"field 'answer': expected a number, got {brief(answer)}")
    if kind == "choice" and parse_choice(text) is None:
        raise Refused(f"field 'answer': expected letters such as B or A, C, got {brief(answer)}")
    if kind == "math" and text.count("{") != text.count("}"):
        raise Refused(f"field 'answer': expected closed braces, got {brief(answer)}")
    return text


def _image(image: Any, folder: Path) -> str:
    """The path of an image, inside the data folder even after following links, its header
    read."""
    if not isinstance(image, str) or not image or "\0" in image:
        raise Refused(f"field 'images': expected a path, got {brief(image)}")
    root = folder.resolve()
    target = (root / image).resolve()
    if Path(image).is_absolute() or not target.is_relative_to(root):
        raise Refused(f"field 'images': expected a path inside {folder}, got {brief(image)}")
    if not target.is_file():
        raise Refused(f"field 'images': expected a file, got {brief(image)}, which is none")
    try:
        check(str(target))
    except BadImage as error:
        raise Refused(f"field 'images': {brief(image)}: {error.reason}") from None
    return str(target)


def _check_places(prompt: str | list[dict[str, Any]], images: int) -> None:
    """Chat messages have one image part for each image; before a plain text they are put."""
    if isinstance(prompt, str):
        return
    parts = [part for m in prompt if isinstance(m["content"], list) for part in m["content"]]
    places = sum(isinstance(part, Mapping) and part.get("type") == "image" for part in parts)
    if places != images:
        raise Refused(
            f"field 'prompt': expected one part of type 'image' for each of {images} images, "
            f"got {places}"
        )
