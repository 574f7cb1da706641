"""The options of commands that may ask a model behind an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from reasonrl.records import InputError

KEY = "REASONRL_API_KEY"  # chat.client.KEY; not imported, so that the command starts fast


def add_options(command) -> None:
    command.add_argument("--judge-key-env", default=KEY, metavar="NAME", help="variable: its key")
    command.add_argument("--judge-parallel", type=int, default=32, help="requests at a time")
    command.add_argument("--judge-timeout", type=float, default=60.0, help="seconds of one try")
    command.add_argument("--outage", default="pause", choices=["pause", "mask", "fail"])
    command.add_argument("--outage-wait", type=float, default=600.0, help="seconds of `pause`")


def is_url(name: str) -> bool:
    return name.startswith(("http:", "https:"))


def client(
    options: argparse.Namespace, url: str, model: str | None, flag: str, cache: Path | None = None
):
    """A ChatClient of the server at `url`; InputError where an option or the name is missing."""
    from reasonrl.chat import ChatClient, Patience

    for name in ("judge_timeout", "outage_wait"):
        value = getattr(options, name)
        if not (math.isfinite(value) and value > 0):
            raise InputError(f"--{name.replace('_', '-')}: expected seconds > 0, got {value}")
    if options.judge_parallel < 1:
        raise InputError(f"--judge-parallel: expected >= 1, got {options.judge_parallel}")
    if not model:
        raise InputError(f"{flag}: a model behind a server needs its name")
    limit = options.judge_timeout
    return ChatClient(
        url,
        model,
        key_env=options.judge_key_env,
        parallel=options.judge_parallel,
        patience=Patience(options.outage, options.outage_wait, 3 * limit, limit),
        cache=cache,
    )
