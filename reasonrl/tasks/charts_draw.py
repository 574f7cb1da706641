"""Pictures that draw themselves: a few marks on a grid of 8 x 8 cells, exact to the pixel.

A picture is data (size and marks), so it is compared, pickled and hashed by what it shows, and the
same data gives the same pixels everywhere: whole cells in one flat colour, discs and triangles by
integer arithmetic, no smoothing and no fonts. A cell is size / 8 pixels, so patches of that size,
or of a half of it, see a cell each or a part of one, never parts of two.
    bars({"r": 3, "g": 7}, 64, Draws(0)).draw().save("bars.png")
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from reasonrl.records import InputError
from reasonrl.tasks.base import Draws

if TYPE_CHECKING:
    from PIL.Image import Image

CELLS = 8  # a side
COLOURS = {
    "r": (220, 30, 30), "g": (30, 160, 60), "b": (40, 70, 220), "y": (235, 200, 20),
    "c": (30, 190, 200), "m": (200, 50, 190),
}  # fmt: skip
PAPER, LINE = (255, 255, 255), (205, 205, 205)
SHAPES = ("square", "disc", "triangle")


class Mark(NamedTuple):
    """A rectangle of cells; a disc and a triangle fill a cell but for a margin of an eighth."""

    shape: str  # block, or one of SHAPES
    colour: str  # a key of COLOURS
    column: int  # of the left edge, from 0
    row: int  # of the upper edge, from 0
    width: int = 1
    height: int = 1


@dataclass(frozen=True)
class Picture:
    """size: pixels a side, a multiple of 8. grid: thin lines between the cells."""

    size: int
    marks: tuple[Mark, ...]
    grid: bool = False

    @cached_property
    def key(self) -> str:
        """The name of what is shown: equal pictures have equal keys, in every process."""
        text = repr((self.size, self.grid, [tuple(mark) for mark in self.marks]))
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

    def draw(self) -> Image:
        """The pixels, (size, size) RGB; InputError where Pillow is not installed."""
        try:
            from PIL import Image, ImageDraw  # optional
        except ImportError:
            raise InputError(
                "pictures: the package pillow is not installed (pip install reasonrl[vision])"
            ) from None
        image = Image.new("RGB", (self.size, self.size), PAPER)
        pen, cell = ImageDraw.Draw(image), self.size // CELLS
        for mark in self.marks:
            _mark(pen, mark, cell)
        for edge in range(0, self.size, cell) if self.grid else ():
            pen.line([(edge, 0), (edge, self.size - 1)], fill=LINE)
            pen.line([(0, edge), (self.size - 1, edge)], fill=LINE)
        return image


def _mark(pen, mark: Mark, cell: int) -> None:
    left, top = mark.column * cell, mark.row * cell
    right, bottom = left + mark.width * cell - 1, top + mark.height * cell - 1
    colour = COLOURS[mark.colour]
    if mark.shape == "block":
        pen.rectangle([(left, top), (right, bottom)], fill=colour)
        return
    inner = range(cell // 8, cell - cell // 8)  # rows and columns inside the margin
    first, last = inner[0], inner[-1]
    for y in inner:
        for x in inner:
            across, down = 2 * x - first - last, 2 * y - first - last  # from the centre, doubled
            inside = (
                mark.shape == "square"
                or (mark.shape == "disc" and across**2 + down**2 <= (last - first + 1) ** 2)
                or (mark.shape == "triangle" and abs(across) <= y - first + 1)
            )
            if inside:
                pen.point((left + x, top + y), fill=colour)


def bars(heights: Mapping[str, int], size: int, draws: Draws) -> Picture:
    """One bar a colour, so many cells high, standing on the lower edge in columns drawn at random
    with a free column between any two."""
    columns = sorted(draws.shuffled(range(0, CELLS, 2))[: len(heights)])
    places = draws.shuffled(columns)
    marks = [
        Mark("block", colour, column, CELLS - height, 1, height)
        for (colour, height), column in zip(heights.items(), places, strict=True)
    ]
    return Picture(size, tuple(sorted(marks, key=lambda mark: mark.column)))


def scatter(counts: Mapping[str, int], size: int, draws: Draws) -> Picture:
    """So many shapes of each colour, in cells drawn at random; the kind of shape tells nothing."""
    cells = draws.shuffled(range(CELLS * CELLS))
    marks = []
    for colour, count in counts.items():
        for _ in range(count):
            row, column = divmod(cells.pop(), CELLS)
            marks.append(Mark(draws.choice(SHAPES), colour, column, row))
    return Picture(size, tuple(sorted(marks, key=lambda mark: (mark.row, mark.column))))


def box(width: int, height: int, colours: str, size: int, draws: Draws) -> Picture:
    """A rectangle of so many cells, anywhere, in one of the colours, on a grid."""
    column, row = draws.below(CELLS - width + 1), draws.below(CELLS - height + 1)
    mark = Mark("block", draws.choice(colours), column, row, width, height)
    return Picture(size, (mark,), grid=True)
