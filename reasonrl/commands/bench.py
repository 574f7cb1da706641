"""`reasonrl bench`: the benchmarks of a source checkout (bench/), which a wheel does not carry."""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path

import reasonrl
from reasonrl.records import InputError


def add(commands) -> None:
    command = commands.add_parser("bench", help="run the benchmarks of a source checkout")
    command.add_argument(
        "words",
        nargs=argparse.REMAINDER,
        metavar="NAME [option ...]",
        help="ops, step, ... (`NAME --help`: its options); without a name all of them",
    )
    command.set_defaults(run=_bench)


def _bench(options: argparse.Namespace) -> int:
    root = checkout()
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module("bench.__main__").main(options.words)


def checkout() -> Path:
    """The root of the source tree that this package lies in; InputError where it lies elsewhere."""
    root = Path(reasonrl.__file__).resolve().parent.parent
    for part in ("bench/__main__.py", "csrc"):
        if not (root / part).exists():
            raise InputError(
                f"bench: needs a source checkout of reasonrl (git clone, pip install -e .); the"
                f" installed package in {root} has no {part}"
            )
    return root
