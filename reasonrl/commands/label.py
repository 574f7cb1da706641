"""`reasonrl prm label`: step labels by a task's rule, by scores without a rule, or by people."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reasonrl.commands import server, waiting
from reasonrl.records import InputError


def add(kinds) -> None:
    command = kinds.add_parser("label", help="label the steps of completions, three ways")
    command.add_argument("recipe", nargs="?", help="names model, task and sampling, as in train")
    command.add_argument("overrides", nargs="*", default=[], metavar="key.path=value")
    command.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    command.add_argument(
        "--source",
        default="rule",
        choices=["rule", "scores"],
        help="rule: the task checks each step; scores: alignment, quality, coherence (--data)",
    )
    command.add_argument("--redact", metavar="MODULE:FUNCTION", help="runs on all texts first")
    command.add_argument("--delimiter", help="what ends a step (default: the task's own)")
    rule = command.add_argument_group("--source rule")
    rule.add_argument("--split", default="train", choices=["sft", "train", "dev", "test"])
    rule.add_argument("--first", type=int, default=0, help="number of the first problem")
    rule.add_argument("--problems", type=int, default=500)
    rule.add_argument("--group", type=int, help="completions of each (default: the recipe's)")
    people = command.add_argument_group("people")
    people.add_argument("--ask", type=int, metavar="K", help="write K questions to people")
    people.add_argument("--answers", type=Path, help="questions that people have answered")
    people.add_argument("--prm", help="the model whose least sure steps are asked about")
    people.add_argument("--data", type=Path, help="the traces (also for --source scores)")
    scores = command.add_argument_group("--source scores")
    scores.add_argument("--encoder", help="folder of an encoder or a language model")
    scores.add_argument("--pooling", default="mean", choices=["mean", "cls"])
    scores.add_argument("--judge", help="model, or http://host:port/v1, that rates each step")
    scores.add_argument("--expert", help="likewise, distils templates (with --policy)")
    scores.add_argument("--policy", help="likewise, answers by the template")
    for role in ("judge", "expert", "policy"):
        scores.add_argument(f"--{role}-model", metavar="NAME", help="its name at its server")
    server.add_options(scores)
    scores.add_argument("--attempts", type=int, default=8, help="answers of the policy")
    scores.add_argument("--coherence", default="cosine", choices=["cosine", "infonce", "log"])
    scores.add_argument("--tau", type=float, default=0.1, help="temperature of infonce and log")
    scores.add_argument("--others", type=int, default=16, help="steps of unrelated traces")
    scores.add_argument("--max-tokens", type=int, default=512, help="of one reply")
    scores.add_argument("--cache", type=Path, help="folder that keeps vectors and replies")
    scores.add_argument("--seed", type=int, default=0)
    waiting.add(command)
    command.set_defaults(run=_label)


def _label(options: argparse.Namespace) -> int:
    if options.ask is not None or options.answers is not None:
        return _people(options)
    return _scores(options) if options.source == "scores" else _rule(options)


def _rule(options: argparse.Namespace) -> int:
    from reasonrl import config as configs
    from reasonrl import models
    from reasonrl.labels import sampled
    from reasonrl.redact import redacted
    from reasonrl.rollout import Sampling
    from reasonrl.stepwise import write_rows
    from reasonrl.tasks import make_task

    if options.recipe is None:
        raise InputError(
            "prm label: expected a recipe, or --source scores, or --ask K, or --answers FILE"
        )
    for name, least in (("problems", 1), ("first", 0)):
        if getattr(options, name) < least:
            raise InputError(f"--{name}: expected >= {least}, got {getattr(options, name)}")
    config = configs.load(options.recipe, options.overrides)
    group = config.group if options.group is None else options.group
    if group < 1:
        raise InputError(f"--group: expected >= 1, got {group}")
    hide = _redact(options)
    policy = models.load(
        config.model,
        dtype=config.dtype,
        device=config.device,
        seed=config.seed,
        **config.model_options,
    )
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
            yield redacted(row, hide)

    rows = sampled(policy, task, sampling, span, group, delimiter, config.seed)
    count = write_rows(options.out, counted(rows))
    print(
        f"{options.out}: {count} completions ({count - wrong} right), {steps} steps ({right} right)"
    )
    return 0


def _scores(options: argparse.Namespace) -> int:
    """Labels without a rule; what cannot be labelled goes beside them with its reason."""
    from reasonrl.cache import Cache
    from reasonrl.encoder import Encoder
    from reasonrl.stepwise import write_rows
    from reasonrl.trajectory import Labeller, read_thoughts

    if options.recipe or not (options.data and options.encoder and options.judge):
        raise InputError(
            "prm label --source scores: expected --data FILE, --encoder FOLDER, --judge MODEL and"
            " no recipe"
        )
    if (options.expert is None) != (options.policy is None):
        raise InputError("prm label: --expert and --policy go together")
    for name in ("attempts", "others", "max_tokens"):
        if getattr(options, name) < 1:
            raise InputError(
                f"--{name.replace('_', '-')}: expected >= 1, got {getattr(options, name)}"
            )
    if not options.tau > 0:
        raise InputError(f"--tau: expected > 0, got {options.tau}")
    delimiter = unescaped(options.delimiter or "\\n\\n")
    thoughts = read_thoughts(options.data, delimiter, _redact(options))
    cache = Cache(options.cache)
    labeller = Labeller(
        encoder=Encoder.load(options.encoder, cache, options.pooling),
        judge=asker("judge", options, cache, 0.0),
        expert=asker("expert", options, cache, 0.0) if options.expert else None,
        policy=asker("policy", options, cache, 1.0) if options.policy else None,
        attempts=options.attempts,
        coherence=options.coherence,
        tau=options.tau,
        others=options.others,
        seed=options.seed,
    )
    left: list[dict[str, Any]] = []

    def labelled() -> Iterator[dict[str, Any]]:
        for row in labeller(thoughts):
            if "reason" in row:
                left.append(row)
            else:
                yield row

    count = write_rows(options.out, labelled())
    print(f"{options.out}: {count} of {len(thoughts)} traces labelled")
    aside = options.out.with_suffix(".unlabelled.jsonl")
    if left:
        write_rows(aside, left)
        print(f"{aside}: {len(left)} without a label; {left[0]['id']}: {left[0]['reason']}")
    else:
        aside.unlink(missing_ok=True)  # of an earlier run
    if not count:
        options.out.unlink()  # an empty file would only be refused later
        raise InputError(f"{options.data}: no trace could be labelled; see {aside}")
    return 0


def asker(role: str, options: argparse.Namespace, cache, temperature: float):
    """Who answers in a role, in this process or behind a server; replies are kept in the cache."""
    from reasonrl import models
    from reasonrl.asker import ClientAsker, PolicyAsker, Remembered
    from reasonrl.cache import fingerprint

    name, model = getattr(options, role), getattr(options, f"{role}_model")
    settings = {
        "max_tokens": options.max_tokens, "temperature": temperature, "seed": options.seed
    }  # fmt: skip
    if server.is_url(name):
        own = ClientAsker(server.client(options, name, model, f"--{role}-model"), **settings)
        identity = f"{name} {model}"
    else:
        if model:
            raise InputError(f"--{role}-model: only for a {role} at http://..., got {name!r}")
        own = PolicyAsker(models.load(name, device="auto"), **settings)
        identity = fingerprint(name) if Path(name).is_dir() else name
    manner = [identity, options.max_tokens, temperature, options.seed if temperature else 0]
    return Remembered(own, repr(manner), cache)


def _people(options: argparse.Namespace) -> int:
    """--ask: the least sure steps as questions; --answers: their labels back."""
    from reasonrl import prm_heads
    from reasonrl.asking import answered, questions
    from reasonrl.stepwise import read_traces, trace_row, write_rows

    if options.recipe or (options.ask is None) == (options.answers is None):
        raise InputError("prm label: expected a recipe, --ask K or --answers FILE, and only one")
    if not options.prm or not options.data:
        raise InputError("prm label: --ask and --answers need --prm FOLDER and --data FILE")
    if options.ask is not None and options.ask < 1:
        raise InputError(f"--ask: expected >= 1, got {options.ask}")
    prm = prm_heads.load(options.prm, device="auto")
    cut = unescaped(options.delimiter) if options.delimiter else prm.reading.delimiter
    traces = read_traces(options.data, labelled=False, delimiter=cut, redact=_redact(options))
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


def _redact(options: argparse.Namespace):
    from reasonrl.redact import load

    return None if options.redact is None else load(options.redact)


def unescaped(delimiter: str) -> str:
    r"""A delimiter as typed in a shell: \n and \t mean what they usually mean."""
    return delimiter.replace("\\n", "\n").replace("\\t", "\t")
