"""Runs for the tests of the run page in browsers."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=\"alert('owned')\">"


def row(step, n, k, text="ab;cd", **more):
    right = float(k % 2)
    out = {"step": step, "problem_id": f"p{n}", "prompt": f"prompt {n}", "completion": text}
    out |= {"answer": "4", "reward": right, "outcome": right, "reward_kind": "scored"}
    out |= {"advantage": 0.5, "finished": True, "steps": [[0, 3], [3, 5]]}
    out |= {"step_rewards": [1.0, 0.25 if k != 2 else 0.9], "step_advantages": [0.5, -1.0]}
    out |= {"token_starts": [0, 2, 3, 5], "token_logps": [-0.5, -1.0, -2.0, -0.25]}
    out |= {"token_ratios": [1.0, 1.0, 1.4, 1.0], "token_clipped": [False, False, True, False]}
    return out | more


def table(run: Path, step: int, rows) -> None:
    file = run / "completions" / f"completions_{step:05d}.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file.with_suffix(".tmp"))
    file.with_suffix(".tmp").replace(file)


def line(run: Path, step: int, **more) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        values = {"step": step, "reward": step / 10, "time/rollout": 2.0, "time/update": 1.0}
        file.write(json.dumps(values | more) + "\n")


def made(run: Path) -> Path:
    """Three steps of three prompts with four completions each."""
    (run / "completions").mkdir(parents=True)
    (run / "config.yaml").write_text("model: tiny\n")
    for step in (1, 2, 3):
        line(run, step)
        table(run, step, [row(step, n, k) for n in range(3) for k in range(4)])
    return run
