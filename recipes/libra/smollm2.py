"""A judge made of SmolLM2-135M-Instruct before and after each stage, and what it is good for.

    python recipes/libra/smollm2.py --device cuda --jobs 3

A seed is one process: a policy learns arithmetic chains for a while and answers problems; its
judged answers, half of them right, train judges that all start from this policy. gold: judgements
by rule, few steps. sft: rejection sampling from gold, other reasoning mixed in. rl: GRPO on the
verdict from sft. plain: gold without thinking. dpo: the policy after DPO on pairs by the judge rl,
on prompts whose answers nobody gives. before: the instruct model itself, asked in English. What is
finished (RUNS/SEED/NAME.json) is not run again. Writes smollm2.json and smollm2.md of all that is
there; --only-read runs nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure import HERE, lines
from tables import interval

OPTIONS = {"terms": 4, "ops": "+-*", "mod": 10, "low": 0, "high": 9, "style": "compact"}
TASK = ["task=arithmetic", f"task_options={json.dumps(OPTIONS)}", "max_completion_length=24"]
COLD = ["steps=0", "cold_start_steps=32", "cold_start.batch=16", "cold_start.learning_rate=3e-4"]
JUDGE = ["max_completion_length=40", "dtype=bf16", "eval.at_start=false", "batch.tokens=3072"]
GOLD = ["steps=20", "prompts_per_step=32", "learning_rate=2e-4", "optim.warmup=4"]
SFT = ["steps=30", "prompts_per_step=32", "learning_rate=5e-5", "optim.warmup=3"]
RL = ["steps=40", "prompts_per_step=16", "group=8", "learning_rate=2e-5"]
DPO = ["steps=40", "prompts_per_step=16", "learning_rate=5e-6", "batch.tokens=3072"]
HELD, CASES, BENCH, NEW = 500, 800, 300, 400  # problems: the policy's, judged ones, DPO's
ASKED = 800  # rows that the judge of rejection sampling is asked about
HEADS = {
    "policy": "policy",
    "dpo": "policy after DPO",
    "before": "instruct model, thinking",
    "before_plain": "instruct model, none",
    "gold": "gold",
    "sft": "sft",
    "rl": "rl",
    "plain": "plain",
}
PAIRS = [
    ("gold", "before", "judgements by rule over the instruct model"),
    ("sft", "gold", "rejection sampling"),
    ("rl", "sft", "RL after it"),
    ("rl", "gold", "both stages"),
    ("gold", "plain", "thinking over none"),
    ("dpo", "policy", "DPO on the judge's pairs over the policy"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", type=Path, default=Path("runs/libra-smollm2"))
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--jobs", type=int, default=1, help="seeds at a time")
    parser.add_argument("--share", type=float, default=1.0, help="of the problems, to try it")
    parser.add_argument("--pace", type=float, default=1.0, help="of the stages' steps, likewise")
    parser.add_argument("--only-run", action="store_true", help="leave the tables alone")
    parser.add_argument("--only-read", action="store_true", help="tables of what is finished")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        Seed(options, options.seeds[0]).run()
        return
    if not options.only_read:
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(lambda seed: process(options, seed), options.seeds))
    if not options.only_run:
        write(options)


def process(options: argparse.Namespace, seed: int) -> None:
    command = [sys.executable, __file__, "--one", "--seeds", str(seed), "--device", options.device]
    command += ["--runs", str(options.runs), "--share", str(options.share)]
    command += ["--pace", str(options.pace)]
    subprocess.run(command, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})


class Seed:
    """All stages of one seed, one after the other; each leaves a model and a file of numbers."""

    def __init__(self, options: argparse.Namespace, seed: int):
        self.seed, self.device = seed, options.device
        self.share, self.pace = options.share, options.pace
        self.folder = options.runs / str(seed)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.words = [f"seed={seed}", f"device={options.device}", "threads=1"]
        self.words += ["log.completions_every=0", "eval.batch=256"]

    def run(self) -> None:
        self.stage("policy", self.policy)
        self.stage("data", self.data)
        self.stage("gold", lambda: self.judge("sft", "policy", GOLD))
        self.stage("sft", self.rejection)
        self.stage("rl", lambda: self.judge("rl", "sft", RL))
        self.stage("plain", lambda: self.judge("sft", "policy", GOLD, think=False))
        self.stage("dpo", self.dpo)
        self.stage("before", lambda: self.before(True))
        self.stage("before_plain", lambda: self.before(False))

    def stage(self, name: str, make: Callable[[], dict[str, Any]]) -> None:
        done = self.folder / f"{name}.json"
        if done.exists():
            return
        self.name, began, cpu = name, time.time(), time.process_time()
        shutil.rmtree(self.folder / name, ignore_errors=True)
        row = make() | {
            "seconds": round(time.time() - began, 1),
            "cpu_seconds": round(time.process_time() - cpu, 1),
            "where": where(),
        }
        half = done.with_suffix(".tmp")
        half.write_text(json.dumps(row) + "\n")
        half.rename(done)
        gc.collect()  # the stage's models and optimiser are in cycles

    def count(self, number: int) -> int:
        return max(8, round(number * self.share))

    def train(self, recipe: str, words: list[str]):
        """A finished run that leaves its model and no optimiser."""
        from reasonrl import config, train

        class Run(train.Run):
            def _save(self) -> None:
                self.saved = (self.cold, self.step)

        loaded = config.load(recipe, [*self.words, *words])
        loaded = config.changed(loaded, [f"steps={round(loaded.steps * self.pace)}"])
        run = Run(loaded, self.folder / self.name, resume=False, quiet=True)
        if not run.train():
            raise SystemExit("stopped before its end")
        run.algo.policy.save(self.folder / self.name / "model")
        return run

    def model(self, name: str) -> str:
        return str(self.folder / name / "model")

    def loaded(self, name: str):
        from reasonrl import models

        return models.load(name, dtype="bf16", device=self.device, seed=self.seed)

    def policy(self) -> dict[str, Any]:
        run = self.train("merf", ["algorithm=grpo", *TASK, *COLD, "eval_problems=0"])
        return {"accuracy": self.solved(run)}

    def solved(self, run) -> float:
        """Held-out problems that a policy gets right, greedily."""
        from reasonrl.algos import GRPO
        from reasonrl.evaluate import evaluate

        algo = GRPO(task(self.seed), run.algo.policy)
        return evaluate(algo, "test", self.count(HELD), 24, 256)[0]["eval/accuracy"]

    def data(self) -> dict[str, Any]:
        """Judged answers of the policy, and other reasoning on problems that none is about."""
        from reasonrl.judge_data import make_cases
        from reasonrl.rollout import Sampling
        from reasonrl.stepwise import write_rows

        policy, source = {"policy": self.loaded(self.model("policy"))}, task(self.seed)
        counts = {}
        for name, split, problems in (("train", "train", CASES), ("bench", "test", BENCH)):
            span = (split, 0, self.count(problems))
            rows = list(make_cases(policy, source, Sampling(24), span, 2, self.seed))
            write_rows(self.folder / f"{name}.jsonl", rows)
            counts[name] = len(rows)
        others = source.problems("train", 20000, self.count(400))
        rows = [{"prompt": p.prompt, "worked": source.worked(p)} for p in others]
        write_rows(self.folder / "mix.jsonl", rows)
        return {"counts": counts}

    def judge(
        self, stage: str, start: str, words: list[str], think: bool = True, traces: str = ""
    ) -> dict[str, Any]:
        """A judge trained from `start`, and how often it is right on the bench."""
        own = [f"task_options={json.dumps(self.judging(think, traces))}", *JUDGE, *words]
        run = self.train(f"judge_{stage}", [*own, f"model={self.model(start)}"])
        found = lines(self.folder / self.name / "evals.jsonl")[-1]
        names = ("step", "loss", "judge/accuracy", "judge/unparsable", "completions/mean_length")
        steps = lines(self.folder / self.name / "metrics.jsonl")
        return {
            "command": f"reasonrl train judge_{stage} {' '.join(own)}",
            "accuracy": found["eval/accuracy"],
            "rows": found["eval/problems"],
            "length": found["eval/mean_length"],
            "steps": [{k: row.get(k) for k in names} for row in steps[4::5]],
            "config": run.config.digest(),
        }

    def judging(self, think: bool, traces: str = "") -> dict[str, Any]:
        files = {"data": str(self.folder / "train.jsonl")}
        files["eval_file"] = str(self.folder / "bench.jsonl")
        return files | {"style": "compact", "think": think} | ({"traces": traces} if traces else {})

    def rejection(self) -> dict[str, Any]:
        """Judgements of gold that agree with the labels, other reasoning among them."""
        from reasonrl.judge_train import Sampled, mixed, traces
        from reasonrl.rollout import Sampling
        from reasonrl.stepwise import write_rows
        from reasonrl.tasks.judging import Judging

        judging = Judging(seed=self.seed, **self.judging(True))
        asked = judging.judgements()[: self.count(ASKED)]
        teacher = self.loaded(self.model("gold"))
        rows, counts = traces(teacher, judging, asked, Sampling(40), Sampled(seed=self.seed))
        rows = mixed(rows, self.folder / "mix.jsonl", 0.25, self.seed)
        path = self.folder / "traces.jsonl"
        write_rows(path, rows)
        return self.judge("sft", "gold", SFT, traces=str(path)) | {"traces": counts}

    def dpo(self) -> dict[str, Any]:
        """The policy after DPO on the pairs of the judge rl, and how many they were."""
        from reasonrl.judge_data import render
        from reasonrl.pairs import pairs
        from reasonrl.rewards.judge import Judge
        from reasonrl.rollout import Sampling, sample
        from reasonrl.stepwise import Trace, write_rows

        problems = task(self.seed).problems("train", 5000, self.count(NEW))
        policy = self.loaded(self.model("policy"))
        prompts = [render(policy.tokenizer, p.prompt) for p in problems]
        answers = sample(policy, problems, prompts, 6, Sampling(24), self.seed)
        judge = Judge(
            self.loaded(self.model("rl")), votes=2, max_tokens=40, style="compact", seed=self.seed
        )
        scores = [score.value for score in judge(answers).outcome]
        asked = [answers.problems[g] for g in answers.group.tolist()]
        rows = [Trace(p.id, p.prompt, [t]) for p, t in zip(asked, answers.text, strict=True)]
        made, path = pairs(rows, scores, 0.5), self.folder / "pairs.jsonl"
        write_rows(path, made)
        words = [f"task={path}", "task_options={dev: 0.0, test: 0.0}", "eval_problems=0", *DPO]
        run = self.train("dpo", [*words, f"model={self.model('policy')}"])
        steps = lines(self.folder / "dpo" / "metrics.jsonl")
        return {
            "accuracy": self.solved(run),
            "pairs": len(made),
            "dpo/accuracy": [row.get("dpo/accuracy") for row in steps],
        }

    def before(self, think: bool) -> dict[str, Any]:
        """The instruct model on the bench, asked in words; no clean verdict is not right."""
        from reasonrl.rewards.judge import Judge

        cases = lines(self.folder / "bench.jsonl")
        judge = Judge(
            self.loaded("smollm2"), max_tokens=160, temperature=0, think=think, seed=self.seed
        )
        found = judge.verdicts([c["question"] for c in cases], [c["response"] for c in cases])
        verdicts = [row[0] for row in found]
        right = sum(v == c["label"] for v, c in zip(verdicts, cases, strict=True))
        clean = sum(not isinstance(v, str) for v in verdicts)
        return {"accuracy": right / len(cases), "clean": clean / len(cases)}


def task(seed: int):
    from reasonrl.tasks import make_task

    return make_task("arithmetic", seed=seed, **OPTIONS)


def where() -> dict[str, Any]:
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, {card}, one thread a seed",
        "versions": {n: version(n) for n in ("torch", "transformers")},
    }


def write(options: argparse.Namespace) -> None:
    seeds = []
    for seed in options.seeds:
        places = {name: options.runs / str(seed) / f"{name}.json" for name in ("data", *HEADS)}
        rows = {name: json.loads(p.read_text()) for name, p in places.items() if p.exists()}
        if "policy" in rows:
            seeds.append({"seed": seed, **rows})
    if not seeds:
        raise SystemExit(f"{options.runs}: no seed's policy is finished")
    whole = {"seeds": seeds, **seeds[0]["policy"]["where"]}
    (HERE / "smollm2.json").write_text(json.dumps(whole) + "\n")
    (HERE / "smollm2.md").write_text(table(whole))
    print(table(whole))


def table(whole: dict[str, Any]) -> str:
    seeds = whole["seeds"]
    out = [
        "Percent right, greedy. Judges on held-out judged answers, half of them right (no clean"
        f" verdict is not right); the policy on {HELD} held-out problems.",
        "",
        f"| seed | {' | '.join(HEADS.values())} |",
        f"|{'---|' * (1 + len(HEADS))}",
    ]
    for row in seeds:
        cells = [f"{100 * row[n]['accuracy']:.1f}" if n in row else "" for n in HEADS]
        out.append(f"| {row['seed']} | {' | '.join(cells)} |")
    out += ["", "| difference | seeds | points, mean and 95 % t-interval |", "|---|---|---|"]
    for one, other, what in PAIRS:
        there = [row for row in seeds if one in row and other in row]
        gaps = [100 * (row[one]["accuracy"] - row[other]["accuracy"]) for row in there]
        if gaps:
            out.append(f"| {what} ({one} - {other}) | {len(gaps)} | {interval(gaps)} |")
    versions = ", ".join(f"{k} {v}" for k, v in whole["versions"].items())
    out += ["", f"Measured {whole['date']}, {whole['machine']}, {versions}."]
    return "\n".join(out) + "\n"


if __name__ == "__main__":
    main()
