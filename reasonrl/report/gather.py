"""What the run page shows, read from a run's files; what is damaged is named and left out.

Numbers come from metrics.jsonl and evals.jsonl, completions from the parquet files. A completion is
sent as parts (text, step reward, step advantage), cut here, because characters are not counted
alike everywhere; tokens.py adds its tokens' log-probabilities where a run stores them. The page
holds at most BUDGET bytes of completions: the last step, the first, then ever finer in between
until it is full; POINTS rows of numbers; a text longer than LONGEST is cut in the middle and says
so. Whatever stands in a file, a page comes out: a value of a wrong type counts as missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from reasonrl import config as configs
from reasonrl import images
from reasonrl.log import COMPLETIONS, whole_rows
from reasonrl.progress import Phase, phase
from reasonrl.records import InputError
from reasonrl.report.tokens import tokens

BUDGET = 14_000_000  # bytes of the page for the completions of all runs
POINTS = 2_000  # rows of numbers of all runs, each of two files
LONGEST = 20_000  # characters of one text
SIDE = 320  # pixels of a shown image, at most
NOTES = 20  # of a run
CONTROL = {i: 0x2400 + i for i in range(32) if i not in (9, 10)} | {127: 0x2421}

Cache = dict[Path, tuple[str, Any, list[str]]]  # file -> its stamp, what was made of it, notes


def gather(
    runs: Sequence[str | Path], budget: int = BUDGET, cache: Cache | None = None
) -> dict[str, Any]:
    """Everything the page needs, JSON values only; InputError where a folder holds no run. A cache
    saves what files that have not changed cost the next time."""
    paths = [Path(run) for run in runs]
    share, points = budget // max(1, len(paths)), POINTS // max(1, len(paths))
    found = [_run(path, share, points, {} if cache is None else cache) for path in paths]
    for run, name in zip(found, _names(paths), strict=True):
        run["name"] = _shown(name)
    return {"runs": found}


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of every path, as many as tell them apart."""
    whole = [path.resolve().parts for path in paths]
    for size in range(1, max(map(len, whole), default=0)):
        names = ["/".join(parts[-size:]) for parts in whole]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def embedded(data: Any) -> str:
    """JSON that cannot end the element it stands in, nor be taken for markup."""
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _run(path: Path, budget: int, points: int, cache: Cache) -> dict[str, Any]:
    if not path.is_dir():
        raise InputError(f"{path}: no such folder; give the --out folder of `reasonrl train`")
    if not any((path / name).exists() for name in ("config.yaml", "metrics.jsonl")):
        raise InputError(
            f"{path}: expected a run (config.yaml, metrics.jsonl), found none; give the --out"
            " folder of `reasonrl train`"
        )
    notes: list[str] = []
    with phase("reading", len(completion_files(path)), "tables") as part:
        steps, read = _steps(path, budget, notes, cache, part)
    names = {name for step in steps for group in step["groups"] for name in group["images"]}
    return {
        "images": _pictures(path, sorted(names), budget - read, notes, cache),
        "config": _shown(_text(path / "config.yaml"), 100_000),
        "metrics": _numbers(path / "metrics.jsonl", points, notes),
        "evals": _numbers(path / "evals.jsonl", points, notes),
        "steps": sorted(steps, key=lambda s: s["step"]),
        "notes": notes[:NOTES] + [f"and {len(notes) - NOTES} more"] * (len(notes) > NOTES),
    }


def _steps(
    path: Path, budget: int, notes: list[str], cache: Cache, part: Phase
) -> tuple[list[dict[str, Any]], int]:
    """Steps whose completions fit into so many bytes of the page, and the bytes they take."""
    files, steps, read = completion_files(path), [], 0
    for number in _spread(sorted(files)):
        part.add()
        stamp = _stamp(files[number])
        (groups, size), said = _kept(cache, files[number], stamp, _sized)
        notes += said
        if steps and read + size > budget:
            notes.append(f"{len(steps)} of {len(files)} steps with completions are in this page")
            break
        if size > budget:
            whole = sum(len(group["rows"]) for group in groups)
            groups, size = _fitting(groups, budget)
            held = sum(len(group["rows"]) for group in groups)
            notes.append(f"step {number}: {held} of {whole} completions are in this page")
        read += size
        steps.append({"step": number, "stamp": stamp, "groups": groups})
    return steps, read


def _sized(file: Path, notes: list[str]) -> tuple[list[dict[str, Any]], int]:
    groups = _groups(file, notes)
    return groups, len(embedded(groups))


def _fitting(groups: list[dict[str, Any]], budget: int) -> tuple[list[dict[str, Any]], int]:
    """Whole groups in their order while they fit; the one that does not, as far as it does."""
    kept, read = [], 0
    for group in groups:
        room = budget - read - len(embedded(group | {"rows": []}))
        rows = []
        for row in group["rows"]:
            room -= len(embedded(row)) + 1
            if room < 0:
                break
            rows.append(row)
        if rows:
            kept.append(group | {"rows": rows})
            read += len(embedded(kept[-1])) + 1
        if len(rows) < len(group["rows"]):
            break
    return kept, read


def _kept(cache: Cache, file: Path, stamp: str, make) -> tuple[Any, list[str]]:
    """What `make(file, notes)` gives, and its notes; made anew where the file has changed."""
    if file not in cache or cache[file][0] != stamp:
        notes: list[str] = []
        cache[file] = stamp, make(file, notes), notes
    return cache[file][1:]


