"""Checkpoints that are whole or not there: written aside, hashed, published by one rename.

    tmp-<step>-<id>/ ... every file and folder fsynced ... manifest.json last ... fsync
    rename to checkpoint-<step>, fsync the run folder, and only then let older ones go

The manifest holds name, size and BLAKE2b of every file, the step, versions, world size and what
the trainer adds; it carries its own hash and must be byte for byte as written, so a single flipped
bit anywhere is found. `latest_verified` takes the newest whole checkpoint and says loudly when that
is not the newest one; damage is never answered by starting from scratch. See state_file.py too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from reasonrl import keys
from reasonrl.records import InputError

MANIFEST = "manifest.json"
PUBLISHED = re.compile(r"(checkpoint|replaced)-([0-9]{1,15})(?:-[0-9a-f]+)?")
ASIDE = re.compile(r"tmp-[0-9]{1,15}-[0-9a-f]+")
CHUNK = 1 << 20
FULL = (errno.ENOSPC, errno.EDQUOT)
logger = keys.logger("reasonrl.checkpoint")


class Disk:
    """Every file operation of a save, one method each: where the tests cut the power."""

    def mkdir(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)

    def write(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)

    def sync(self, path: Path) -> None:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def rename(self, old: Path, new: Path) -> None:
        os.rename(old, new)

    def remove(self, path: Path) -> None:
        shutil.rmtree(path)


def save(
    run_dir: str | Path,
    step: int,
    writer: Callable[[Path], None],
    meta: dict[str, Any],
    keep: int = 2,
    disk: Disk | None = None,
) -> Path:
    """Write, verify and publish checkpoint-<step>; then keep the newest `keep`, at least one.

    writer: puts the files into the folder it is given. meta: JSON values for the manifest. A
    checkpoint of the same step is replaced. InputError where the disk is full or the folder cannot
    be written; the checkpoints that were there stay as they were.
    """
    if keep < 1:
        raise ValueError(f"keep must be >= 1, got {keep}")
    run_dir, disk = Path(run_dir), disk or Disk()
    aside = run_dir / f"tmp-{step}-{uuid.uuid4().hex}"
    try:
        disk.mkdir(run_dir)
        disk.mkdir(aside)
        writer(aside)
        files = _settle(aside, disk)
        disk.write(aside / MANIFEST, _manifest(step, files, meta))
        disk.sync(aside / MANIFEST)
        disk.sync(aside)
        target = _publish(run_dir, aside, step, disk)
    except (OSError, SafetensorError) as error:
        raise _explained(run_dir, step, error) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # renamed away by now unless something failed
    _retire(run_dir, step, keep, disk)
    return target


def load(path: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint, every file of it verified; InputError naming what is wrong."""
    path = Path(path)
    manifest = read_manifest(path)
    for name, record in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise InputError(f"{file}: missing from the checkpoint")
        if file.stat().st_size != record["size"]:
            size = file.stat().st_size
            raise InputError(f"{file}: expected {record['size']} bytes, got {size}")
        if _digest(file) != record["blake2b"]:
            raise InputError(f"{file}: damaged (its hash differs from the manifest's)")
    return manifest


def latest_verified(
    run_dir: str | Path, clean: bool = True, keep: int | None = None
) -> Path | None:
    """The newest whole checkpoint; None where a run has none yet.

    Damaged ones are passed over with one loud line each; if nothing else is left that is an
    InputError, never a silent start from scratch. clean: remove what killed saves left behind
    (on rank 0 only). keep: how many a save leaves, where the last one may have died before that.
    """
    run_dir = Path(run_dir)
    found = _published(run_dir)
    chosen = None
    for _, path in found:
        try:
            load(path)
        except InputError as error:
            logger.error("DAMAGED CHECKPOINT passed over: %s", error)
            continue
        chosen = path
        break
    if chosen is None and found:
        raise InputError(f"{run_dir}: none of {len(found)} checkpoints is whole; last tried {path}")
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if clean and first and run_dir.is_dir():
        chosen = _clean(run_dir, chosen)
        if chosen is not None and keep is not None:
            _retire(run_dir, int(chosen.name.split("-")[1]), keep, Disk())
    return chosen


def checkpoints(run_dir: str | Path) -> list[tuple[int, Path]]:
    """(step, folder) of every published checkpoint, the newest first; not verified."""
    return [(step, path) for step, path in _published(Path(run_dir)) if "checkpoint-" in path.name]


def _settle(folder: Path, disk: Disk) -> dict[str, dict[str, Any]]:
    """Flush every file and folder; sizes and hashes of the files."""
    files, folders = {}, []
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and not path.is_symlink():
            folders.append(path)
            continue
        if path.is_symlink() or not path.is_file():
            raise InputError(f"{path}: a checkpoint holds plain files only")
        disk.sync(path)
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "blake2b": _digest(path)}
    for path in reversed(folders):
        disk.sync(path)
    return files


