"""A judge before and after each stage of its training, and what it is good for, over seeds.

    python recipes/libra/measure.py --seeds 1 2 3 4 5 [--arms gold sft rl ...] [--only-run]

A seed: one policy learns arithmetic chains for a while, judged answers are made of its own
(`reasonrl judge data`, bench rows on other questions), and every arm starts from there. gold:
judgements by rule. sft: rejection sampling from gold, other reasoning mixed in. rl: GRPO on the
verdict from sft. plain: gold without thinking. long: gold for more steps. dpo: pairs by that judge
on prompts whose answers nobody gives, then DPO of the policy. The rest are ablations. What is
finished is not run again. Writes results.json (every seed and arm) and results.md (means, 95 %
t-intervals of paired differences).
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365}  # two-sided, n seeds
OPTIONS = {"terms": 3, "ops": "+-*", "mod": 7, "low": 0, "high": 6, "style": "compact"}
TASK = f"task_options={json.dumps(OPTIONS)}"
SMALL = "model_options={width: 64, layers: 2, heads: 2}"
PROBLEMS = 500  # held-out problems of the policy
COLD = ["cold_start_steps=600", "cold_start.batch=32", "cold_start.learning_rate=3e-3", "steps=0"]
GOLD = ["steps=220", "eval.at_start=false", "prompts_per_step=32", "learning_rate=3e-3"]
LONG = ["steps=800", *GOLD[1:]]
SFT = ["steps=300", "eval.at_start=false", "prompts_per_step=32", "learning_rate=1e-3"]
RL = ["steps=80", "eval.at_start=false", "learning_rate=1e-4", "log.completions_every=0"]
DPO = ["steps=60", "prompts_per_step=16", "learning_rate=1e-4", "eval_problems=0"]
ONLINE = ["cold_start_steps=0", "steps=40", "prompts_per_step=16", "learning_rate=3e-4"]
ONLINE += ["algo.votes=2", "eval.at_start=false", "log.completions_every=0"]
# arm: (stage, the arm it starts from, its own words); "mix" is the seed's file of other reasoning
ARMS = {
    "gold": ("gold", "base", GOLD),
    "sft": ("sft", "gold", ["--mix", "mix", *SFT]),
    "rl": ("rl", "sft", RL),
    "plain": ("gold", "base", ["--no-thinking", *GOLD]),
    "long": ("gold", "base", LONG),
    "plain_long": ("gold", "base", ["--no-thinking", *LONG]),
    "no_sft": ("rl", "gold", RL),
    "no_rejection": ("sft", "gold", ["--mix", "mix", "--no-rejection", *SFT]),
    "no_mix": ("sft", "gold", SFT),
}
# what is compared with what, in the table
PAIRS = [
    ("sft", "gold", "rejection sampling"),
    ("rl", "gold", "both stages"),
    ("rl", "sft", "RL after it"),
    ("gold", "plain", "thinking over none, 220 steps by rule"),
    ("long", "plain_long", "thinking over none, 800 steps by rule"),
    ("long", "gold", "800 steps by rule over 220"),
    ("rl", "no_sft", "RL with SFT before it over RL alone"),
    ("sft", "no_rejection", "keeping the agreeing judgements over keeping all"),
    ("sft", "no_mix", "other reasoning mixed in over none"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    parser.add_argument(
        "--arms", nargs="*", default=["gold", "sft", "rl", "plain", "long", "plain_long", "dpo"]
    )
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
    (HERE / "results.json").write_text(json.dumps(whole, indent=1) + "\n")
    (HERE / "results.md").write_text(table(whole))
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
    for arm in [a for a in ARMS if a in arms]:
        stage, start, keys = ARMS[arm]
        keys = [str(runs / "mix.jsonl") if k == "mix" else k for k in keys]
        words = ["judge", "train", str(runs / "train.jsonl"), "--stage", stage, "--quiet", *common]
        words += [f"model={last(runs / start)}", f"task_options.eval_file={runs / 'bench.jsonl'}"]
        found[arm] = run(runs / arm, [*words, *keys])
    if "dpo" in arms:
        found["dpo"] = dpo(runs, seed, base, common)
    if "online" in arms:
        words = [
            "train",
            "libra",
            TASK,
            base,
            f"algo.judge={last(runs / 'long')}",
            *ONLINE,
            *common,
        ]
        found["online"] = run(runs / "online", [*words, f"eval_problems={PROBLEMS}", "--quiet"])
    return found


def finished(seed: int, runs: Path, arms: list[str]) -> dict:
    """What is there of one seed; nothing is run."""
    found: dict = {"seed": seed}
    for arm in ("base", *ARMS, "online", "dpo"):
        done = runs / arm / "measured.json"
        if done.exists() and arm in ("base", *arms):
            found[arm] = json.loads(done.read_text())
    if "dpo" in found:
        found["dpo"] |= _after(runs)
    return found


def dpo(runs: Path, seed: int, base: str, common: list[str]) -> dict:
    """The policy after DPO on pairs that the trained judge made of its answers to new prompts."""
    answers, pairs, judge = runs / "answers.jsonl", runs / "pairs.jsonl", last(runs / "long")
    span = ["--first", "5000", "--problems", "800", "--group", "6", "--delimiter", ";"]
    words = ["prm", "label", "tiny", TASK, base, f"seed={seed}", "max_completion_length=24", *span]
    made(answers, words)
    judged = ["--judge", str(judge), "--style", "compact", "--votes", "2", "--max-tokens", "48"]
    made(pairs, ["pairs", str(answers), *judged])
    words = ["train", "dpo", f"task={pairs}", "task_options={dev: 0.0, test: 0.0}", base]
    found = run(runs / "dpo", [*words, "dtype=fp32", *DPO, *common, "--quiet"])
    words = ["eval", "tiny", TASK, f"model={last(runs / 'dpo')}", f"eval_problems={PROBLEMS}"]
    made(runs / "dpo.json", [*words, f"seed={seed}"], printed=True)
    return found | _after(runs)


def _after(runs: Path) -> dict:
    after = json.loads((runs / "dpo.json").read_text().splitlines()[-1])
    return {"accuracy": after["eval/accuracy"], "pairs": len(lines(runs / "pairs.jsonl"))}


def other_reasoning(path: Path, seed: int) -> None:
    """Worked chains on problems that no judging row is about."""
    from reasonrl.stepwise import write_rows
    from reasonrl.tasks import make_task

    task = make_task("arithmetic", seed=seed, **OPTIONS)
    problems = task.problems("train", 20000, 1500)
    write_rows(path, [{"prompt": p.prompt, "worked": task.worked(p)} for p in problems])


def made(path: Path, words: list[str], printed: bool = False) -> None:
    """A file made by one command, unless it is there."""
    if path.exists():
        return
    command = [sys.executable, "-m", "reasonrl.cli", *words]
    if printed:
        out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        path.write_text(out)
    else:
        subprocess.run([*command, "--out", str(path)], check=True)


def run(out: Path, words: list[str]) -> dict:
    """One training run, unless it is finished: its evaluations, steps and processor seconds."""
    done = out / "measured.json"
    if done.exists():
        return json.loads(done.read_text())
    command = [sys.executable, "-m", "reasonrl.cli", *words, "--out", str(out)]
    if (out / "config.yaml").exists():
        command.append("--resume")
    load, began = os.getloadavg()[0], time.time()
    _, status, usage = os.wait4(subprocess.Popen(command).pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    names = ("step", "reward", "judge/accuracy", "judge/unparsable", "dpo/accuracy", "loss")
    names += ("completions/mean_length",)
    counts = out / "traces.json"
    row = {
        "command": " ".join(words),
        "seconds": round(time.time() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "load_before": round(load, 2),
        "evals": [
            {"step": r["step"], "accuracy": r["eval/accuracy"], "length": r["eval/mean_length"]}
            for r in lines(out / "evals.jsonl")
        ],
        "steps": [{k: r.get(k) for k in names} for r in lines(out / "metrics.jsonl")[9::10]],
        "traces": json.loads(counts.read_text())["counts"] if counts.exists() else None,
    }
    done.write_text(json.dumps(row))
    return row


def lines(path: Path) -> list[dict]:
    return [json.loads(s) for s in path.read_text().splitlines()] if path.exists() else []


def last(run: Path) -> Path:
    """The last checkpoint of a run."""
    return max(run.glob("checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))


def final(arm: dict) -> float:
    """Accuracy at the end of a run, in percent."""
    return 100 * (arm["accuracy"] if "accuracy" in arm else arm["evals"][-1]["accuracy"])


def interval(values: list[float]) -> str:
    """Mean and 95 % t-interval over seeds."""
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return f"{mean:+.1f} (one seed)"
    half = T95[n] * math.sqrt(sum((v - mean) ** 2 for v in values) / (n - 1)) / math.sqrt(n)
    return f"{mean:+.1f} ({mean - half:+.1f}..{mean + half:+.1f})"


def table(whole: dict) -> str:
    rows = whole["seeds"]
    arms = [arm for arm in ARMS if any(arm in row for row in rows)]
    more = {"dpo": "policy after DPO", "online": "policy after train libra"}
    later = [arm for arm in more if any(arm in row for row in rows)]
    heads = ["policy", *(more[arm] for arm in later)]
    lines = [
        "Percent right: judges (arm by arm) on held-out judged answers, half of them right;"
        f" the policy on {PROBLEMS} held-out problems. Greedy.",
        "",
        f"| seed | {' | '.join([*arms, *heads])} |",
        f"|{'---|' * (1 + len(arms) + len(heads))}",
    ]
    for row in rows:
        values = [f"{final(row[a]):.1f}" if a in row else "" for a in arms]
        values.append(f"{final(row['base']):.1f}")
        values += [f"{final(row[arm]):.1f}" if arm in row else "" for arm in later]
        lines.append(f"| {row['seed']} | {' | '.join(values)} |")
    lines += ["", "| difference | seeds | points, mean and 95 % t-interval |", "|---|---|---|"]
    policies = [("dpo", "base", "DPO on the judge's pairs over the policy")]
    policies.append(("online", "base", "train libra with the judge over the policy"))
    for a, b, what in [*PAIRS, *policies]:
        gaps = [final(row[a]) - final(row[b]) for row in rows if a in row and b in row]
        if gaps:
            lines.append(f"| {what} ({a} - {b}) | {len(gaps)} | {interval(gaps)} |")
    cpu = [sum(row[a]["cpu_seconds"] for a in (*arms, "base") if a in row) for row in rows]
    lines += [
        "",
        f"Training took {min(cpu):.0f} to {max(cpu):.0f} processor seconds a seed."
        f" Measured {whole['date']}, {whole['machine']}; other jobs were running.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