def _stamp(file: Path) -> str:
    """Another one as soon as the file is another one."""
    try:
        known = file.stat()
    except OSError:
        return ""
    return f"{known.st_mtime_ns:x}.{known.st_size:x}.{known.st_ino:x}"


def completion_files(path: Path) -> dict[int, Path]:
    """The completions table of every step that has one."""
    found = {}
    for file in (path / "completions").glob("*.parquet"):
        if match := COMPLETIONS.fullmatch(file.name):
            found[int(match[1])] = file
    return found


def read_table(file: Path, columns: list[str] | None = None) -> list[dict[str, Any]]:
    """The rows of a completions table, or those of the columns that it has; InputError where it is
    torn."""
    try:
        with file.open("rb") as data:
            table = pyarrow.parquet.ParquetFile(data, page_checksum_verification=True)
            has = table.schema_arrow.names
            wanted = None if columns is None else [name for name in columns if name in has]
            return table.read(wanted).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{file}: cannot be read ({reason})") from None


def _numbers(path: Path, points: int, notes: list[str]) -> list[dict[str, Any]]:
    """The rows of a metrics file that can be read, numbers only; evenly spaced where too many."""
    rows: list[dict[str, Any]] = []
    whole, bad = whole_rows(_text(path).encode())
    for row in whole:
        found = {k: rounded(v) for k, v in row.items()}
        said = _list(row.get("warnings"))
        notes += [f"step {row['step']}: {_shown(warning, 500)}" for warning in said]
        rows.append({str(_shown(k, 200)): v for k, v in found.items() if v is not None})
    if bad:
        also = f" and {len(bad) - 1} more" * (len(bad) > 1)
        notes.append(f"{path}: row {bad[0]}{also}: expected a JSON object with a step; left out")
    every = -(-len(rows) // max(1, points))
    if every > 1:
        notes.append(f"{path.name}: the curves show one row in {every} of {len(rows)}")
    return rows[::-1][:: max(1, every)][::-1]


def _text(path: Path) -> str:
    """A file's text; empty where there is none."""
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""


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
                "images": [name for name in _list(row.get("images")) if isinstance(name, str)],
                "rows": [],
            },
        )
        group["rows"].append(_completion(row))
    return list(groups.values())


def _pictures(
    path: Path, names: Sequence[str], budget: int, notes: list[str], cache: Cache
) -> dict[str, str]:
    """Images of prompts by name, small, as data; one that cannot be shown is named. Only those in
    the run's folder and in its data's are looked at, whatever a file of the run says."""
    out: dict[str, str] = {}
    roots = _roots(path) if names else []
    for name in names:
        try:
            file = (path / name).resolve()
            inside = any(file.is_relative_to(root) for root in roots)
        except (OSError, ValueError):  # no name of a file
            inside, file = False, path
        if not inside:
            notes.append(f"{_shown(name, 300)}: an image outside the run and its data")
            continue
        picture, said = _kept(cache, file, _stamp(file), _picture)
        notes += said
        budget -= len(picture)
        if budget < 0:
            notes.append(f"{len(out)} of {len(names)} images are in this page")
            break
        if picture:
            out[name] = picture
    return out


def _picture(file: Path, notes: list[str]) -> str:
    try:
        (picture,) = images.decode([str(file)])
    except InputError as error:
        notes.append(str(error))
        return ""
    picture.thumbnail((SIDE, SIDE))
    return images.data_url(picture)


def _roots(path: Path) -> list[Path]:
    roots = [path.resolve()]
    try:
        task = configs.read(path / "config.yaml").task
    except InputError:
        return roots
    return [*roots, Path(task).resolve().parent] if Path(task).suffix else roots


def _completion(row: Mapping[str, Any]) -> dict[str, Any]:
    shown = parts(row)
    out = {
        "parts": shown,
        "reward": _number(row.get("reward")),
        "outcome": _number(row.get("outcome", row.get("reward"))),
        "kind": _shown(row.get("reward_kind"), 300),
        "reason": _shown(row.get("reward_reason"), 2000),
        "advantage": _number(row.get("advantage")),
        "finished": bool(row.get("finished", True)),
    }
    text = str(row.get("completion") or "")
    whole = sum(len(piece) for piece, *_ in shown) == len(text)
    return out | (tokens(row, text) if whole else {})


def parts(row: Mapping[str, Any]) -> list[list[Any]]:
    """[text, step reward, step advantage] of every stretch; null, null outside all steps."""
    text = str(row.get("completion") or "")
    rewards, credit = (_list(row.get(name)) for name in ("step_rewards", "step_advantages"))
    out: list[list[Any]] = []
    at = 0
    for i, span in enumerate(_list(row.get("steps"))):
        if len(_list(span)) != 2 or not all(type(edge) is int for edge in span):
            continue
        start, end = max(at, min(span[0], len(text))), min(span[1], len(text))
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


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else []


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
    number = rounded(value)
    return None if number is None else round(float(number), 5)


def rounded(value: Any) -> int | float | None:
    """Six digits of a finite number, None for anything else; beyond 1e300 nothing is a number."""
    if type(value) not in (int, float) or not abs(value) < 1e300:
        return None
    return value if type(value) is int else float(f"{value:.6g}")
