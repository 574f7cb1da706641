"""`python -m bench memory`: what `reasonrl plan` says against what a process really takes.

A fresh process a case: the step of bench/step_ours.py (rollout, then the update, AdamW's state in
place), its peak of resident memory in each phase above what stood before its model was built, with
a small step done before (libraries load at their first use). Only on Linux, where a peak can be set
back. The CPU's attention of short rows keeps its scores: `--attention plain` of the plan.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.machine import high_water, machine, reset_high_water, resident, settle
from reasonrl import smollm2

MIB = 1 << 20


@dataclass(frozen=True)
class Case:
    model: str
    dtype: str
    prompts: int
    group: int
    prompt_tokens: int
    tokens: int
    batch: int = 8192  # bench/step_ours.py's

    @property
    def name(self) -> str:
        size = f"{self.prompts} x {self.group} x {self.tokens} + {self.prompt_tokens}"
        return f"{self.model}, {self.dtype}, {size}"


CASES = (
    Case("tiny", "fp32", 8, 16, 64, 192),
    Case("tiny", "bf16", 8, 16, 64, 192),
    Case("smollm2", "fp32", 4, 8, 64, 64),
    Case("smollm2", "bf16", 4, 8, 64, 64),
)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__)
    parser.add_argument("--case", type=int, help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--model", choices=["tiny", "smollm2"], help="only its cases")
    parser.add_argument("--out", type=Path, help="JSON to write")
    options = parser.parse_args(arguments)
    if options.case is not None:
        print(json.dumps(measure(CASES[options.case])))
        return 0
    if not Path("/proc/self/clear_refs").exists():
        print("bench memory: needs Linux (/proc/self/clear_refs)", file=sys.stderr)
        return 2
    rows = []
    print("| case | phase | measured, MiB | planned, MiB | planned / measured |")
    print("|---|---|---|---|---|")
    for i, case in enumerate(CASES):
        if options.model not in (None, case.model):
            continue
        if case.model == "smollm2" and not list(smollm2.cache_dir().glob("smollm2-*/config.json")):
            print(f"| {case.name} | | not in the cache: `reasonrl fetch-model smollm2` | | |")
            continue
        command = [sys.executable, "-m", "bench", "memory", "--case", str(i)]
        root = Path(__file__).resolve().parent.parent
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=root)
        found, expected = json.loads(done.stdout.splitlines()[-1]), planned(case)
        for phase, size in found.items():
            ratio = expected[phase] / size
            line = f"{size:.0f} | {expected[phase]:.0f} | {ratio:.2f}"
            print(f"| {case.name} | {phase} | {line} |", flush=True)
            rows.append(
                {"case": case.name, "phase": phase, "measured": size, "planned": expected[phase]}
            )
    if options.out:
        record = {"machine": machine(), "unit": "MiB", "rows": rows}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def planned(case: Case) -> dict[str, float]:
    """The plan's phases in MiB."""
    from reasonrl.plan import Job, plan
    from reasonrl.plan_shapes import shape_of

    job = Job(
        gpus=1,
        group=case.group,
        prompts_per_step=case.prompts,
        prompt=case.prompt_tokens,
        completion=case.tokens,
        batch_tokens=case.batch,
        precision="fp32" if case.dtype == "fp32" else "mixed",
        attention="plain",
    )
    found = plan(shape_of(case.model), job)
    return {phase: found.phase(phase) / MIB for phase in ("rollout", "update")}


def measure(case: Case) -> dict[str, float]:
    """Peak MiB of each phase of the second step, above this process before its model."""
    from bench.step_ours import RATE, Ours, Settings
    from reasonrl.rollout import Sampling

    settings = Settings(
        case.model, case.prompts, case.group, case.tokens, case.prompt_tokens, repeats=1, threads=1
    )
    Ours(Settings("tiny", 1, 2, 8, 8, repeats=1), case.dtype).step(0)
    settle()
    before = resident()
    side = Ours(settings, case.dtype)
    side.step(0)  # AdamW's state
    settle()
    reset_high_water()
    size, problems = side.settings, side.problems[case.prompts :]
    rollout = side.algo.rollout(problems, size.group, Sampling(size.tokens), 1)
    peaks = {"rollout": float(high_water() - before)}
    advantage = side.algo.advantage(side.algo.score(rollout), rollout)
    settle()
    reset_high_water()
    side.learner.step(rollout, advantage, side.spec, RATE)
    return peaks | {"update": float(high_water() - before)}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
