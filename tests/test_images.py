"""Images from outside: what is refused and why, what the pixels become, rows with images."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reasonrl import images
from reasonrl.images import BadImage, decode
from reasonrl.images_header import Header, NotAnImage, header
from reasonrl.records import InputError
from reasonrl.tasks import make_task
from reasonrl.tasks.charts_draw import Mark, Picture
from reasonrl.tasks.rows import read_problems


def split(width=31, height=17, left=(200, 10, 20), right=(10, 20, 200)):
    """An image with two halves, so that a turn or a swap of channels shows."""
    image = Image.new("RGB", (width, height), right)
    image.paste(left, (0, 0, width // 2, height))
    return image


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, *chunks):
    """A PNG whose header says what we want, with or without pixels behind it."""
    start = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + start + b"".join(chunks) + chunk(b"IEND", b"")


def test_pixels_survive_every_format(tmp_path):
    paths = []
    for kind, options in [
        ("png", {}),
        ("bmp", {}),
        ("webp", {"lossless": True}),
        ("jpg", {"quality": 95, "subsampling": 0}),
    ]:
        paths.append(str(tmp_path / f"a.{kind}"))
        split().save(paths[-1], **options)
    split().save(tmp_path / "lossy.webp", quality=95)
    picture = Picture(32, (Mark("block", "r", 0, 0, 8, 4),))
    found = decode([*paths, picture, str(tmp_path / "lossy.webp")])
    assert all(image.mode == "RGB" for image in found)
    for image in found[:3]:
        assert image.tobytes() == split().tobytes()
    for image in (found[3], found[5]):
        assert image.size == (31, 17)
        for at, wanted in [((3, 8), (200, 10, 20)), ((27, 8), (10, 20, 200))]:
            assert all(abs(a - b) <= 6 for a, b in zip(image.getpixel(at), wanted, strict=True))
    assert found[4].tobytes() == picture.draw().tobytes()
    assert decode([]) == []


def test_all_modes_become_rgb(tmp_path):
    red = (255, 0, 0)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "palette.png")
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("L", (2, 1), 77).save(tmp_path / "grey.png")
    Image.new("1", (2, 1), 1).save(tmp_path / "bits.bmp")
    seethrough = Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    seethrough.putpixel((1, 0), (255, 0, 0, 255))
    seethrough.putpixel((2, 0), (255, 0, 0, 51))
    seethrough.save(tmp_path / "alpha.png")
    deep = Image.new("I;16", (3, 1))
    for x, value in enumerate((0, 32768, 65535)):
        deep.putpixel((x, 0), value)
    deep.save(tmp_path / "deep.png")
    names = ["palette.png", "cmyk.jpg", "grey.png", "bits.bmp", "alpha.png", "deep.png"]
    two, ink, grey, bits, alpha, shades = decode([str(tmp_path / name) for name in names])
    assert two.getpixel((0, 0)) == red and two.getpixel((1, 0)) == (0, 0, 255)
    assert all(abs(a - b) <= 3 for a, b in zip(ink.getpixel((4, 4)), red, strict=True))
    assert grey.getpixel((1, 0)) == (77,) * 3 and bits.getpixel((0, 0)) == (255,) * 3
    # transparent is white, opaque stays, a fifth of red over white: 255 - 51
    assert [alpha.getpixel((x, 0)) for x in range(3)] == [(255,) * 3, red, (255, 204, 204)]
    assert [shades.getpixel((x, 0))[0] for x in range(3)] == [0, 128, 255]


def test_the_turn_in_the_exif_data_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned: to be rotated by 90 degrees clockwise
    image = Image.new("RGB", (32, 16), (0, 0, 255))
    image.paste((255, 0, 0), (0, 0, 32, 8))  # red above; upright it is on the right
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    (found,) = decode([str(tmp_path / "a.jpg")])
    assert found.size == (16, 32)
    assert found.getpixel((14, 16))[0] > 200 and found.getpixel((1, 16))[2] > 200


def bad(tmp_path):
    """File name, content, what the message says."""
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    for name in ("film.gif", "film.webp", "film.png"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    split(200, 200).save(tmp_path / "whole.png")
    split(200, 200).save(tmp_path / "whole.jpg")
    whole = {kind: (tmp_path / f"whole.{kind}").read_bytes() for kind in ("png", "jpg")}
    still = Image.new("RGB", (4, 4))
    for name in ("still.gif", "still.tiff"):
        still.save(tmp_path / name)
    bomb = chunk(b"IDAT", zlib.compress(b"\0" * 9001 * 9000, 9))
    changed = png(5, 5, chunk(b"IDAT", b"\xff" * 30))  # no compressed data
    read = lambda name: (tmp_path / name).read_bytes()  # noqa: E731
    return [
        ("empty.png", b"", "the file is empty"),
        ("bomb.png", png(9000, 9000, bomb), "it has 9000 x 9000 pixels, 40000000 are decoded"),
        ("bomb.bmp", b"BM" + bytes(12) + struct.pack("<Iii", 40, 9000, -9000), "9000 x 9000"),
        ("flat.png", png(0, 7), "the size is 0 x 7"),
        ("film.gif", read("film.gif"), "it is GIF; PNG, JPEG, WebP and BMP are read"),
        ("still.png", read("still.gif"), "it is GIF"),
        ("still.jpg", read("still.tiff"), "it is TIFF"),
        ("film.webp", read("film.webp"), "an animated WebP"),
        ("film.png", read("film.png"), "an animated PNG"),
        ("text.png", b"no pixels here\n", "it is no PNG, JPEG, WebP or BMP"),
        ("head.png", whole["png"][:20], "the file ends inside its header"),
        ("head.jpg", whole["jpg"][:20], "the file ends inside its header"),
        ("torn.png", whole["png"][:-200], "it does not decode"),
        ("torn.jpg", whole["jpg"][: len(whole["jpg"]) * 2 // 3], "it does not decode"),
        ("changed.png", changed, "it does not decode"),
        ("script.svg", b"<svg onload='x'/>", "it is SVG"),
        ("large.png", whole["png"] + bytes(20_000_000), "bytes, 20000000 are read at most"),
    ]


def test_what_is_no_image_is_refused_with_path_and_reason(tmp_path):
    good = str(tmp_path / "good.png")
    for name, data, reason in bad(tmp_path):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(BadImage, match=reason) as caught:
            decode([good_image(good), str(path)])
        assert caught.value.path == str(path) and str(caught.value).startswith(f"{path}: ")
        assert isinstance(caught.value, InputError)
    assert decode([good])[0].size == (31, 17)  # the workers still do their work
    for path, reason in [
        (tmp_path, "it is no regular file"),
        (tmp_path / "none.png", "it cannot be opened"),
        ("a\0b", "the path has a zero byte"),
    ]:
        with pytest.raises(BadImage, match=reason):
            decode([str(path)])


def good_image(path):
    split().save(path)
    return path


def test_a_link_put_there_after_the_check_is_refused(tmp_path):
    for name in ("data/in", "out"):
        (tmp_path / name).mkdir(parents=True)
    good_image(tmp_path / "out" / "a.png")
    path = str(tmp_path / "data" / "in" / "a.png")
    good_image(path)
    assert images.check(path) == Header("PNG", 31, 17)
    os.remove(path)
    os.symlink(tmp_path / "out" / "a.png", path)
    with pytest.raises(BadImage, match="a link stands in its path"):
        decode([path])
    os.remove(path)
    (tmp_path / "data" / "in").rmdir()
    (tmp_path / "data" / "in").symlink_to(tmp_path / "out")  # a folder instead
    with pytest.raises(BadImage, match="a link stands in its path"):
        images.check(path)
    os.mkfifo(tmp_path / "out" / "pipe.png")  # opening it must not wait for a writer
    with pytest.raises(BadImage, match="no regular file"):
        decode([str(tmp_path / "out" / "pipe.png")])


def test_a_decoder_that_hangs_or_takes_too_much_is_ended(tmp_path, monkeypatch):
    path = good_image(str(tmp_path / "a.png"))
    images.close()
    monkeypatch.setattr(images, "MEMORY", 150 << 20)
    wide = str(tmp_path / "wide.png")
    Image.new("L", (6000, 6000)).save(wide, compress_level=1)
    try:
        with pytest.raises(BadImage, match="too much memory|the worker died|does not decode"):
            decode([wide])
        assert decode([path])[0].tobytes() == split().tobytes()
    finally:
        images.close()
    with pytest.raises(BadImage, match="timeout after 1e-05 s"):
        decode([path], timeout=1e-5)
    with pytest.raises(ValueError, match="timeout must be > 0"):
        decode([path], timeout=0)
    assert decode([path])[0].size == (31, 17)


HEADERS = {  # name: how Pillow saves it, what the header must say
    "a.png": ({}, "PNG"),
    "a.bmp": ({}, "BMP"),
    "a.jpg": ({}, "JPEG"),
    "progressive.jpg": ({"progressive": True}, "JPEG"),
    "comment.jpg": ({"comment": b"x" * 60_000, "icc_profile": b"y" * 100_000}, "JPEG"),
    "lossless.webp": ({"lossless": True}, "WEBP"),
    "lossy.webp": ({}, "WEBP"),
    "extended.webp": ({"icc_profile": b"y" * 1000}, "WEBP"),
}


@pytest.mark.parametrize("width, height", [(1, 1), (257, 3), (640, 481)])
def test_headers_say_what_was_saved(tmp_path, width, height):
    for name, (options, kind) in HEADERS.items():
        split(width, height).save(tmp_path / name, **options)
        assert header((tmp_path / name).read_bytes()) == Header(kind, width, height), name


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    folder = tmp_path_factory.mktemp("samples")
    for name, (options, _) in HEADERS.items():
        split(20, 10).save(folder / name, **options)
    return [path.read_bytes()[:300] for path in sorted(folder.iterdir())]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_any_bytes_give_a_header_or_a_typed_error(samples, data):
    """Files with bytes changed and cut off."""
    torn = bytearray(data.draw(st.sampled_from(samples)))
    for _ in range(data.draw(st.integers(0, 4))):
        torn[data.draw(st.integers(0, len(torn) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = header(bytes(torn[: data.draw(st.integers(0, len(torn)))]))
    except NotAnImage as error:
        assert str(error)
    else:
        assert found.width >= 1 and found.height >= 1


def write(folder, rows):
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "d.jsonl")


def parts(*kinds):
    texts = {"image": {"type": "image"}, "text": {"type": "text", "text": "what is it?"}}
    return [{"role": "user", "content": [texts[kind] for kind in kinds]}]


def test_rows_with_images_are_checked_when_the_file_is_read(tmp_path):
    good_image(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"text")
    good = [
        {"prompt": "what?", "answer": "x", "images": ["a.png"]},
        {"prompt": parts("image", "text", "image"), "answer": "x", "images": ["a.png", "a.png"]},
        {"prompt": parts("text"), "answer": "x"},
    ]
    assert [len(p.images) for p in read_problems(write(tmp_path, good))] == [1, 2, 0]
    places = "field 'prompt': expected one part of type 'image' for each of"
    wrong = [
        ({"images": ["b.png"]}, "field 'images': 'b.png': it is no PNG, JPEG, WebP or BMP"),
        ({"prompt": parts("image", "text")}, f"{places} 0 images, got 1"),
        ({"prompt": parts("text"), "images": ["a.png"]}, f"{places} 1 images, got 0"),
        (
            {"prompt": [{"role": "user", "content": "see"}], "images": ["a.png"]},
            f"{places} 1 images, got 0",
        ),
    ]
    for change, message in wrong:
        path = write(tmp_path, [*good, {"prompt": "q", "answer": "x"} | change])
        with pytest.raises(InputError, match=f"row 4: {message}"):
            read_problems(path)
    path = write(tmp_path, [{"prompt": "q", "answer": "x"} | c for c, _ in wrong] + good)
    with pytest.raises(InputError, match="row 1"):
        make_task(path)
    task = make_task(path, bad_rows="skip")
    assert task.skipped == {path: 4}
    assert sum(len(task._splits[split]) for split in ("train", "dev", "test")) == 3
    assert make_task(write(tmp_path, good), bad_rows="skip").skipped == {path: 0}
    with pytest.raises(InputError, match="no row can be used; row 1: field 'images'"):
        make_task(write(tmp_path, [{"prompt": "q", "images": ["b.png"]}]), bad_rows="skip")
    with pytest.raises(InputError, match="bad_rows"):
        make_task(path, bad_rows="ignore")


def test_keys_and_urls(tmp_path):
    one, two = good_image(str(tmp_path / "a.png")), good_image(str(tmp_path / "b.png"))
    assert images.key(one) == images.key(two)
    split(5, 5).save(two)
    assert images.key(one) != images.key(two)
    picture = Picture(16, ())
    assert images.key(picture) == picture.key
    head, _, body = images.data_url(picture.draw()).partition(",")
    assert head == "data:image/png;base64" and body.startswith("iVBORw0KGgo")


def test_reading_rows_needs_no_pillow(tmp_path):
    good_image(tmp_path / "a.png")
    path = write(tmp_path, [{"prompt": "what?", "answer": "x", "images": ["a.png"]}] * 2)
    run = "import sys; from reasonrl.tasks.rows import read_problems as r; r(sys.argv[1])"
    run += "; assert 'PIL.Image' not in sys.modules"
    subprocess.run([sys.executable, "-c", run, path], check=True)