def _publish(run_dir: Path, aside: Path, step: int, disk: Disk) -> Path:
    """One rename; a checkpoint of the same step steps aside to a name that resuming reads too, and
    goes then, with those that killed saves left behind."""
    target = run_dir / f"checkpoint-{step}"
    if target.exists():
        disk.rename(target, run_dir / f"replaced-{step}-{uuid.uuid4().hex}")
    disk.rename(aside, target)
    disk.sync(run_dir)
    for former in sorted(run_dir.glob(f"replaced-{step}-*")):
        disk.remove(former)
    return target


def _retire(run_dir: Path, step: int, keep: int, disk: Disk) -> None:
    """Let older checkpoints go, and newer ones that a resumed run found damaged."""
    older = [path for s, path in _published(run_dir) if s < step]
    newer = [path for s, path in _published(run_dir) if s > step and not _whole(path)]
    for path in [*older[keep - 1 :], *newer]:
        doomed = run_dir / f"tmp-{step}-{uuid.uuid4().hex}"  # half a removal must not look whole
        disk.rename(path, doomed)
    for path in run_dir.iterdir():
        if ASIDE.fullmatch(path.name):  # these, and what killed saves left behind
            disk.remove(path)


def _clean(run_dir: Path, chosen: Path | None) -> Path | None:
    """Remove unfinished saves; give a replaced checkpoint that is still the best its name back."""
    for path in run_dir.iterdir():
        if ASIDE.fullmatch(path.name):
            shutil.rmtree(path, ignore_errors=True)
    if chosen is None:
        return None
    step = int(PUBLISHED.fullmatch(chosen.name)[2])  # type: ignore[index]
    target = run_dir / f"checkpoint-{step}"
    if chosen != target:
        if target.exists():
            shutil.rmtree(target)
        chosen = chosen.rename(target)
    for path in run_dir.glob(f"replaced-{step}-*"):
        shutil.rmtree(path, ignore_errors=True)
    return chosen


def _published(run_dir: Path) -> list[tuple[int, Path]]:
    """Newest first; for one step the checkpoint before what it replaced."""
    if not run_dir.is_dir():
        return []
    found = []
    for path in run_dir.iterdir():
        match = PUBLISHED.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[2]), match[1] == "checkpoint", path))
    return [(step, path) for step, _, path in sorted(found, key=lambda f: f[:2], reverse=True)]


def _whole(path: Path) -> bool:
    try:
        load(path)
    except InputError:
        return False
    return True


def _manifest(step: int, files: dict[str, Any], meta: dict[str, Any]) -> bytes:
    world = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    body = {
        "format": 1,
        "step": step,
        "files": files,
        "versions": {"python": platform.python_version()} | _versions(),
        "world_size": world,
        "meta": meta,
    }
    return _canonical(body | {"blake2b": _hash(_canonical(body))})


def read_manifest(path: str | Path) -> dict[str, Any]:
    """The manifest of a checkpoint, itself checked but not the files it names."""
    path = Path(path) / MANIFEST
    try:
        raw = path.read_bytes()
        manifest = json.loads(raw)
    except FileNotFoundError:
        raise InputError(f"{path}: missing, so the checkpoint was never finished") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}: damaged (not JSON)") from None
    if not isinstance(manifest, dict) or raw != _canonical(manifest):
        raise InputError(f"{path}: damaged (not as it was written)")
    body = {key: value for key, value in manifest.items() if key != "blake2b"}
    if manifest.get("blake2b") != _hash(_canonical(body)):
        raise InputError(f"{path}: damaged (its own hash differs)")
    if manifest.get("format") != 1:
        raise InputError(f"{path}: expected format 1, got {manifest.get('format')!r}")
    if not isinstance(files := manifest.get("files"), dict):
        raise InputError(f"{path}: expected a list of files, got {files!r}")
    for name, record in files.items():
        if name.startswith("/") or ".." in name.split("/"):
            raise InputError(f"{path}: a file outside the checkpoint: {name!r}")
        if not isinstance(record, dict) or not {"size", "blake2b"} <= record.keys():
            raise InputError(f"{path}: {name!r}: expected size and blake2b, got {record!r}")
    return manifest


def _versions() -> dict[str, str]:
    found = {}
    for name in ("reasonrl", "torch", "transformers", "safetensors"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found


def _canonical(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=32).hexdigest()


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=32)
    try:
        with path.open("rb") as file:
            while block := file.read(CHUNK):
                digest.update(block)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def _explained(run_dir: Path, step: int, error: OSError | SafetensorError) -> InputError:
    number = error.errno if isinstance(error, OSError) else None
    last = checkpoints(run_dir)
    kept = f"the last one kept is {last[0][1].name}" if last else "there is no earlier one"
    if number in FULL or "os error 28" in str(error):
        then = "make room, then go on with --resume"
        return InputError(f"{run_dir}: no space left for checkpoint-{step}; {kept}; {then}")
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return InputError(f"{run_dir}: checkpoint-{step} cannot be written ({reason}); {kept}")
