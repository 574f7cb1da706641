"""What every command that may take its time has: progress on stderr, and a way to silence it."""

from __future__ import annotations

import argparse


def add(command: argparse.ArgumentParser) -> None:
    """--quiet, and the mark by which cli.main shows progress."""
    command.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    command.set_defaults(waits=True)
