"""`reasonrl plot`: curves of runs, step credit, Best-of-N, calibration, selection, as pictures."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from reasonrl.commands import waiting
from reasonrl.records import InputError

# the options that mean something for a kind of picture; others are refused
USED = {
    "curves": ("metrics", "by", "over", "smooth"),
    "credit": (),
    "best-of-n": ("how",),
    "calibration": ("how", "level"),
    "selection": (),
}
HOWS = ("min", "mean", "last", "prod")


def add(commands) -> None:
    command = commands.add_parser("plot", help="PNG, SVG or PDF of runs, scores and reports")
    command.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="run folders (or a quoted pattern); rows of `score`; JSON of `best-of-n`, `select`",
    )
    command.add_argument("--out", type=Path, required=True, help="picture: .png, .svg or .pdf")
    command.add_argument("--kind", default="curves", choices=list(USED))
    curves = command.add_argument_group("--kind curves")
    curves.add_argument("--metrics", help="names with commas, one panel each (default: reward)")
    curves.add_argument("--by", help="config keys: runs equal in them are one line, their mean")
    curves.add_argument("--over", help="config keys that such runs may differ in (default: seed)")
    curves.add_argument("--smooth", type=int, help="trailing mean over so many steps")
    scores = command.add_argument_group("--kind calibration, best-of-n")
    scores.add_argument("--level", choices=["step", "answer"], help="what is judged (step)")
    scores.add_argument("--how", choices=HOWS, help="an answer's score from its steps' (min)")
    waiting.add(command)
    command.set_defaults(run=_plot)


def _plot(options: argparse.Namespace) -> int:
    from reasonrl import plot_data, plot_scores, plots

    for name in ("metrics", "by", "over", "smooth", "level", "how"):
        if getattr(options, name) is not None and name not in USED[options.kind]:
            kinds = [kind for kind, names in USED.items() if name in names]
            raise InputError(f"--{name}: only for --kind {' or '.join(kinds)}")
    plots.check_suffix(options.out)
    sources = plot_data.expand(options.sources)
    how = options.how or "min"
    if options.kind == "curves":
        panels = _curves(options, sources)
    elif options.kind == "credit":
        panels, table = plot_scores.credit(sources)
        _print(table)
    elif options.kind == "best-of-n":
        panels = [panel for path in sources for panel in plot_scores.best_of_n(path, how)]
    elif options.kind == "calibration":
        if options.how and options.level != "answer":
            raise InputError("--how: only with --level answer")
        panels = plot_scores.calibration(sources, options.level or "step", how)
    else:
        panels = plot_scores.selection(sources)
    plots.draw(panels, options.out)
    print(options.out)
    return 0


def _curves(options: argparse.Namespace, sources: list[Path]):
    from reasonrl import plot_data

    smooth = 1 if options.smooth is None else options.smooth
    if smooth < 1:
        raise InputError(f"--smooth: expected >= 1, got {smooth}")
    if options.over and not options.by:
        raise InputError("--over: only with --by")
    runs = [plot_data.history(path) for path in sources]
    for run in runs:
        for note in run.notes:
            print(f"reasonrl: {note}", file=sys.stderr)
    return plot_data.curves(
        runs,
        _names("--metrics", options.metrics or "reward"),
        by=_names("--by", options.by) if options.by is not None else (),
        over=_names("--over", options.over or "seed"),
        smooth=smooth,
    )


def _names(flag: str, text: str) -> list[str]:
    """Names between commas; InputError for an empty one."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"{flag}: expected names with commas, got {text!r}")
    return list(dict.fromkeys(names))


def _print(table: list[dict]) -> None:
    """Statistics as Markdown."""
    print(f"| {' | '.join(table[0])} |\n{'|---' * len(table[0])}|")
    for row in table:
        cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values())
        print(f"| {' | '.join(cells)} |")
