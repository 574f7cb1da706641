"""A judge before and after each stage of its training, and what it is good for, over seeds.

    python recipes/libra/measure.py --seeds 1 2 3 4 5 [--arms gold sft rl ...] [--only-run]

A seed: one policy learns arithmetic chains for a while, judged answers are made of its own
(`reasonrl judge data`, bench rows on other questions), and every arm starts from there. gold:
judgements by rule. sft: rejection sampling from gold, other reasoning mixed in. rl: GRPO on the
verdict from sft. plain: gold without thinking. long: gold for more steps. dpo: pairs by that judge
on prompts whose answers nobody gives, then DPO of the policy. online: train libra with that judge.
dpo_NAME, online_NAME: the same with another judge. wordy: long taught to judge at once, by its
check, or by the check said twice, a third each; the RL after it has no price on length, that of
the recipe, or a dear one. long_other and long_pool learn from the answers of another model, or of
both, and every long judge is asked about the answers of each.
The rest are ablations. What is finished is not run again. Writes results.json (every seed and
arm), results.md (means, 95 % t-intervals of paired differences) and, by downstream.py,
downstream.svg.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import downstream
from arms import (
    ARMS,
    COLD,
    CROSS,
    DPO,
    ONLINE,
    OPTIONS,
    OTHER,
    OTHER_COLD,
    PROBLEMS,
    SMALL,
    TASK,
    USES,
)
from tables import points, table

HERE = Path(__file__).resolve().parent
SAMPLED = ("judge/accuracy", "completions/mean_length", "judge/length_price")  # of 20 last steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument("--arms", nargs="*", default=[*ARMS, *USES])
    parser.add_argument("--runs", type=Path, default=Path("runs/libra"))
    parser.add_argument("--only-run", action="store_true", help="leave the tables alone")
    parser.add_argument("--only-read", action="store_true", help="tables of what is finished")
    options = parser.parse_args()
    one = finished if options.only_read else seed_of
    results = [one(seed, options.runs / str(seed), options.arms) for seed in options.seeds]
    if options.only_run:
        return
    whole = {
        "seeds": results,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, no GPU, one thread a run",
        "versions": {n: version(n) for n in ("reasonrl", "torch", "transformers")},
    }
    (HERE / "results.json").write_text(json.dumps(whole) + "\n")
    (HERE / "results.md").write_text(table(whole))
    downstream.picture(points(whole["seeds"]), HERE / "downstream.svg")
    print(table(whole))


def seed_of(seed: int, runs: Path, arms: list[str]) -> dict:
    """Everything of one seed; what is finished is read, not run."""
    found: dict = {"seed": seed}
    common = [f"seed={seed}", "threads=1"]
    words = ["train", "tiny", TASK, SMALL, *COLD, f"eval_problems={PROBLEMS}", *common]
    found["base"] = run(runs / "base", [*words, "--quiet"])
    base = f"model={last(runs / 'base')}"
    data = [TASK, base, f"seed={seed}", "max_completion_length=24", "--samples", "4"]
    made(runs / "train.jsonl", ["judge", "data", "tiny", *data, "--problems", "1500"])
    bench = [*data, "--problems", "300", "--split", "test"]
    made(runs / "bench.jsonl", ["judge", "data", "tiny", *bench])
    other_reasoning(runs / "mix.jsonl", seed)
    if {"long_other", "long_pool"} & set(arms):
        found["other"] = other_answers(runs, data, common)
    for arm in [a for a in ARMS if a in arms]:
        found[arm] = judge(runs, arm, common)
        if arm in CROSS and "other" in found:
            ask = ["judge", "bench", str(runs / "other_bench.jsonl"), "--style", "compact"]
            ask += ["--judge", str(last(runs / arm)), "--max-tokens", "48"]
            made(runs / f"{arm}-other.json", ask)
    for use in [u for u in USES if u in arms]:
        how, by = USES[use]
        one = dpo if how == "dpo" else online
        found[use] = one(runs, use, by, base, common)
    return found | finished(seed, runs, [*found])


def judge(runs: Path, arm: str, common: list[str]) -> dict:
    """A judge of one arm."""
    stage, start, keys = ARMS[arm]
    rows = {"other": "other_train.jsonl", "pool": "pool_train.jsonl"}.get(keys[0], "train.jsonl")
    keys = [
        str(runs / "mix.jsonl") if k == "mix" else k for k in keys if k not in ("other", "pool")
    ]
    words = ["judge", "train", str(runs / rows), "--stage", stage]
    if stage == "forms":
        three_lengths(runs / rows, runs / "forms.jsonl")
        words = ["train", "judge_sft", f"task_options.data={runs / rows}"]
        words += [f"task_options.traces={runs / 'forms.jsonl'}"]
    words += ["--quiet", *common, f"model={last(runs / start)}"]
    words += [f"task_options.eval_file={runs / 'bench.jsonl'}"]
    return run(runs / arm, [*words, *keys])


def other_answers(runs: Path, data: list[str], common: list[str]) -> dict:
    """Judged answers of a model of another shape, and of both models to half the problems."""
    words = ["train", "tiny", TASK, OTHER, *OTHER_COLD, f"eval_problems={PROBLEMS}", *common]
    found = run(runs / "other", [*words, "--quiet"])
    other = ["--generator", str(last(runs / "other"))]
    ask = ["judge", "data", "tiny", *data]
    made(runs / "other_train.jsonl", [*ask, "--problems", "1500", *other])
    made(runs / "other_bench.jsonl", [*ask, "--problems", "300", "--split", "test", *other])
    both = [*other, "--generator", str(last(runs / "base"))]
    made(runs / "pool_train.jsonl", [*ask, "--problems", "750", *both])
    return found


def finished(seed: int, runs: Path, arms: list[str]) -> dict:
    """What is there of one seed; nothing is run."""
    found: dict = {"seed": seed}
    for arm in ("base", "other", *ARMS, *USES):
        done = runs / arm / "measured.json"
        if done.exists() and arm in ("base", "other", *arms):
            found[arm] = json.loads(done.read_text()) | progress(runs / arm)
        there = runs / f"{arm}-other.json"
        if arm in found and there.exists():
            found[arm]["on_other"] = json.loads(there.read_text())["accuracy"]["accuracy"]
        if arm in found and USES.get(arm, ("",))[0] == "dpo":
            after = json.loads((runs / f"{arm}.json").read_text().splitlines()[-1])
            pairs = len(lines(runs / name_of("pairs", arm)))
            found[arm] |= {"accuracy": after["eval/accuracy"], "pairs": pairs}
    return found


def dpo(runs: Path, use: str, by: str, base: str, common: list[str]) -> dict:
    """The policy after DPO on pairs that a trained judge made of its answers to new prompts."""
    answers, pairs = runs / "answers.jsonl", runs / name_of("pairs", use)
    seed = common[0]
    span = ["--first", "5000", "--problems", "800", "--group", "6", "--delimiter", ";"]
    words = ["prm", "label", "tiny", TASK, base, seed, "max_completion_length=24", *span]
    made(answers, words)
    judged = ["--judge", str(last(runs / by)), "--style", "compact", "--votes", "2"]
    judged += ["--max-tokens", "48", *(["--no-thinking"] if "plain" in by else [])]
    made(pairs, ["pairs", str(answers), *judged])
    words = ["train", "dpo", f"task={pairs}", "task_options={dev: 0.0, test: 0.0}", base]
    found = run(runs / use, [*words, "dtype=fp32", *DPO, *common, "--quiet"])
    words = ["eval", "tiny", TASK, f"model={last(runs / use)}", f"eval_problems={PROBLEMS}"]
    made(runs / f"{use}.json", [*words, seed], printed=True)
    return found


def online(runs: Path, use: str, by: str, base: str, common: list[str]) -> dict:
    """The policy after RL on the verdicts of a trained judge."""
    words = ["train", "libra", TASK, base, f"algo.judge={last(runs / by)}", *ONLINE, *common]
    words += ["algo.think=false"] if "plain" in by else []
    return run(runs / use, [*words, f"eval_problems={PROBLEMS}", "--quiet"])


def name_of(kind: str, use: str) -> str:
    return f"{kind}{use.removeprefix('dpo')}.jsonl"


def other_reasoning(path: Path, seed: int) -> None:
    """Worked chains on problems that no judging row is about."""
    from reasonrl.stepwise import write_rows
    from reasonrl.tasks import make_task

    task = make_task("arithmetic", seed=seed, **OPTIONS)
    problems = task.problems("train", 20000, 1500)
    write_rows(path, [{"prompt": p.prompt, "worked": task.worked(p)} for p in problems])


def three_lengths(cases: Path, path: Path) -> None:
    """Judgements by rule: the verdict at once, behind its check, behind the check said twice."""
    from reasonrl.judging import ask, verdict_text
    from reasonrl.stepwise import write_rows

    rows = []
    for i, case in enumerate(lines(cases)):
        call = ask(case["question"], case["response"], style="compact")
        check = ["", case["check"], f"{case['check']}~{case['check']}"][i % 3]
        worked = check + verdict_text(case["label"], call.nonce, "compact")
        rows.append({"prompt": call.prompt, "worked": worked})
    write_rows(path, rows)


def made(path: Path, words: list[str], printed: bool = False) -> None:
    """A file made by one command, unless it is there."""
    if path.exists():
        return
    command = [sys.executable, "-m", "reasonrl.cli", *words]
    if printed:
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        path.write_text(out)
    else:
        subprocess.run([*command, "--out", str(path)], check=True, stdout=subprocess.DEVNULL)


def run(out: Path, words: list[str]) -> dict:
    """One training run, unless it is finished: its evaluations, steps and processor seconds."""
    done = out / "measured.json"
    if done.exists():
        return json.loads(done.read_text()) | progress(out)
    command = [sys.executable, "-m", "reasonrl.cli", *words, "--out", str(out)]
    if (out / "config.yaml").exists():
        command.append("--resume")
    load, began = os.getloadavg()[0], time.time()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    row = {
        "command": " ".join(words),
        "seconds": round(time.time() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "load_before": round(load, 2),
    }
    done.write_text(json.dumps(row))
    return row | progress(out)


def progress(out: Path) -> dict:
    """What a run wrote of itself: evaluations, every tenth step, what was sampled before it."""
    names = ("step", "reward", "judge/accuracy", "judge/unparsable", "judge/length_price")
    names += ("dpo/accuracy", "loss", "completions/mean_length", "process/judge_agreement")
    counts = out / "traces.json"
    every = lines(out / "metrics.jsonl")
    end = [r for r in every[-20:] if "judge/accuracy" in r]
    return {
        "evals": [
            {"step": r["step"], "accuracy": r["eval/accuracy"], "length": r["eval/mean_length"]}
            for r in lines(out / "evals.jsonl")
        ],
        "steps": [{k: r[k] for k in names if r.get(k) is not None} for r in every[9::10]],
        "sampled": {k: sum(r[k] for r in end) / len(end) for k in SAMPLED if end},
        "traces": json.loads(counts.read_text())["counts"] if counts.exists() else None,
    }


def lines(path: Path) -> list[dict]:
    return [json.loads(s) for s in path.read_text().splitlines()] if path.exists() else []


def last(run: Path) -> Path:
    """The last checkpoint of a run."""
    return max(run.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))


if __name__ == "__main__":
    main()
