"""`reasonrl judge train`: a judge from judged answers, in stages, each a run of the training loop.

gold: judgements by rule, for a model that cannot judge yet. sft: judgements sampled from the
starting judge or a teacher, those with the right verdict kept, other reasoning mixed in. rl: GRPO
on the verdict. A run takes the recipe judge_sft or judge_rl and `key.path=value` like any other.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from reasonrl.commands import server
from reasonrl.records import InputError

# what only --stage sft has, with its defaults
SFT_ONLY = {
    "teacher": None,
    "teacher_model": None,
    "samples": 4,
    "keep": 1,
    "no_rejection": False,
    "mix": None,
    "mix_share": 0.25,
}


def add(kinds) -> None:
    command = kinds.add_parser("train", help="train a judge: by rule, by rejection sampling, by RL")
    command.add_argument("data", type=Path, help="JSONL or parquet in Libra Bench's format")
    command.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    command.add_argument("--stage", required=True, choices=["gold", "sft", "rl"])
    command.add_argument("--out", type=Path, required=True, help="folder of the run")
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    command.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    command.add_argument("--no-thinking", action="store_true", help="the verdict at once")
    sft = command.add_argument_group("stage sft")
    sft.add_argument("--teacher", help="who writes judgements: a model, or http://host:port/v1")
    sft.add_argument("--teacher-model", metavar="NAME", help="its name at that server")
    sft.add_argument("--samples", type=int, help="judgements a row (default 4)")
    sft.add_argument("--keep", type=int, help="right ones kept of a row, at most (default 1)")
    sft.add_argument(
        "--no-rejection", action="store_true", default=None, help="keep wrong ones too"
    )
    sft.add_argument("--mix", type=Path, help="rows with prompt and worked, not about judging")
    sft.add_argument(
        "--mix-share", type=float, help="their share of what is learned (default 0.25)"
    )
    server.add_options(command)
    command.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from reasonrl import config as configs
    from reasonrl.train import train

    values = {key: getattr(options, key) for key in SFT_ONLY}
    given = [key for key, value in values.items() if value is not None]
    if given and options.stage != "sft":
        flag = given[0].replace("_", "-")
        raise InputError(f"--{flag}: expected --stage sft, got --stage {options.stage}")
    for key in SFT_ONLY:
        if values[key] is None:
            setattr(options, key, SFT_ONLY[key])
    _check(options, mixing="mix_share" in given)
    recipe = "judge_rl" if options.stage == "rl" else "judge_sft"
    own = [f"task_options.data={json.dumps(str(options.data))}"]
    if options.no_thinking:
        own.append("task_options.think=false")
    if options.stage == "sft":
        traces = options.out / "traces.jsonl"
        config = configs.load(recipe, [*own, *options.overrides])
        _traces(options, config, traces)
        own.append(f"task_options.traces={json.dumps(str(traces))}")
    config = configs.load(recipe, [*own, *options.overrides])
    done = train(config, options.out, resume=options.resume, quiet=options.quiet)
    if not done and not options.quiet:
        print("stopped after a whole step; go on with the same command and --resume")
    return 0


def _check(options: argparse.Namespace, mixing: bool) -> None:
    for name in ("samples", "keep"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name}: expected >= 1, got {getattr(options, name)}")
    share = options.mix_share
    if not (math.isfinite(share) and 0 < share < 1):
        raise InputError(f"--mix-share: expected a share between 0 and 1, got {share}")
    if mixing and options.mix is None:
        raise InputError("--mix-share: expected --mix FILE with it, got none")
    remote = options.teacher is not None and server.is_url(options.teacher)
    if options.teacher_model and not remote:
        raise InputError("--teacher-model: only for a teacher at http://...")


def _traces(options: argparse.Namespace, config, path: Path) -> None:
    """Sample what stage sft learns from, once: a resumed run learns from the same file."""
    from reasonrl import checkpoint, progress
    from reasonrl.judge_train import Sampled, mixed, traces
    from reasonrl.log import replace_file
    from reasonrl.rollout import Sampling
    from reasonrl.stepwise import write_rows
    from reasonrl.tasks import make_task
    from reasonrl.tasks.judging import Judging

    said = {key: getattr(options, key) for key in SFT_ONLY} | {"data": str(options.data)}
    said |= {"teacher": options.teacher or config.model, "mix": options.mix and str(options.mix)}
    record = path.with_name("traces.json")
    if options.resume and record.is_file():
        before = json.loads(record.read_text())["settings"]
        for key, value in said.items():
            if before.get(key) != value:
                flag = key.replace("_", "-")
                was = before.get(key)
                raise InputError(f"{record}: {flag}: the run has {was!r}, --resume asks {value!r}")
        return
    if checkpoint.checkpoints(options.out):
        raise InputError(f"{options.out}: holds a run already; use --resume, or another --out")
    task = make_task(config.task, seed=config.seed, **config.task_options)
    if not isinstance(task, Judging):
        raise InputError(f"task: expected judging, got {task.name!r}")
    how = Sampled(options.samples, options.keep, not options.no_rejection, config.seed)
    draw = config.sample
    sampling = Sampling(config.max_completion_length, draw.temperature, draw.top_p, draw.top_k)
    with progress.shown(options.quiet):
        rows, counts = traces(_teacher(options, config), task, task.judgements(), sampling, how)
    if options.mix:
        rows = mixed(rows, options.mix, options.mix_share, config.seed)
    write_rows(path, rows)
    counts["rows_written"] = len(rows)
    text = json.dumps({"settings": said, "counts": counts}, indent=1) + "\n"
    replace_file(record, text.encode())
    if not options.quiet:
        print(f"{path}: {counts['judgements']} judgements among {len(rows)} rows; {counts}")


def _teacher(options: argparse.Namespace, config):
    from reasonrl import models

    if options.teacher is not None and server.is_url(options.teacher):
        return server.client(options, options.teacher, options.teacher_model, "--teacher-model")
    own = {} if options.teacher is not None else config.model_options
    name, where = options.teacher or config.model, config.device
    return models.load(name, dtype=config.dtype, device=where, seed=config.seed, **own)
