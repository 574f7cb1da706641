"""Best of 16 by the reward model that PRIME learned, beside majority vote, one completion, any.

    python recipes/prime/best_of_n.py --seeds 1 2 3      (behind measure.py, whose runs it reads)

A seed: the cold-started policy writes 16 completions of each of 500 held-out test problems, and
an implicit reward model chooses: by the sum of its token rewards (the log-odds of a right answer),
by the smallest sum of a step, and by the last step's. `alone`: it learned in 30 steps of PRIME in
which the policy stood still (a learning rate too small to move a weight, no filter), so from the
completions of the policy whose completions it now chooses among. `in PRIME`: it is that of the
seed's PRIME run, which has followed the policy elsewhere. For comparison the policy that outcome-
only RL made of the same start stands in for it: its log-ratio to the start is an implicit reward,
too. Finished seeds are not run again. Writes best_of_n.json and best_of_n.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from measure import HERE, about, interval, run

from reasonrl import models, ops
from reasonrl.config import load
from reasonrl.curves import Candidate, candidate, curves
from reasonrl.prompts import render
from reasonrl.records import Rollout
from reasonrl.rewards.implicit import ImplicitPRM
from reasonrl.rollout import Sampling, sample
from reasonrl.segment import token_steps
from reasonrl.tasks import Task, make_task

PROBLEMS, N, ROWS = 500, 16, 256
ALONE = ("learning_rate=1e-12", "filter.high=1.0", "steps=30", "eval_problems=0")
SCORERS = {
    "reward model, alone": ("PRIME-alone-{}/checkpoint-30/prm", ("sum", "min", "last")),
    "reward model, in PRIME": ("PRIME-1e-4-{}/checkpoint-30/prm", ("sum", "min", "last")),
    "policy of outcome-only RL": ("outcome-1e-4-{}/checkpoint-60", ("sum",)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(1, 11)))
    parser.add_argument("--runs", type=Path, default=Path("runs/prime"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    whole = {"seeds": [seed_of(seed, options.runs) for seed in options.seeds]} | about()
    (HERE / "best_of_n.json").write_text(json.dumps(whole, indent=1) + "\n")
    (HERE / "best_of_n.md").write_text(table(whole))
    print(table(whole))


def seed_of(seed: int, runs: Path) -> dict:
    """How often every way of choosing is right, by number of completions; kept in the runs."""
    done = runs / f"best-of-{N}-{seed}.json"
    if done.exists():
        return json.loads(done.read_text())
    base = runs / f"base-{seed}" / "checkpoint-0"
    words = [f"model={base}", "cold_start_steps=0", f"seed={seed}", "threads=1", *ALONE]
    run(runs / f"PRIME-alone-{seed}", [*words, "log.completions_every=0"])
    config = load("prime_guesses")
    task = make_task(config.task, seed=seed, **config.task_options)
    start = models.load(str(base))
    problems = task.problems("test", 0, PROBLEMS)
    prompts = [render(start.tokenizer, p.prompt) for p in problems]
    sampling = Sampling(config.max_completion_length)
    rollout = sample(start, problems, prompts, N, sampling, seed, ROWS)
    right: dict[str, list[float]] = {}
    for name, (folder, hows) in SCORERS.items():
        model = models.load(str(runs / folder.format(seed)))
        scorer = ImplicitPRM(model, start, beta=config.algo["beta"], tokens=config.batch.tokens)
        found = curves(candidates(task, rollout, scorer), hows, hows[0])
        for way, points in found["curves"].items():
            key = f"{name}: {way[4:]}" if way.startswith("prm_") else way
            if way != "weighted":  # votes by log-odds, which may be negative, mean nothing
                right[key] = [round(point["accuracy"], 4) for point in points]
    row = {"seed": seed, "n": found["n"], "right": right}
    done.write_text(json.dumps(row))
    return row


def candidates(task: Task, rollout: Rollout, scorer: ImplicitPRM) -> list[list[Candidate]]:
    """The completions of every problem, with the sum of token rewards of each of their steps."""
    rewards, groups = scorer(rollout), [[] for _ in rollout.problems]
    assert rewards.token is not None
    for b, g in enumerate(rollout.group.tolist()):
        problem, text = rollout.problems[g], rollout.text[b]
        steps = task.steps(problem, text) or []
        place = torch.tensor(token_steps(steps, rollout.pieces[b]), dtype=torch.long)
        sums = ops.step_reduce(rewards.token[b], place, len(steps)).tolist()
        right = task.grade(problem, text).value == 1.0
        groups[g].append(candidate(text, right, sums, float(rewards.token[b].sum())))
    return groups


def table(whole: dict) -> str:
    seeds = whole["seeds"]
    first = seeds[0]
    heads = ["chosen by", *(f"N = {n}" for n in first["n"]), f"at {N}, minus majority"]
    lines = [
        f"{PROBLEMS} held-out test problems a seed, {N} completions each by the cold-started"
        " policy; shares right, in percent,",
        f"means over {len(seeds)} seeds; last column: minus majority vote at {N}, paired by seed,"
        " 95 % t-interval.",
        "",
        f"| {' | '.join(heads)} |",
        "|---|" + "---|" * (len(heads) - 1),
    ]
    for way in first["right"]:
        columns = zip(*(row["right"][way] for row in seeds), strict=True)
        cells = " | ".join(f"{100 * sum(c) / len(c):.1f}" for c in columns)
        gaps = [row["right"][way][-1] - row["right"]["majority"][-1] for row in seeds]
        lines.append(f"| {way} | {cells} | {'' if way == 'majority' else interval(gaps)} |")
    shown = [way for way in first["right"] if not way.endswith(": last")]
    lines += ["", f"| seed, N = {N} | {' | '.join(shown)} |", "|---|" + "---|" * len(shown)]
    for row in seeds:
        cells = " | ".join(f"{100 * row['right'][way][-1]:.1f}" for way in shown)
        lines.append(f"| {row['seed']} | {cells} |")
    return "\n".join([*lines, "", f"Measured {whole['date']}, {whole['machine']}."]) + "\n"


if __name__ == "__main__":
    main()
