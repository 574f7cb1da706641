"""`reasonrl score`, `select` and `best-of-n`: a process reward model over files of completions."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from reasonrl.commands import waiting
from reasonrl.commands.label import unescaped
from reasonrl.records import InputError

HOWS = ("min", "mean", "last", "prod", "total")


def add(commands) -> None:
    command = commands.add_parser("score", help="step scores of completions, or a benchmark's")
    _model(command)
    command.add_argument("data", type=Path, nargs="?", help="JSONL or parquet of completions")
    command.add_argument("--out", type=Path, help="JSONL to write (default: standard output)")
    command.add_argument(
        "--benchmark", nargs=2, metavar=("NAME", "FILE"), help="processbench or prmbench, and file"
    )
    command.set_defaults(run=_score)

    command = commands.add_parser("select", help="keep the best answers of a pool as training data")
    _model(command)
    command.add_argument("data", type=Path, nargs="+", help="the pool: JSONL or parquet")
    command.add_argument("--keep", type=int, required=True, help="how many answers")
    command.add_argument("--per-prompt", type=int, help="at most so many of one prompt")
    command.add_argument("--how", default="total", choices=HOWS, help="what ranks an answer")
    command.add_argument("--out", type=Path, required=True, help="JSONL for `train sft task=...`")
    command.add_argument("--report", type=Path, help="JSON: histogram, duplicates, reasons")
    command.set_defaults(run=_select)

    command = commands.add_parser("best-of-n", help="choose among stored completions by a PRM")
    _model(command)
    command.add_argument("data", type=Path, nargs="+", help="completions with their outcomes")
    command.add_argument("--how", default="min", choices=HOWS, help="what `weighted` sums")
    command.add_argument("--out", type=Path, help="JSON to write")
    command.add_argument("--plot", type=Path, help="picture to write (needs matplotlib)")
    command.set_defaults(run=_best_of_n)


def _model(command: argparse.ArgumentParser) -> None:
    command.add_argument("prm", help="folder of a process reward model or of its training run")
    command.add_argument("--separator", help="token behind every step (published heads)")
    command.add_argument("--pair", nargs=2, metavar=("WRONG", "RIGHT"), help="tokens that judge")
    command.add_argument("--delimiter", help="what ends a step of a plain completion")
    waiting.add(command)


def scorer(options: argparse.Namespace):
    """The process reward model that the options name."""
    from reasonrl import prm_heads

    delimiter = unescaped(options.delimiter or "\n")
    pair = tuple(options.pair) if options.pair else None
    known = {"separator": options.separator, "pair": pair, "delimiter": delimiter}
    return prm_heads.load(options.prm, device="auto", **known)


def _cut(options: argparse.Namespace, prm) -> str:
    return unescaped(options.delimiter) if options.delimiter else prm.reading.delimiter


def _score(options: argparse.Namespace) -> int:
    from reasonrl import benchmarks
    from reasonrl.stepwise import read_traces, trace_row, write_rows

    if (options.data is None) == (options.benchmark is None):
        raise InputError("score: expected a data file or --benchmark NAME FILE, and not both")
    prm = scorer(options)
    if options.benchmark:
        found = benchmarks.run(prm, *options.benchmark)
        print(json.dumps(found, indent=1))
        if options.out:
            options.out.write_text(json.dumps(found, indent=1) + "\n")
        return 0
    traces = read_traces(options.data, labelled=False, delimiter=_cut(options, prm))
    rows = []
    for trace, found in zip(traces, prm.score(traces), strict=True):
        row = trace_row(trace) | {"step_scores": found.steps or None}
        row |= {"final_score": found.final, "reason": found.reason or None}
        row["score"] = found.total(prm.reading.alpha) if found.steps else None
        rows.append(row)
    if options.out:
        write_rows(options.out, rows)
        known = sum(row["score"] is not None for row in rows)
        print(f"{options.out}: {known} of {len(rows)} completions scored")
        return 0
    for row in rows:
        print(json.dumps(row, ensure_ascii=False))
    return 0


def _select(options: argparse.Namespace) -> int:
    from reasonrl.choice import TOGETHER
    from reasonrl.curate import select
    from reasonrl.stepwise import read_traces, trace_row, write_rows

    for name in ("keep", "per_prompt"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')}: expected >= 1, got {value}")
    prm = scorer(options)
    cut = _cut(options, prm)
    traces = [t for path in options.data for t in read_traces(path, labelled=False, delimiter=cut)]
    found = prm.score(traces)
    values = [math.nan] * len(found)
    for i, s in enumerate(found):
        if s.steps and options.how == "total":
            values[i] = s.total(prm.reading.alpha)
        elif s.steps:
            values[i] = TOGETHER[options.how](s.steps)
    reasons = [s.reason for s in found]
    chosen, report = select(traces, values, reasons, options.keep, options.per_prompt)
    rows = []
    for rank, i in enumerate(chosen, 1):
        about = {"worked": traces[i].text, "score": values[i], "rank": rank}
        rows.append(trace_row(traces[i]) | about)
    write_rows(options.out, rows)
    if options.report:
        options.report.write_text(json.dumps(report, indent=1) + "\n")
    print(
        f"{options.out}: {report['kept']} of {report['answers']} answers, scores"
        f" {report['lowest_kept']:.4f} and above; {len(report['duplicates'])} duplicates,"
        f" {len(report['unscored'])} unscored"
    )
    return 0


def _best_of_n(options: argparse.Namespace) -> int:
    from reasonrl import plots
    from reasonrl.curves import curves, difference
    from reasonrl.plot_scores import best_of_n_panel

    if options.plot:
        plots.check_suffix(options.plot)
    groups = candidates(scorer(options), options.data, options.delimiter)
    found = curves(groups, HOWS, options.how)
    n = found["n"][-1]
    found |= {"n_completions": min(map(len, groups)), "how": options.how}
    found["prm_minus_majority"] = {how: difference(groups, how, n) for how in HOWS}
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        plots.draw([best_of_n_panel(found)], options.plot)
    print(table(found))
    return 0


def candidates(prm, files, delimiter: str | None):
    """The completions of some files by problem, scored; InputError where an outcome is missing."""
    from reasonrl.curves import candidate
    from reasonrl.stepwise import read_traces

    cut = unescaped(delimiter) if delimiter else prm.reading.delimiter
    traces = [t for path in files for t in read_traces(path, labelled=False, delimiter=cut)]
    groups: dict[str, list] = {}
    for trace, found in zip(traces, prm.score(traces), strict=True):
        outcome = trace.final if trace.final is not None else trace.extra.get("reward")
        if isinstance(outcome, bool) or not isinstance(outcome, int | float):
            raise InputError(
                f"{trace.where}: field 'final': expected the outcome, 0 or 1, got {outcome!r}"
                " (`reasonrl prm label` and a run's tables have it)"
            )
        key = str(trace.extra.get("problem_id", trace.prompt))
        total = found.total(prm.reading.alpha)
        groups.setdefault(key, []).append(candidate(trace.text, outcome >= 0.5, found.steps, total))
    return list(groups.values())


def table(found: dict) -> str:
    """The curves as Markdown, in percent with 95 % intervals."""
    head = " | ".join(f"N = {n}" for n in found["n"])
    lines = [f"| {found['problems']} problems | {head} |", "|---" * (len(found["n"]) + 1) + "|"]
    for name, points in found["curves"].items():
        cells = (
            f"{100 * p['accuracy']:.1f} ({100 * p['low']:.1f}..{100 * p['high']:.1f})"
            for p in points
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)
