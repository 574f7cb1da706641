"""What the run page shows, read from a run's files; a damaged file is named and left out.

Numbers come from metrics.jsonl and evals.jsonl, completions from the parquet files. A completion is
sent as parts (text, step reward, step advantage), cut here, because characters are not counted
alike everywhere. The page holds at most BUDGET bytes of completions: the last step, the first, then
ever finer in between until it is full; a text longer than LONGEST is cut in the middle and says so.
Left out: token log-probabilities (a run does not store them).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from reasonrl import config as configs
from reasonrl import images
from reasonrl.log import COMPLETIONS, read_rows
from reasonrl.records import InputError

BUDGET = 14_000_000  # bytes of JSON for the completions of all runs
LONGEST = 20_000  # characters of one text
SIDE = 320  # pixels of a shown image, at most
CONTROL = {i: 0x2400 + i for i in range(32) if i not in (9, 10)} | {127: 0x2421}


def gather(runs: Sequence[str | Path], budget: int = BUDGET) -> dict[str, Any]:
    """Everything the page needs, JSON values only; InputError where a folder holds no run."""
    return {"runs": [_run(Path(run), budget // max(1, len(runs))) for run in runs]}


def _run(path: Path, budget: int) -> dict[str, Any]:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder")
    if not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        raise InputError(f"{path}: expected a run (config.yaml, metrics.jsonl), found none")
    notes: list[str] = []
    files = completion_files(path)
    steps, shown = [], 0
    for number in _spread(sorted(files)):
        groups = _groups(files[number], notes)
        size = len(json.dumps(groups))
        if steps and size > budget:
            notes.append(f"{shown} of {len(files)} steps with completions are in this page")
            break
        budget -= size
        shown += 1
        steps.append({"step": number, "groups": groups})
    config = path / "config.yaml"
    names = {name for step in steps for group in step["groups"] for name in group["images"]}
    return {
        "name": path.name,
        "images": _pictures(path, sorted(names), budget, notes),
        "config": config.read_text("utf-8", "replace") if config.is_file() else "",
        "metrics": _numbers(path / "metrics.jsonl", notes),
        "evals": _numbers(path / "evals.jsonl", notes),
        "steps": sorted(steps, key=lambda s: s["step"]),
        "notes": notes,
    }


def completion_files(path: Path) -> dict[int, Path]:
    """The completions table of every step that has one."""
    found = {}
    for file in (path / "completions").glob("*.parquet"):
        if match := COMPLETIONS.fullmatch(file.name):
            found[int(match[1])] = file
    return found


def read_table(file: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a completions table; InputError where it is torn."""
    try:
        with file.open("rb") as data:
            table = pyarrow.parquet.read_table(
                data, columns=columns, page_checksum_verification=True
            )
            return table.to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file}: cannot be read ({reason})") from None


def _numbers(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    try:
        rows = read_rows(path)
    except InputError as error:
        notes.append(str(error))
        return []
    for row in rows:
        said = row.get("warnings")
        said = said if isinstance(said, list) else []
        notes += [f"step {row['step']}: {_shown(warning)}" for warning in said]
    numbers = (int, float)
    return [
        {k: v for k, v in row.items() if isinstance(v, numbers) and not isinstance(v, bool)}
        for row in rows
    ]


def _spread(steps: Sequence[int]) -> Iterator[int]:
    """The last, the first, then the middles of what is left, halving."""
    if not steps:
        return
    yield steps[-1]
    if len(steps) > 1:
        yield steps[0]
    gaps = [(0, len(steps) - 1)]
    while gaps:
        finer = []
        for low, high in gaps:
            middle = (low + high) // 2
            if middle in (low, high):
                continue
            yield steps[middle]
            finer += [(low, middle), (middle, high)]
        gaps = finer


def _groups(file: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The completions of a step by problem."""
    try:
        rows = read_table(file)
    except InputError as error:
        notes.append(str(error))
        return []
    groups: dict[str, dict[str, Any]] = {}
    for row in rows:
        key = str(row.get("problem_id", row.get("prompt", "")))
        group = groups.setdefault(
            key,
            {
                "id": _shown(key),
                "prompt": _shown(row.get("prompt")),
                "answer": _shown(row.get("answer")),
                "images": [str(name) for name in row.get("images") or []],
                "rows": [],
            },
        )
        group["rows"].append(_completion(row))
    return list(groups.values())


def _pictures(path: Path, names: Sequence[str], budget: int, notes: list[str]) -> dict[str, str]:
    """Images of prompts by name, small, as data; one that cannot be shown is named. Only those in
    the run's folder and in its data's are looked at, whatever a file of the run says."""
    out: dict[str, str] = {}
    roots = _roots(path) if names else []
    for name in names:
        file = (path / name).resolve()
        try:
            if not any(file.is_relative_to(root) for root in roots):
                raise InputError(f"{_shown(name)}: an image outside the run and its data")
            (picture,) = images.decode([str(file)])
        except InputError as error:
            notes.append(str(error))
            continue
        picture.thumbnail((SIDE, SIDE))
        out[name] = images.data_url(picture)
        budget -= len(out[name])
        if budget < 0:
            notes.append(f"{len(out)} of {len(names)} images are in this page")
            break
    return out


def _roots(path: Path) -> list[Path]:
    roots = [path.resolve()]
    try:
        task = configs.read(path / "config.yaml").task
    except InputError:
        return roots
    return [*roots, Path(task).resolve().parent] if Path(task).suffix else roots


def _completion(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "parts": parts(row),
        "reward": _number(row.get("reward")),
        "outcome": _number(row.get("outcome", row.get("reward"))),
        "kind": _shown(row.get("reward_kind")),
        "reason": _shown(row.get("reward_reason")),
        "advantage": _number(row.get("advantage")),
        "finished": bool(row.get("finished", True)),
    }


def parts(row: Mapping[str, Any]) -> list[list[Any]]:
    """[text, step reward, step advantage] of every stretch; null, null outside all steps."""
    text = str(row.get("completion") or "")
    spans = row.get("steps") or []
    rewards, credit = row.get("step_rewards") or [], row.get("step_advantages") or []
    out: list[list[Any]] = []
    at = 0
    for i, span in enumerate(spans):
        if not isinstance(span, list | tuple) or len(span) != 2:
            continue
        start, end = max(at, min(int(span[0]), len(text))), min(int(span[1]), len(text))
        if start > at:
            out.append([text[at:start], None, None])
        if end > start:
            pair = [_number(v[i]) if i < len(v) else None for v in (rewards, credit)]
            out.append([text[start:end], *pair])
        at = max(at, end)
    if at < len(text):
        out.append([text[at:], None, None])
    room = max(200, LONGEST // max(1, len(out)))
    return [[_shown(piece, room), *rest] for piece, *rest in out]


def _shown(value: Any, room: int = LONGEST) -> str | None:
    """Text as the page may show it: control characters visible, a long middle left out."""
    if value is None:
        return None
    text = str(value)
    if len(text) > room:
        lost = len(text) - room
        text = f"{text[: room // 2]} [... {lost} characters ...] {text[-room // 2 :]}"
    return text.translate(CONTROL).encode("utf-8", "replace").decode()


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return round(float(value), 5)
