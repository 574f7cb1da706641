"""The `reasonrl` command: one short function a command, exit statuses as the README lists them."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from reasonrl import __version__, keys, progress
from reasonrl.commands import bench, judge, plan, plot, prm, report, score, serve, waiting
from reasonrl.records import InputError, NonFiniteStop, RankLost, ScorerDown

STATUS = {InputError: 2, NonFiniteStop: 3, ScorerDown: 4, RankLost: 5}  # 5 too: watchdog.py


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; 0 done, 2 wrong usage or input, 3 NaN, 4 scorer down, 5 stalled
    or another rank gone."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    stray = [word for word in rest if word.startswith("-") or "=" not in word]
    if stray or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(stray or rest)}")
    if rest:  # overrides may stand on both sides of the options
        options.overrides = [*options.overrides, *rest]
    keys.install()
    try:
        with progress.shown(quiet=not getattr(options, "waits", False) or options.quiet):
            _quiet_libraries()
            status = options.run(options)
            sys.stdout.flush()
            return status
    except tuple(STATUS) as error:
        line = keys.hide(" ".join(str(error).split()))
        print(f"reasonrl: {line}", file=sys.stderr)
        return next(code for kind, code in STATUS.items() if isinstance(error, kind))
    except BrokenPipeError:
        if not _unread():
            raise
        return 141
    except KeyboardInterrupt:
        print("reasonrl: stopped at once; resume with --resume", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="reasonrl",
        description="Reinforcement learning of reasoning models with process rewards.",
    )
    parser.add_argument("--version", action="version", version=f"reasonrl {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser(
        "train", help="train by a recipe (a built-in name or a YAML file)"
    )
    command.add_argument("recipe")
    command.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    command.add_argument(
        "--out", type=Path, help="run folder (default: runs/RECIPE, or the next free)"
    )
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    command.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    command.add_argument(
        "--stage", metavar="trm-data | trm | rl", help="one stage of sophia; all of them by default"
    )
    command.add_argument(
        "--annotator", default="rule", help="who scores thinking: rule, a folder, http://.../v1"
    )
    command.add_argument("--annotator-model", default="", help="its name at that server")
    command.set_defaults(run=_train)

    command = commands.add_parser("eval", help="greedy accuracy of a model or checkpoint on a task")
    command.add_argument("recipe", help="names the task and the limits; overrides as in train")
    command.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    waiting.add(command)
    command.set_defaults(run=_eval)

    command = commands.add_parser("fetch-model", help="fetch and convert a model into the cache")
    command.add_argument("name", choices=["smollm2"])
    waiting.add(command)
    command.set_defaults(run=_fetch_model)
    for module in (prm, score, judge, serve, report, plot, plan, bench):
        module.add(commands)
    return parser


def _train(options: argparse.Namespace) -> int:
    from reasonrl import config as configs
    from reasonrl.train import train

    config = configs.load(options.recipe, options.overrides)
    out = options.out or _run_folder(Path(options.recipe).stem, options.resume)
    staged = config.algorithm == "sophia" and not config.algo.get("scorer")
    annotates = (staged and not options.stage) or options.stage == "trm-data"
    if not annotates and (options.annotator != "rule" or options.annotator_model):
        raise InputError("--annotator: only stage trm-data scores thinking, and it is not run here")
    if staged or options.stage:
        done = _staged(options, config, out)
    else:
        done = train(config, out, resume=options.resume, quiet=options.quiet)
    if not done and not options.quiet:
        print(
            "stopped after a whole step; go on with:"
            f" reasonrl train {options.recipe} --resume --out {out}"
        )
    return 0


def _staged(options: argparse.Namespace, config, out: Path) -> bool:
    from reasonrl import config as configs
    from reasonrl.commands.stages import Pipeline

    if config.algorithm != "sophia":
        raise InputError(f"--stage: only for algorithm sophia, got {config.algorithm!r}")
    whole = configs.load(options.recipe)
    quiet = options.quiet
    pipeline = Pipeline(
        whole if options.stage else config,  # overrides go to the stage that is asked for
        out,
        overrides=options.overrides if options.stage else (),
        annotator=options.annotator,
        annotator_model=options.annotator_model,
        quiet=quiet,
        say=(lambda text: None) if quiet else print,
    )
    return pipeline.run(options.stage, options.resume)


def _eval(options: argparse.Namespace) -> int:
    import json

    from reasonrl import config as configs
    from reasonrl import models
    from reasonrl.algos import GRPO
    from reasonrl.evaluate import evaluate
    from reasonrl.tasks import make_task

    config = configs.load(options.recipe, options.overrides)
    policy = models.load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        seed=config.seed,
        **config.model_options,
    )
    task = make_task(config.task, seed=config.seed, **config.task_options)
    metrics, _ = evaluate(
        GRPO(task, policy),
        config.eval.split,
        config.eval_problems,
        config.max_completion_length,
        config.eval.batch,
    )
    print(json.dumps(metrics))
    return 0


def _fetch_model(options: argparse.Namespace) -> int:
    from reasonrl import smollm2

    print(smollm2.fetch())
    return 0


def _run_folder(name: str, resume: bool) -> Path:
    """runs/NAME; where that is taken the next free runs/NAME-2, ...; to resume, the last one."""
    taken = [Path("runs", name if i == 1 else f"{name}-{i}") for i in range(1, 1000)]
    used = [p for p in taken if p.exists()]
    if resume:
        return used[-1] if used else taken[0]
    return next(p for p in taken if p not in used)


def _unread() -> bool:
    """Whether whoever read the output has gone (`| head`); what is left of it then is dropped."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), sys.stdout.fileno())
        return True
    return False


def _quiet_libraries() -> None:
    """No advice, no bars of their own, no tokenizer threads; before transformers is imported."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.disable_progress_bar()


if __name__ == "__main__":
    sys.exit(main())
