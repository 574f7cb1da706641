"""The process that decodes image files nobody vouches for, with limits on memory, CPU and files.

Run by path, never imported (`images.py` starts and kills it). One JSON object a line: a task names
two files of the owner's that only exist in memory, one with the bytes of an image and one for the
pixels; the reply gives the size, or why there are no pixels. Pillow is imported here and decodes
nowhere else.
"""

from __future__ import annotations

import json
import os
import struct
import sys
import zlib

PIXELS = 160 << 20  # bytes that may be written


class Refused(Exception):
    pass


def main() -> None:
    from _limits import cpu_limit, limits  # from the folder of this file

    sys.path.pop(0)  # its modules must not shadow others
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    limits(int(sys.argv[1]), PIXELS)
    from PIL import Image, ImageFile

    Image.MAX_IMAGE_PIXELS = None  # the owner has looked at the size
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    Image.preinit()  # PNG, JPEG, BMP, ... before the first task
    import PIL.WebPImagePlugin  # noqa: F401

    print(json.dumps({"ready": True}), file=replies, flush=True)
    for line in sys.stdin:
        task = json.loads(line)
        cpu_limit(task["timeout"])
        print(json.dumps({"id": task["id"]} | decoded(task)), file=replies, flush=True)


def decoded(task: dict) -> dict:
    """{"width", "height"} with the pixels written, or {"refused": reason}."""
    try:
        with open(task["pixels"], "r+b", buffering=0) as out:
            width, height, pixels = picture(task)
            view = memoryview(pixels)
            while view:
                view = view[out.write(view) :]
        return {"width": width, "height": height}
    except MemoryError:
        return {"refused": "decoding it takes too much memory"}
    except Refused as error:
        return {"refused": str(error)}
    except (OSError, EOFError, SyntaxError, ValueError, TypeError, LookupError) as error:
        return {"refused": f"it does not decode ({str(error)[:200]})"}
    except (struct.error, zlib.error, OverflowError) as error:
        return {"refused": f"it does not decode ({str(error)[:200]})"}


def picture(task: dict) -> tuple[int, int, bytes]:
    """Upright RGB pixels; what is transparent lies on white."""
    from PIL import Image, ImageOps

    with Image.open(task["file"], formats=[task["format"]]) as image:
        if image.size != (task["width"], task["height"]):
            raise Refused(f"the header says another size than the decoder, {image.size}")
        if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":  # a camera's second view
            raise Refused("it has several frames; one is read")
        image.load()
        upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16") or upright.mode in ("I", "F"):  # 16 bits a pixel
        upright = upright.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if upright.has_transparency_data:
        upright = upright.convert("RGBA")
        paper = Image.new("RGBA", upright.size, (255, 255, 255, 255))
        upright = Image.alpha_composite(paper, upright)
    upright = upright.convert("RGB")
    return (*upright.size, upright.tobytes())


if __name__ == "__main__":
    main()
