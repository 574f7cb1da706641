"""The learned thinking reward model: how well it tells right thinking from wrong, and RL with it.

    python recipes/sophia/judge.py --seeds 1

A seed: measure.py's cold-started policy; from it the stages `trm-data` and `trm` of the recipe, and
for --control `trm` once more on the same pairs without the workings ("at once": a number and
nothing else). The models score the thinking of held-out pictures, 8 completions each that the
cold-started policy draws, against the task's rule: the share of exact scores, the correlation over
all completions and within a picture's group (each group's mean taken off), and of pairs of a group
whose rule scores differ the share that is ordered alike (a tie is a half). RL with the first is
measure.py's arm "thinking, trust, annealed"; then it scores what the policy writes that has learned
from it. Finished parts are not done again. Writes judge.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import torch
from measure import ALPHA, HERE, RL, SHARED, STEPS, base, last, read, rounded, run, run_arm

from reasonrl import checkpoint, models
from reasonrl import config as configs
from reasonrl.algos.sophia import find_scorer
from reasonrl.prompts import render
from reasonrl.records import Rollout
from reasonrl.rewards.thinking import by_rule, reply_text
from reasonrl.rollout import Sampling, sample
from reasonrl.stepwise import write_rows
from reasonrl.tasks import make_task

PICTURES, GROUP = 200, 8  # held out, of the split that nobody trains or is tested on
ARM = "thinking, trust, annealed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--control", type=int, nargs="*", default=[1], help="of these seeds")
    parser.add_argument("--runs", type=Path, default=Path("runs/sophia-measure"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole = {
        "pictures": PICTURES,
        "completions": PICTURES * GROUP,
        "seeds": [of_seed(options.runs, seed, seed in options.control) for seed in options.seeds],
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs, no GPU, one thread a run",
        "versions": {n: version(n) for n in ("reasonrl", "torch", "transformers")},
    }
    (HERE / "judge.json").write_text(json.dumps(rounded(whole)) + "\n")
    print(json.dumps(rounded(whole["seeds"]), indent=1))


def of_seed(runs: Path, seed: int, control: bool) -> dict:
    base(runs, seed)
    out, start = runs / f"judge-{seed}", runs / f"base-{seed}/checkpoint-0"
    own = [f"model={start}", "cold_start_steps=0", f"seed={seed}", *SHARED]
    few = ["eval_problems=200", "eval.at_start=false"]
    stage(out, "trm-data", own)
    taught = stage(out, "trm", [*own, *few])
    words = [f"model={start}", f"seed={seed}", *RL, *SHARED, "log.completions_every=0"]
    algo = {"kind": "dr_grpo", "alpha": ALPHA, "scorer": str(reward_model(out))}
    learned = run(runs / f"learned-{seed}", ["sophia", *words, "algo=" + json.dumps(algo)])
    arms = {
        "plain GRPO": run_arm(runs, seed, "plain GRPO"),
        "learned reward model": learned,
        "the rule": run_arm(runs, seed, ARM),
    }
    found = {"working": taught | scores(start, reward_model(out), seed)}
    ended = runs / f"learned-{seed}/checkpoint-{STEPS}"
    found["working, policy after RL"] = scores(ended, reward_model(out), seed)
    if control:
        bare = runs / f"judge-at-once-{seed}"
        without_working(out / "trm-data", bare / "trm-data", str(start))
        at_once = stage(bare, "trm", [*own, *few])
        found["at once"] = at_once | scores(start, reward_model(bare), seed)
    return {
        "seed": seed,
        "pairs": len(read(out / "trm-data/pairs.jsonl")),
        **found,
        "rl": arms,
        "ends": {
            arm: {name: last(row, name) for name in ("accuracy", "steps", "lucky")}
            for arm, row in arms.items()
        },
    }


def stage(out: Path, name: str, words: list[str]) -> dict:
    """A stage of the recipe, unless it is finished."""
    done = out / f"{name}.json"
    if not done.exists():
        command = [sys.executable, "-m", "reasonrl.cli", "train", "sophia", "--stage", name, *words]
        began, before = time.time(), os.times()
        subprocess.run([*command, "--out", str(out), "--resume", "--quiet"], check=True)
        spent = sum(os.times()[2:4]) - sum(before[2:4])
        evals = read(out / name / "evals.jsonl")
        row = {"seconds": round(time.time() - began, 1), "cpu_seconds": round(spent, 1)}
        done.write_text(json.dumps(row | {"evals": evals}))
    return json.loads(done.read_text())


def reward_model(out: Path) -> Path:
    found = checkpoint.latest_verified(out / "trm", clean=False)
    assert found is not None
    return found


def without_working(source: Path, target: Path, model: str) -> None:
    """The same pairs, each with its number alone for a reply."""
    target.mkdir(parents=True, exist_ok=True)
    shutil.copytree(source / "images", target / "images", dirs_exist_ok=True)
    words = models.load(model).tokenizer
    rows = read(source / "pairs.jsonl")
    bare = [row | {"worked": reply_text(words, row["score"])} for row in rows]
    write_rows(target / "pairs.jsonl", bare)


def scores(policy: Path, judge: Path, seed: int) -> dict:
    """How the reward model's scores of held-out thinking go with the rule's."""
    config = configs.load("sophia", [f"seed={seed}"])
    task = make_task(config.task, seed=seed, **config.task_options)
    rollout = drawn(str(policy), task, seed)
    asked = find_scorer(str(judge), task)
    pairs = zip(rollout.group.tolist(), by_rule(task)(rollout), asked(rollout), strict=True)
    known = [(g, rule.value, said.value) for g, rule, said in pairs if rule.value is not None]
    both = [(g, rule, said) for g, rule, said in known if said is not None]
    groups = [[(r, s) for h, r, s in both if h == g] for g in range(PICTURES)]
    apart = [pair for group in groups for pair in ordered(group)]
    return {
        "unscorable": len(known) - len(both),
        "exact": sum(abs(r - s) < 0.051 for _, r, s in both) / len(both),
        "correlation": correlation([(r, s) for _, r, s in both]),
        "within": correlation([pair for group in groups for pair in centred(group)]),
        "pairs_in_groups": len(apart),
        "ordered": sum(apart) / len(apart),
    }


def drawn(policy: str, task, seed: int) -> Rollout:
    writer = models.load(policy, dtype="fp32")
    problems = task.problems("dev", 0, PICTURES)
    prompts = [render(writer.tokenizer, p.prompt, images=1) for p in problems]
    return sample(writer, problems, prompts, GROUP, Sampling(40), seed)


def ordered(group: Sequence[tuple[float, float]]) -> Iterator[float]:
    """1 for every two that the rule and the model order alike, 0 where not, 0.5 for a tie."""
    for (r, s), (q, t) in combinations(group, 2):
        if r != q:
            yield 0.5 if s == t else float((r > q) == (s > t))


def centred(group: Sequence[tuple[float, float]]) -> Iterator[tuple[float, float]]:
    n = max(1, len(group))
    rule, said = (sum(pair[i] for pair in group) / n for i in (0, 1))
    return ((r - rule, s - said) for r, s in group)


def correlation(pairs: Sequence[tuple[float, float]]) -> float:
    middle = list(centred(pairs))
    up = sum(r * s for r, s in middle)
    down = math.sqrt(sum(r * r for r, _ in middle) * sum(s * s for _, s in middle))
    return up / down if down else 0.0


if __name__ == "__main__":
    main()
