"""What an image file says of itself in its first bytes, read before any decoder sees them.

PNG, JPEG, WebP and BMP; the size in pixels and whether there is more than one frame. Only these
fields are looked at, in plain Python, so a hostile header can do no more than be refused. Anything
else is NotAnImage with what it is instead. Try: header(open("a.png", "rb").read()).
"""

from __future__ import annotations

import struct
from typing import NamedTuple

HEAD = 1 << 20  # bytes that are enough to find the size behind any sensible metadata
OTHERS = {
    b"GIF8": "GIF", b"II*\0": "TIFF", b"MM\0*": "TIFF", b"%PDF": "PDF", b"\0\0\1\0": "ICO",
    b"8BPS": "PSD", b"\xff\x0a": "JPEG XL", b"<svg": "SVG", b"PK\3\4": "a zip file",
}  # fmt: skip


class NotAnImage(ValueError):
    """What the bytes are instead of an image that may be decoded."""


class Header(NamedTuple):
    format: str  # PNG, JPEG, WEBP or BMP, as Pillow names them
    width: int
    height: int


def header(data: bytes) -> Header:
    """The header of an image file; `data` is all of it or the first HEAD bytes."""
    if not data:
        raise NotAnImage("the file is empty")
    for magic, read in READERS:
        if data.startswith(magic):
            try:
                found = Header(*read(data))
            except (struct.error, IndexError):
                raise NotAnImage("the file ends inside its header") from None
            if found.width < 1 or found.height < 1:
                raise NotAnImage(f"the size is {found.width} x {found.height}")
            return found
    for magic, name in OTHERS.items():
        if data.startswith(magic):
            raise NotAnImage(f"it is {name}; PNG, JPEG, WebP and BMP are read")
    raise NotAnImage("it is no PNG, JPEG, WebP or BMP")


def _png(data: bytes) -> tuple[str, int, int]:
    if data[12:16] != b"IHDR":
        raise NotAnImage("a PNG without its first chunk")
    width, height = struct.unpack_from(">II", data, 16)
    at = 8
    while at + 8 <= len(data):  # the chunk that says "animated" stands before the pixels
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"acTL":
            raise NotAnImage("an animated PNG; one frame is read")
        if kind == b"IDAT":
            break
        at += 12 + length
    return "PNG", width, height


def _jpeg(data: bytes) -> tuple[str, int, int]:
    at = 2
    while True:
        if data[at] != 0xFF:
            raise NotAnImage("a JPEG with a broken segment")
        while data[at] == 0xFF:  # fill bytes
            at += 1
        marker = data[at]
        if marker == 0xDA:
            raise NotAnImage("a JPEG without a size before its pixels")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 4)
            return "JPEG", width, height
        alone = marker == 0x01 or 0xD0 <= marker <= 0xD9
        at += 1 if alone else 1 + max(2, struct.unpack_from(">H", data, at + 1)[0])


def _webp(data: bytes) -> tuple[str, int, int]:
    kind = data[12:16]
    if data[8:12] != b"WEBP":
        raise NotAnImage("a RIFF file that is no WebP")
    if kind == b"VP8X":
        if data[20] & 2:
            raise NotAnImage("an animated WebP; one frame is read")
        width = 1 + int.from_bytes(_exactly(data, 24, 3), "little")
        return "WEBP", width, 1 + int.from_bytes(_exactly(data, 27, 3), "little")
    if kind == b"VP8L":
        bits = struct.unpack_from("<I", data, 21)[0]
        return "WEBP", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return "WEBP", width & 0x3FFF, height & 0x3FFF
    raise NotAnImage("a WebP of an unknown kind")


def _bmp(data: bytes) -> tuple[str, int, int]:
    size = struct.unpack_from("<I", data, 14)[0]
    if size == 12:
        return "BMP", *struct.unpack_from("<HH", data, 18)
    width, height = struct.unpack_from("<ii", data, 18)
    return "BMP", width, abs(height)  # a negative height: rows from the top


def _exactly(data: bytes, at: int, count: int) -> bytes:
    if len(data) < at + count:
        raise IndexError(at)
    return data[at : at + count]


READERS = (
    (b"\x89PNG\r\n\x1a\n", _png),
    (b"\xff\xd8\xff", _jpeg),
    (b"RIFF", _webp),
    (b"BM", _bmp),
)
