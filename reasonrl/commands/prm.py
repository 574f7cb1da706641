"""`reasonrl prm label` and `reasonrl prm train`: from a policy to a process reward model."""

from __future__ import annotations

import argparse
import json
from itertools import chain
from pathlib import Path


def add(commands) -> None:
    parser = commands.add_parser("prm", help="label traces, train a process reward model")
    kinds = parser.add_subparsers(required=True, metavar="label | train")

    command = kinds.add_parser(
        "label", help="sample completions of a recipe's model and label their steps by the task"
    )
    command.add_argument("recipe", nargs="?", help="names model, task and sampling, as in train")
    command.add_argument("overrides", nargs="*", metavar="key.path=value")
    command.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    command.add_argument("--ask", type=int, metavar="K", help="questions to people instead")
    command.add_argument("--answers", type=Path, help="questions that people have answered")
    command.add_argument("--prm", help="for --ask, --answers: the model that scores")
    command.add_argument("--data", type=Path, help="for --ask, --answers: the traces")
    command.add_argument("--split", default="train", choices=["sft", "train", "dev", "test"])
    command.add_argument("--first", type=int, default=0, help="number of the first problem")
    command.add_argument("--problems", type=int, default=500)
    command.add_argument("--group", type=int, help="completions of each (default: the recipe's)")
    command.add_argument("--delimiter", help="what ends a step (default: the task's own)")
    command.set_defaults(run=_label)

    command = kinds.add_parser("train", help="train a process reward model on stepwise rows")
    command.add_argument("data", type=Path, nargs="+", help="JSONL or parquet: stepwise rows")
    command.add_argument("overrides", nargs="*", metavar="key.path=value")
    command.add_argument("--out", type=Path, required=True, help="folder of the run")
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    command.add_argument("--quiet", action="store_true")
    command.set_defaults(run=_train)


def _label(options: argparse.Namespace) -> int:
    from reasonrl import config as configs
    from reasonrl import models
    from reasonrl.labels import sampled
    from reasonrl.records import InputError
    from reasonrl.rollout import Sampling
    from reasonrl.stepwise import write_rows
    from reasonrl.tasks import make_task

    if options.ask is not None or options.answers is not None:
        return _people(options)
    if options.recipe is None:
        raise InputError("prm label: expected a recipe, or --ask K, or --answers FILE")
    for name, least in (("problems", 1), ("first", 0)):
        if getattr(options, name) < least:
            raise InputError(f"--{name}: expected >= {least}, got {getattr(options, name)}")
    config = configs.load(options.recipe, options.overrides)
    group = config.group if options.group is None else options.group
    if group < 1:
        raise InputError(f"--group: expected >= 1, got {group}")
    policy = models.load(config.model, dtype=config.dtype, seed=config.seed, **config.model_options)
    task = make_task(config.task, seed=config.seed, **config.task_options)
    draw = config.sample
    sampling = Sampling(config.max_completion_length, draw.temperature, draw.top_p, draw.top_k)
    delimiter = unescaped(options.delimiter) if options.delimiter else task.delimiter
    span = (options.split, options.first, options.problems)
    steps = right = wrong = 0

    def counted(rows):
        nonlocal steps, right, wrong
        for row in rows:
            steps += len(row["labels"])
            right += sum(row["labels"])
            wrong += row.get("final") == 0.0
            yield row

    rows = sampled(policy, task, sampling, span, group, delimiter, config.seed)
    count = write_rows(options.out, counted(rows))
    print(
        f"{options.out}: {count} completions ({count - wrong} right), {steps} steps ({right} right)"
    )
    return 0


def _people(options: argparse.Namespace) -> int:
    """--ask: the least sure steps as questions; --answers: their labels back."""
    from reasonrl import prm_heads
    from reasonrl.asking import answered, questions
    from reasonrl.records import InputError
    from reasonrl.stepwise import read_traces, trace_row, write_rows

    if options.recipe or (options.ask is None) == (options.answers is None):
        raise InputError("prm label: expected a recipe, --ask K or --answers FILE, and only one")
    if not options.prm or not options.data:
        raise InputError("prm label: --ask and --answers need --prm FOLDER and --data FILE")
    if options.ask is not None and options.ask < 1:
        raise InputError(f"--ask: expected >= 1, got {options.ask}")
    prm = prm_heads.load(options.prm)
    cut = unescaped(options.delimiter) if options.delimiter else prm.reading.delimiter
    traces = read_traces(options.data, labelled=False, delimiter=cut)
    scores = prm.score(traces)
    if options.ask is not None:
        count = write_rows(options.out, questions(traces, scores, options.ask))
        print(f"{options.out}: {count} questions; write true or false into `answer`")
        return 0
    labelled, left = answered(traces, scores, options.answers)
    if not labelled:
        raise InputError(f"{options.answers}: no question is answered ({left} open)")
    write_rows(options.out, map(trace_row, labelled))
    print(f"{options.out}: {len(labelled)} traces labelled; {left} questions still open")
    return 0


def _train(options: argparse.Namespace) -> int:
    from reasonrl import config as configs
    from reasonrl.prm_train import PRMConfig, train
    from reasonrl.stepwise import read_traces

    # a file and an override look alike to the parser: an override has "=" and is no file
    files = [p for p in options.data if "=" not in str(p) or p.exists()]
    overrides = [str(p) for p in options.data if p not in files] + options.overrides
    config = configs.section(PRMConfig, overrides)
    traces = list(chain(*(read_traces(p, delimiter=config.delimiter) for p in files)))
    note = (lambda text: None) if options.quiet else print
    done = train(traces, config, options.out, resume=options.resume, note=note)
    print(json.dumps(done.metrics))
    return 0


def unescaped(delimiter: str) -> str:
    r"""A delimiter as typed in a shell: \n and \t mean what they usually mean."""
    return delimiter.replace("\\n", "\n").replace("\\t", "\t")
