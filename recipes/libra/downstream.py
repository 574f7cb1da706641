"""How good a judge is against what a policy gains from it: one picture, one correlation a use.

A point is one judge of one seed. Pearson's r over all points; its interval is a percentile
bootstrap over whole seeds, since the judges of a seed share policy and prompts. "within seeds" is r
after every seed's mean is taken off both sides: what a better judge gives to the same policy.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
TITLES = {"dpo": "DPO on the judge's pairs", "online": "train libra on its verdicts"}
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")


class Point(NamedTuple):
    seed: int
    judge: str
    how: str  # dpo, online
    bench: float  # percent
    gain: float  # points


def correlation(points: list[Point], within: bool = False) -> tuple[float, float, float]:
    """r and its 95 % interval; nan where a side does not vary."""
    seeds = sorted({p.seed for p in points})
    parts = [np.array([(p.bench, p.gain) for p in points if p.seed == s]) for s in seeds]
    if within:
        parts = [part - part.mean(0) for part in parts]
    rng = np.random.default_rng(0)
    picks = rng.integers(len(seeds), size=(RESAMPLES, len(seeds)))
    draws = [_r(np.concatenate([parts[i] for i in pick])) for pick in picks]
    low, high = np.nanpercentile(draws, [2.5, 97.5])
    return _r(np.concatenate(parts)), float(low), float(high)


def _r(rows: np.ndarray) -> float:
    a, b = (rows - rows.mean(0)).T
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size > 1e-9 else float("nan")


def said(points: list[Point]) -> list[str]:
    """The correlations as a table."""
    lines: list[str] = []
    for how, title in TITLES.items():
        some = [p for p in points if p.how == how]
        if len({p.seed for p in some}) < 2 or len({p.judge for p in some}) < 2:
            continue
        best = max(
            {p.judge for p in some}, key=lambda j: sum(p.bench for p in some if p.judge == j)
        )
        for judges, kept in (
            ("", some),
            (f", without {best}", [p for p in some if p.judge != best]),
        ):
            cells = [
                "{:+.2f} ({:+.2f}..{:+.2f})".format(*correlation(kept, w)) for w in (False, True)
            ]
            lines.append(f"| {title}{judges} | {len(kept)} | {' | '.join(cells)} |")
    head = "| judge's accuracy against the policy's gain | points | r (95 %) | within seeds |"
    return ["", head, "|---|---|---|---|", *lines] if lines else []


def picture(points: list[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = "reasonrl"
    uses = [how for how in TITLES if any(p.how == how for p in points)]
    if not uses:
        return
    figure, rooms = pyplot.subplots(
        1, len(uses), figsize=(4 * len(uses), 3.4), layout="constrained", squeeze=False
    )
    judges = list(dict.fromkeys(p.judge for p in points))
    for axes, how in zip(rooms[0], uses, strict=True):
        axes.axhline(0, color="#777777", lw=0.6)
        for judge, colour in zip(judges, COLOURS, strict=False):
            some = [p for p in points if p.how == how and p.judge == judge]
            axes.plot(
                [p.bench for p in some], [p.gain for p in some], "o", color=colour, label=judge
            )
        for p in (p for p in points if p.how == how):
            near = {"xytext": (4, 3), "textcoords": "offset points", "fontsize": 6}
            axes.annotate(str(p.seed), (p.bench, p.gain), **near)
        axes.set(xlabel="judge, held-out right, %", ylabel="policy's gain, points")
        axes.set_title(TITLES[how], fontsize=9)
    rooms[0][0].legend(fontsize=7)
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
