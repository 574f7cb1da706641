"""`reasonrl judge data`, `judge bench` and `pairs`: generative judges and their uses.

`judge train` is in judge_train.py.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from reasonrl.commands import judge_train, server, waiting
from reasonrl.records import InputError


def add(commands) -> None:
    parser = commands.add_parser("judge", help="judging data from verifiable problems; Libra Bench")
    kinds = parser.add_subparsers(required=True, metavar="data | train | bench")

    command = kinds.add_parser("data", help="sample generators, label by the verifier, balance")
    command.add_argument("recipe", help="names task and sampling; overrides as in train")
    command.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    command.add_argument("--generator", action="append", help="a model; may be given several times")
    command.add_argument("--out", type=Path, required=True, help="JSONL, Libra Bench's fields")
    command.add_argument("--split", default="train", choices=["sft", "train", "dev", "test"])
    command.add_argument("--first", type=int, default=0)
    command.add_argument("--problems", type=int, default=100)
    command.add_argument("--samples", type=int, default=8, help="answers of each generator")
    waiting.add(command)
    command.set_defaults(run=_data)

    judge_train.add(kinds)
    command = kinds.add_parser("bench", help="accuracy of a judge on a file of judged answers")
    command.add_argument("data", type=Path, help="JSONL or parquet in Libra Bench's format")
    _judge_options(command, required=True)
    command.add_argument("--out", type=Path, help="JSON to write")
    command.set_defaults(run=_bench)

    command = commands.add_parser("pairs", help="preference pairs from scored answers, for DPO")
    command.add_argument("data", type=Path, nargs="+", help="answers (rows of `reasonrl score`)")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--margin", type=float, default=0.5)
    command.add_argument("--by", default="score", help="the field that holds the score")
    _judge_options(command, required=False)
    command.set_defaults(run=_pairs)


def _judge_options(command: argparse.ArgumentParser, required: bool) -> None:
    command.add_argument(
        "--judge", required=required, help="model that judges, or http://host:port/v1"
    )
    command.add_argument("--judge-model", metavar="NAME", help="the model's name at that server")
    command.add_argument("--judge-cache", type=Path, metavar="DIR", help="keep its replies there")
    server.add_options(command)
    command.add_argument("--votes", type=int, default=1, help="verdicts a response")
    command.add_argument("--max-tokens", type=int, default=512, help="of one judgement")
    command.add_argument("--temperature", type=float, default=None, help="default: 0 for one vote")
    command.add_argument("--no-thinking", action="store_true", help="the verdict at once")
    command.add_argument("--with-cot", action="store_true", help="the judge sees the thinking")
    command.add_argument("--checklist", type=Path, help="criteria, one a line")
    command.add_argument("--style", default="full", choices=["full", "compact"], help="of prompts")
    command.add_argument("--seed", type=int, default=0)
    waiting.add(command)


def _judge(options: argparse.Namespace):
    from reasonrl.rewards.judge import Judge

    for name, least in (("votes", 1), ("max_tokens", 1)):
        if getattr(options, name) < least:
            got = getattr(options, name)
            raise InputError(f"--{name.replace('_', '-')}: expected >= {least}, got {got}")
    heat = options.temperature
    heat = (0.0 if options.votes == 1 else 1.0) if heat is None else heat
    if not (math.isfinite(heat) and heat >= 0) or (heat == 0 and options.votes > 1):
        raise InputError(f"--temperature: expected a number > 0 for several votes, got {heat}")
    points: list[str] = []
    if options.checklist:
        try:
            lines = options.checklist.read_text("utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--checklist: {options.checklist}: {error}") from None
        points = [line.strip() for line in lines if line.strip()]
    if points and options.style == "compact":
        raise InputError("--checklist: expected none with --style compact, got some")
    return Judge(
        _client(options) if server.is_url(options.judge) else _model(options),
        votes=options.votes,
        max_tokens=options.max_tokens,
        temperature=heat,
        think=not options.no_thinking,
        with_cot=options.with_cot,
        checklist=points,
        style=options.style,
        seed=options.seed,
    )


def _client(options: argparse.Namespace):
    return server.client(
        options, options.judge, options.judge_model, "--judge-model", options.judge_cache
    )


def _model(options: argparse.Namespace):
    from reasonrl import models

    if options.judge_model or options.judge_cache:
        raise InputError("--judge-model and --judge-cache: only for a judge at http://...")
    return models.load(options.judge, device="auto")


def _data(options: argparse.Namespace) -> int:
    from reasonrl import config as configs
    from reasonrl import models
    from reasonrl.judge_data import make_cases
    from reasonrl.rollout import Sampling
    from reasonrl.stepwise import write_rows
    from reasonrl.tasks import make_task

    for name, least in (("problems", 1), ("samples", 1), ("first", 0)):
        if getattr(options, name) < least:
            raise InputError(f"--{name}: expected >= {least}, got {getattr(options, name)}")
    config = configs.load(options.recipe, options.overrides)
    names = options.generator or [config.model]
    generators = {
        name: models.load(
            name,
            dtype=config.dtype,
            device=config.device,
            seed=config.seed,
            **(config.model_options if name == config.model else {}),
        )
        for name in names
    }
    task = make_task(config.task, seed=config.seed, **config.task_options)
    draw = config.sample
    sampling = Sampling(config.max_completion_length, draw.temperature, draw.top_p, draw.top_k)
    span = (options.split, options.first, options.problems)
    rows = list(make_cases(generators, task, sampling, span, options.samples, config.seed))
    if not rows:
        raise InputError(
            "judge data: no generator gave both right and wrong answers; nothing to write"
        )
    write_rows(options.out, rows)
    counts = {name: sum(row["model"] == name for row in rows) for name in names}
    print(f"{options.out}: {len(rows)} rows, half of them right; {counts}")
    return 0


def _bench(options: argparse.Namespace) -> int:
    from reasonrl.cases import read_cases
    from reasonrl.judge_bench import bench

    cases = read_cases(options.data)
    found = bench(_judge(options), cases, options.seed)
    text = json.dumps(found, indent=1)
    if options.out:
        options.out.write_text(text + "\n")
    print(text)
    return 0


def _pairs(options: argparse.Namespace) -> int:
    from reasonrl.choice import texts
    from reasonrl.pairs import pairs
    from reasonrl.records import Problem
    from reasonrl.stepwise import read_traces, write_rows

    if not options.margin > 0:
        raise InputError(f"--margin: expected > 0, got {options.margin}")
    traces = [t for path in options.data for t in read_traces(path, labelled=False)]
    if options.judge:
        problems = [Problem(repr(t.prompt), t.prompt) for t in traces]
        found = _judge(options)(texts(problems, [t.text for t in traces]))
        scores = [s.value for s in found.outcome]
    else:
        scores = [_own(trace, options.by) for trace in traces]
    made = pairs(traces, scores, options.margin)
    if not made:
        raise InputError(
            f"pairs: no prompt has two answers {options.margin} apart (--margin); none written"
        )
    write_rows(options.out, made)
    known = sum(s is not None for s in scores)
    print(f"{options.out}: {len(made)} pairs from {known} scored of {len(traces)} answers")
    return 0


def _own(trace, name: str) -> float | None:
    value = trace.final if name == "final" else trace.extra.get(name)
    if value is None and (name in trace.extra or name == "final"):
        return None  # known to be unknown
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(
            f"{trace.where}: field {name!r}: expected a number, got {value!r}; score the rows first"
            " (`reasonrl score PRM FILE --out SCORED`), or give --by FIELD or --judge"
        )
    return float(value)
