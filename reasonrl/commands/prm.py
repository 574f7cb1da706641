"""`reasonrl prm label` and `reasonrl prm train`: from a policy to a process reward model."""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path

from reasonrl.commands import label, waiting


def add(commands) -> None:
    parser = commands.add_parser("prm", help="label traces, train a process reward model")
    kinds = parser.add_subparsers(required=True, metavar="label | train")

    label.add(kinds)
    command = kinds.add_parser("train", help="train a process reward model on stepwise rows")
    command.add_argument("data", type=Path, nargs="+", help="JSONL or parquet: stepwise rows")
    command.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    command.add_argument("--out", type=Path, required=True, help="folder of the run")
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    waiting.add(command)
    command.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from reasonrl import config as configs
    from reasonrl import progress
    from reasonrl.prm_train import PRMConfig, train
    from reasonrl.stepwise import read_traces

    # a file and an override look alike to the parser: an override has "=" and is no file
    files = [p for p in options.data if "=" not in str(p) or p.exists()]
    overrides = [str(p) for p in options.data if p not in files] + options.overrides
    config = configs.section(PRMConfig, overrides)
    traces = list(chain(*(read_traces(p, delimiter=config.delimiter) for p in files)))
    note = (lambda text: None) if options.quiet else progress.say
    done = train(traces, config, options.out, resume=options.resume, note=note)
    print(json.dumps(done.metrics))
    return 0
