"""`reasonrl serve`: verifiers, process reward models and judges over HTTP."""

from __future__ import annotations

import argparse
import math
from typing import Any

from reasonrl.records import InputError

BOUNDS: dict[str, tuple[float, float]] = {
    "port": (0, 65535),
    "connections": (1, 1 << 16),
    "max_body": (1024, 1 << 30),
    "queue": (1, 1 << 20),
    "batch": (1, 1 << 16),
    "votes": (1, 1024),
    "max_tokens": (1, 1 << 20),
    "timeout": (0.01, 3600),
    "grace": (0, 86400),
}


def add(commands) -> None:
    command = commands.add_parser("serve", help="verifiers, PRMs and judges for other trainers")
    command.add_argument(
        "scorers", nargs="+", metavar="SCORER", help="math, code, prm=FOLDER, judge=MODEL"
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen on")
    command.add_argument("--port", type=int, default=8000, help="0: any free one")
    command.add_argument("--connections", type=int, default=512, help="at one time")
    command.add_argument("--max-body", type=int, default=8 << 20, help="bytes of a request")
    command.add_argument("--queue", type=int, default=1024, help="rows that wait for a scorer")
    command.add_argument("--batch", type=int, default=32, help="rows of a model's batch")
    command.add_argument("--timeout", type=float, default=5.0, help="seconds to verify an answer")
    command.add_argument("--grace", type=float, default=120.0, help="seconds to finish in a stop")
    command.add_argument("--unscored", type=float, help="reward where no score is known (null)")
    command.add_argument("--votes", type=int, default=1, help="verdicts of a judge")
    command.add_argument("--max-tokens", type=int, default=512, help="of one judgement")
    command.add_argument("--temperature", type=float, help="of judgements (0 for one vote)")
    command.add_argument("--device", default="auto", help="of models: auto, cpu, cuda, cuda:1")
    command.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    from reasonrl.serve import App, Limits, run
    from reasonrl.serve.scorers import Plan, open_scorer

    _check(options)
    limits = Limits(
        connections=options.connections,
        body=options.max_body,
        memory=max(256 << 20, options.max_body),
        grace=options.grace,
    )
    plan = Plan(
        timeout=options.timeout,
        queue=options.queue,
        batch=options.batch,
        votes=options.votes,
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        device=options.device,
    )
    app = App([open_scorer(spec, plan) for spec in options.scorers], options.unscored)

    def started(listener: Any, _: object) -> None:
        host = f"[{options.host}]" if ":" in options.host else options.host
        names = ", ".join(app.scorers)
        print(f"serving {names} at http://{host}:{listener.port} (Ctrl-C or SIGTERM drains)")
        if options.host not in ("127.0.0.1", "::1", "localhost"):
            print("no key is asked for: whoever reaches this address may use it")
        print(end="", flush=True)

    lost = run(app, (options.host, options.port), limits, started)
    done = sum(app.metrics.counts.get("requests_total", {}).values())
    print(f"stopped after {done} requests" + (f", {lost} connections cut" if lost else ""))
    return 1 if lost else 0


def _check(options: argparse.Namespace) -> None:
    for name, (low, high) in BOUNDS.items():
        value = getattr(options, name)
        if not low <= value <= high:  # NaN is refused as well
            flag = name.replace("_", "-")
            raise InputError(f"--{flag}: expected {low:g}..{high:g}, got {value}")
    for name in ("unscored", "temperature"):
        value = getattr(options, name)
        if value is not None and not math.isfinite(value):
            raise InputError(f"--{name}: expected a number, got {value}")
    heat = options.temperature
    if heat is not None and (heat < 0 or (heat == 0 and options.votes > 1)):
        raise InputError(f"--temperature: expected > 0 for several votes, got {heat}")
