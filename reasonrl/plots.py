"""Pictures for papers: panels (plot_data.py, plot_scores.py) drawn by matplotlib into a file.

Drawn at the size they are printed: a panel is one column wide (85 mm), text 8 points, dark on
white. Colours are Okabe and Ito's, told apart without colour vision; past seven lines the dash
changes as well. Intervals are bands, or bars where points are few. Equal panels give equal bytes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from reasonrl.plot_data import Line, Panel
from reasonrl.records import InputError

# "Color Universal Design", Okabe and Ito 2008; its yellow is too pale for a line on white
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREYS = ("#000000", "#777777")  # of baselines, which are dashed
DASHES = ("-", "-.", ":")
SUFFIXES = (".png", ".svg", ".pdf")
COLUMN = 3.35  # inches
FEW = 24  # points up to which each is marked
STYLE = {
    "font.size": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.5,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "lines.markersize": 3,
    "legend.frameon": False,
    "legend.handlelength": 1.8,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "reasonrl",
}


def check_suffix(path: Path) -> None:
    """InputError unless the file's name says which of the formats is meant."""
    if path.suffix.lower() not in SUFFIXES:
        got = path.suffix or "no suffix"
        raise InputError(
            f"{path}: expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}, got {got}"
        )


def draw(panels: Sequence[Panel], path: Path, dpi: int = 200) -> None:
    """The panels side by side, at most two in a row, into a file; InputError before drawing where
    the suffix is unknown, matplotlib is missing or the lines of a panel cannot be told apart."""
    check_suffix(path)
    limit = len(COLOURS) * len(DASHES)
    for panel in panels:
        if len(panel.lines) > limit:
            raise InputError(
                f"{panel.ylabel}: {len(panel.lines)} lines cannot be told apart (at most {limit});"
                " group them with --by"
            )
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        raise InputError("plot: needs matplotlib; pip install 'reasonrl[report]'") from None
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    settings: dict[Any, Any] = {**matplotlib.rcParamsDefault, "backend": "agg", **STYLE}
    with matplotlib.rc_context(settings):
        extra = _legend_rows(panels) * 0.14
        layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06)
        size = COLUMN * columns, (2.1 + extra) * rows
        figure = Figure(figsize=size, layout=layout, dpi=dpi)
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for at, panel in itertools.zip_longest(axes, panels):
            if panel is None:
                at.set_axis_off()
            else:
                _panel(at, panel)
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = path.suffix.lower()[1:]
        undated = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
        figure.savefig(path, format=kind, metadata=undated.get(kind))


def _panel(axes: Any, panel: Panel) -> None:
    handles = []
    styles = _styles(panel)
    for i, (line, (colour, dash)) in enumerate(zip(panel.lines, styles, strict=True)):
        if panel.form == "step":
            handles.append(_step(axes, line, colour, dash, panel.width))
        else:
            shift = i - (len(panel.lines) - 1) / 2
            handles.append(_curve(axes, _beside(line, panel, shift), colour, dash))
    if panel.diagonal:
        axes.plot([0, 1], [0, 1], color="#777777", linewidth=0.7, linestyle=":", zorder=1)
    if panel.limits:
        axes.set(xlim=panel.limits, ylim=panel.limits)
        for artist in axes.lines:
            artist.set_clip_on(False)  # whole marks on the edge
    if panel.log2:
        axes.set_xscale("log", base=2)
        ticks = sorted({x for line in panel.lines for x in line.x})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.minorticks_off()
    elif panel.form == "line" and not panel.diagonal:
        _whole_ticks(axes, [x for line in panel.lines for x in line.x])
    if panel.form == "step":
        axes.set_ylim(bottom=0)
    axes.set(xlabel=_plain(panel.xlabel), ylabel=_plain(panel.ylabel))
    if _has_legend(panel):
        labels = [_plain(line.label) for line in panel.lines]
        above = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0)}
        axes.legend(handles, labels, ncols=_ncols(panel), **above)


def _styles(panel: Panel) -> list[tuple[str, str]]:
    """(colour, dash) of every line: baselines grey and dashed; a histogram's pair in one colour."""
    pairs = panel.form == "step" and len(panel.lines) > 2
    out, plain, grey = [], 0, 0
    for i, line in enumerate(panel.lines):
        if panel.form == "step":
            colour = COLOURS[(i // 2 if pairs else i) % len(COLOURS)]
            out.append((colour, "--" if line.dashed else "-"))
        elif line.dashed:
            out.append((GREYS[grey % len(GREYS)], "--"))
            grey += 1
        else:
            dash = DASHES[plain // len(COLOURS) % len(DASHES)]
            out.append((COLOURS[plain % len(COLOURS)], dash))
            plain += 1
    return out


def _beside(line: Line, panel: Panel, shift: float) -> Line:
    """The line moved aside by a hair where its bars would stand on another line's."""
    if line.low is None or len(line.x) > FEW or len(panel.lines) < 2:
        return line
    every = [x for each in panel.lines for x in each.x]
    low, high = min(every), max(every)
    if panel.log2:
        factor = (high / low) ** (0.008 * shift)
        return replace(line, x=[x * factor for x in line.x])
    return replace(line, x=[x + 0.008 * shift * (high - low) for x in line.x])


def _curve(axes: Any, line: Line, colour: str, dash: str) -> Any:
    few = len(line.x) <= FEW
    mark = "o" if few else ""
    (handle,) = axes.plot(line.x, line.y, color=colour, linestyle=dash, marker=mark)
    if line.low is not None and line.high is not None:
        known = [k for k, low in enumerate(line.low) if math.isfinite(low)]
        x = [line.x[k] for k in known]
        low, high = [line.low[k] for k in known], [line.high[k] for k in known]
        if few:
            axes.vlines(x, low, high, color=colour, linewidth=0.8)
        else:
            axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
    return handle


def _step(axes: Any, line: Line, colour: str, dash: str, width: float) -> Any:
    edges = [*line.x, line.x[-1] + width]
    if not line.dashed:
        axes.stairs(line.y, edges, color=colour, fill=True, alpha=0.18)
    return axes.stairs(line.y, edges, color=colour, linestyle=dash, linewidth=1.3)


def _whole_ticks(axes: Any, x: Sequence[float]) -> None:
    """Steps and places are whole numbers; so are their ticks."""
    from matplotlib.ticker import MaxNLocator

    if all(float(v).is_integer() for v in x):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def _ncols(panel: Panel) -> int:
    """Legend columns that fit 85 mm at 7 points: some 58 characters with the handles."""
    longest = max(len(line.label) for line in panel.lines) + 7
    return max(1, min(len(panel.lines), 58 // longest))


def _has_legend(panel: Panel) -> bool:
    return len(panel.lines) > 1 or panel.diagonal


def _legend_rows(panels: Sequence[Panel]) -> int:
    """Rows of the largest legend; the figure grows by them, so that axes keep their height."""
    sizes = [-(-len(p.lines) // _ncols(p)) for p in panels if _has_legend(p)]
    return max(sizes, default=0)


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: no mathematics, no control characters, no label that
    it takes for a private one."""
    shown = "".join(c if c.isprintable() else "\u00b7" for c in text).replace("$", r"\$")
    return f" {shown}" if shown.startswith("_") else shown
