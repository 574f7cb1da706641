"""Image files that come with data: opened without following links, decoded in a limited process.

    decode(["/data/a.png", picture])  ->  [PIL.Image.Image, ...], RGB

A path is a resolved one (as tasks give them): a link anywhere in it, put there later, is refused.
A file is PNG, JPEG, WebP or BMP, at most 20 MB, 40 megapixels and one frame, and its own header is
read before any decoder sees it (images_header.py). Decoding happens in a killable worker with
limits on memory and time (_image_worker.py); a rotation in the EXIF data is applied, palettes, CMYK
and 16 bits become RGB, what is transparent lies on white. What fails is BadImage: path and reason.
Whatever has `draw()` and `key` instead of being a path draws itself (tasks/charts_draw.py).
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import os
import stat
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from reasonrl.images_header import HEAD, Header, NotAnImage, header
from reasonrl.records import InputError
from reasonrl.workers import Pool

if TYPE_CHECKING:
    from PIL.Image import Image

BYTES = 20_000_000  # of a file
PIXELS = 40_000_000
MEMORY = 1 << 30  # bytes of address space of a worker; 40 megapixels with an alpha channel fit
TOGETHER = 8  # images whose pixels are in memory twice at a time

_lock = threading.Lock()
_pools: dict[int, Pool] = {}  # by process, so that a forked child gets its own


class Drawn(Protocol):
    """A picture that needs no file."""

    @property
    def key(self) -> str: ...

    def draw(self) -> Image: ...


class BadImage(InputError):
    """An image that cannot be used: `path` and `reason`."""

    def __init__(self, path: str, reason: str):
        super().__init__(f"{path}: expected an image, but {reason}")
        self.path, self.reason = path, reason


def decode(images: Sequence[str | Drawn], *, timeout: float = 30.0) -> list[Image]:
    """The images as RGB, in order; BadImage for the first that is none. timeout: seconds for one.

    Blocking; safe from any thread.
    """
    if not timeout > 0:
        raise ValueError(f"timeout must be > 0, got {timeout!r}")
    out: dict[int, Image] = {}
    paths = []
    for i, image in enumerate(images):
        if isinstance(image, str):
            paths.append(i)
        else:
            out[i] = image.draw()
    for start in range(0, len(paths), TOGETHER):
        some = paths[start : start + TOGETHER]
        out |= zip(some, _decoded([str(images[i]) for i in some], timeout), strict=True)
    return [out[i] for i in range(len(images))]


def check(path: str) -> Header:
    """The header of an image file that may be decoded; BadImage otherwise. Decodes nothing."""
    with _opened(path) as file:
        return _header(path, file.read(HEAD))


def key(image: str | Drawn) -> str:
    """A name for what an image holds: the hash of the file, or the picture's own."""
    if not isinstance(image, str):
        return image.key
    with _opened(image) as file:
        return hashlib.blake2b(file.read(BYTES), digest_size=16).hexdigest()


def data_url(image: Image) -> str:
    """An image as a PNG inside a URL, as chat servers take it."""
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def close() -> None:
    """End the workers of this process; the next call starts new ones."""
    with _lock:
        pool = _pools.pop(os.getpid(), None)
    if pool is not None:
        pool.close()


def _opened(path: str) -> io.BufferedReader:
    """A file of a sensible size, reached without any link."""
    *folders, name = Path(os.path.abspath(path)).parts
    walk = os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | getattr(os, "O_PATH", os.O_RDONLY)
    file = -1
    try:
        here = os.open(folders[0], walk)
        try:
            for folder in folders[1:]:
                below = os.open(folder, walk, dir_fd=here)
                os.close(here)
                here = below
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            file = os.open(name, flags, dir_fd=here)
        finally:
            os.close(here)
    except ValueError:
        raise BadImage(repr(path), "the path has a zero byte") from None
    except (OSError, IndexError) as error:
        raise BadImage(path, _why(error)) from None
    found = os.fstat(file)
    reason = ""
    if not stat.S_ISREG(found.st_mode):
        reason = "it is no regular file"
    elif found.st_size == 0:
        reason = "the file is empty"
    elif found.st_size > BYTES:
        reason = f"it has {found.st_size} bytes, {BYTES} are read at most"
    if reason:
        os.close(file)
        raise BadImage(path, reason)
    return os.fdopen(file, "rb")


def _why(error: OSError | IndexError) -> str:
    if isinstance(error, IndexError):
        return "the path is empty"
    if error.errno in (errno.ELOOP, errno.ENOTDIR):
        return "a link stands in its path, or no folder where one should be"
    return f"it cannot be opened ({error.strerror})"


def _header(path: str, data: bytes) -> Header:
    try:
        found = header(data)
    except NotAnImage as error:
        raise BadImage(path, str(error)) from None
    if found.width * found.height > PIXELS:
        raise BadImage(
            path, f"it has {found.width} x {found.height} pixels, {PIXELS} are decoded at most"
        )
    return found


def _decoded(paths: Sequence[str], timeout: float) -> list[Image]:
    """The images of some files; the bytes checked are the bytes decoded, both from one copy."""
    image_module = _pillow()
    tasks, files = [], []
    try:
        for i, path in enumerate(paths):
            with _opened(path) as file:
                data = file.read(BYTES)
            found = _header(path, data)
            files += [os.memfd_create("image"), os.memfd_create("pixels")]
            with os.fdopen(os.dup(files[-2]), "wb") as copy:
                copy.write(data)
            names = [f"/proc/{os.getpid()}/fd/{number}" for number in files[-2:]]
            task = {"id": i, "timeout": timeout, "file": names[0], "pixels": names[1]}
            tasks.append(task | found._asdict())
        replies = _pool().run(tasks)
        out = []
        for i, path in enumerate(paths):
            reply = replies[i]
            reason = reply.get("refused") or reply.get("failed")
            if reason:
                raise BadImage(path, reason)
            size = (int(reply["width"]), int(reply["height"]))
            with os.fdopen(os.dup(files[2 * i + 1]), "rb") as pixels:
                pixels.seek(0)
                data = pixels.read()
            if len(data) != 3 * size[0] * size[1]:
                raise BadImage(path, "the decoder gave another number of pixels than it said")
            out.append(image_module.frombytes("RGB", size, data))
        return out
    finally:
        for number in files:
            os.close(number)


def _pillow():
    try:
        from PIL import Image  # optional
    except ImportError:
        raise InputError(
            "images: the package pillow is not installed (pip install reasonrl[vision])"
        ) from None
    return Image


def _pool() -> Pool:
    with _lock:
        pool = _pools.get(os.getpid())
        if pool is None:
            size = max(1, min(4, len(os.sched_getaffinity(0))))
            script = Path(__file__).with_name("_image_worker.py")
            pool = _pools[os.getpid()] = Pool(script, size, MEMORY)
        return pool
