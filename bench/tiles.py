"""Log p from hidden states on a GPU: one kernel by tiles against the library's product and a pass.

    python -m bench tiles --out bench/results

Per head and number of rows: microseconds of both forms without and with kept logits, interleaved,
medians of rounds with the ratio's range. What `kernels.tiles.worth` decides by was read off such a
table; run it on another card before trusting SCORES and DEPTH there. The gate: every log p and
entropy within fp32 rounding of float64 arithmetic on the same rounded logits.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.machine import machine

HEADS = ((151_936, 896), (151_936, 2048), (151_936, 4096), (128_256, 4096), (49_152, 576))
ROWS = (128, 512, 2048, 4096)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench tiles", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--rounds", type=int, default=5, help="times of each side (5)")
    parser.add_argument("--out", type=Path, help="folder for a JSON file")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench tiles: no GPU here; nothing was measured", file=sys.stderr)
        return 0
    about = machine("cuda")
    print(about["gpu"])
    print(f"{'rows':>5} {'width':>5} {'words':>7}  {'logits':7} {'library':>8} {'tiles':>8}  ratio")
    rows = []
    for vocab, width in HEADS:
        for n in ROWS:
            for keep in (False, True):
                rows.append(measure(n, width, vocab, keep, options.rounds))
                print(shown(rows[-1]), flush=True)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / time.strftime("tiles-%Y%m%d-%H%M%S.json")
        path.write_text(json.dumps({"bench": "tiles", "machine": about, "rows": rows}, indent=1))
        print(f"written to {path}")
    return int(any(row["red"] for row in rows))


def measure(n: int, width: int, vocab: int, keep: bool, rounds: int) -> dict[str, Any]:
    from triton.testing import do_bench

    from reasonrl.kernels import tiles
    from reasonrl.kernels.logp import row_stats

    made = torch.Generator("cuda").manual_seed(0)
    draw = {"device": "cuda", "generator": made}
    x = torch.randn(n, width, **draw).bfloat16()
    w = (torch.randn(vocab, width, **draw) * 2 * width**-0.5).bfloat16()
    target = torch.randint(0, vocab, (n,), **draw)

    def library() -> tuple[Tensor, Tensor, Tensor]:
        u = x @ w.t()
        return u, *row_stats(u, target, 1.0, None)

    def ours() -> tuple[Tensor | None, Tensor, Tensor]:
        return tiles.score_rows(x, w, None, target, 1.0, False, keep)

    sides: dict[str, Callable] = {"library": library, "tiles": ours}
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in sorted(sides, reverse=bool(turn % 2)):
            time_ms = do_bench(sides[name], warmup=4, rep=20, return_mode="median")
            taken[name].append(1000 * float(time_ms))
    pairs = zip(taken["library"], taken["tiles"], strict=True)
    return {
        "rows": n, "width": width, "vocab": vocab, "keep": keep, "us": taken,
        "ratio": [a / b for a, b in pairs], "red": wrong(x, w, target),
        "chosen": tiles.worth(n, x, w, None),
    }  # fmt: skip


def wrong(x: Tensor, w: Tensor, target: Tensor) -> str:
    """What is not as float64 has it, in the last 64 rows; empty where all is."""
    from reasonrl.kernels import tiles

    few = slice(-64, None)
    u, kept, stats = tiles.score_rows(x, w, None, target, 1.0, True, True)
    _, alone, _ = tiles.score_rows(x, w, None, target, 1.0, False, False)
    assert u is not None
    log_p = torch.log_softmax(u[few].double(), -1)
    want = log_p.gather(1, target[few, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    gaps = {
        "log p": (kept[few] - want[0]).abs().max(),
        "entropy": (stats[few, 2] - want[1]).abs().max(),
        "log p without logits": (alone - kept).abs().max(),
    }
    exact = x[few].double() @ w.double().t()
    if not float(((u[few] - exact).abs() / exact.abs().clamp(min=1)).max()) < 2**-7:
        return "logits"
    return ", ".join(name for name, gap in gaps.items() if not float(gap) < 2e-5)


def shown(row: dict[str, Any]) -> str:
    where = f"{row['rows']:5} {row['width']:5} {row['vocab']:7}  {'kept' if row['keep'] else '-':7}"
    if row["red"]:
        return f"{where} RED: {row['red']}"
    library, own = (statistics.median(row["us"][name]) for name in ("library", "tiles"))
    ratio, low, high = statistics.median(row["ratio"]), min(row["ratio"]), max(row["ratio"])
    picked = "" if row["chosen"] else "  (not chosen)"
    return f"{where} {library:8.0f} {own:8.0f}  {ratio:.2f} ({low:.2f} to {high:.2f}){picked}"
