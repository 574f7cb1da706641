"""A tiny PRIME run that is killed again and again at drawn moments: what it leaves is bit for bit
what an unbroken run leaves, nothing is lost on the way, and no completion is trained on twice.

The attempts are real `reasonrl train` commands, ended by SIGKILL before a drawn file operation,
flush or phase, in the middle of a write, or after a drawn time; tests/kill_server.py forks them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow.parquet
import pytest

from reasonrl.checkpoint import checkpoints, latest_verified
from reasonrl.log import read_rows
from reasonrl.tasks.base import Draws

SMALL = (
    "model_options={width: 32, layers: 1, heads: 2}",
    "task_options={terms: 2, ops: '+', mod: 5, low: 0, style: compact}",
    "steps=5",
    "cold_start_steps=60",
    "cold_start.batch=32",
    "cold_start.learning_rate=1e-2",
    "prompts_per_step=2",
    "group=4",
    "max_completion_length=12",
    "eval_problems=4",
    "eval.every=2",
    "save.every=1",
    "optim.schedule=constant",
    "threads=1",
    "seed=1",
)
KINDS = {
    "filter, replay, average": (
        "filter={low: 0.1, high: 0.9, rounds: 4}",
        "algo={prm_updates: 2, prm_replay: 2, prm_average: 0.9, process_warmup: 3}",
        "loss.kl_coef=0.01",
    ),
    "adapter, scores after the step": (
        "filter={low: 0, high: 1}",
        "algo={lora_rank: 2, order: double}",
        "save.keep=1",
    ),
    "the policy's own reference": (
        "filter={low: 0.1, high: 0.9, rounds: 2}",
        "algo={reference: policy}",
        "updates=2",
    ),
}
PATIENCE = 40  # kills of one run; then it may end in peace


class Server:
    """The warm process."""

    def __init__(self, *within: str) -> None:
        script = Path(__file__).parent / "kill_server.py"
        env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(
            [*within, sys.executable, script], stdin=pipe, stdout=pipe, env=env, text=True
        )

    def attempt(
        self, out: Path, kind: str, kill: dict | None, resume: bool, *words: str, log="", **more
    ) -> dict:
        """One `reasonrl train`, to its end or to its death."""
        arguments = ["train", "prime", *SMALL, *KINDS[kind], *words, "--out", str(out), "--quiet"]
        arguments += ["--resume"] if resume else []
        order = {"arguments": arguments, "folder": str(out), "kill": kill, **more}
        order["log"] = str(log or f"{out}.log")
        assert self.process.stdin and self.process.stdout
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait(60)


@pytest.fixture(scope="module")
def server():
    made = Server()
    yield made
    made.close()


def timeless(rows: list[dict]) -> list[dict]:
    return [
        {k: v for k, v in row.items() if k != "step_time" and not k.startswith("time/")}
        for row in rows
    ]


def tables(out: Path, last: int = 1 << 30) -> dict[str, list[dict]]:
    """The completions that a run has logged for its steps up to `last`."""
    files = sorted((out / "completions").glob("completions_*.parquet"))
    named = [f for f in files if int(f.stem.split("_")[1]) <= last]
    return {f.name: pyarrow.parquet.read_table(f).to_pylist() for f in named}


def left(out: Path) -> dict:
    """All that a finished run leaves, but for times."""
    files = {p.relative_to(out).as_posix(): p for p in sorted(out.rglob("*")) if p.is_file()}
    rows = {n: timeless(read_rows(p)) for n, p in files.items() if n.endswith(".jsonl")}
    raw = {n: p.read_bytes() for n, p in files.items() if n not in rows}
    return {"names": sorted(files), "rows": rows, "completions": tables(out), "files": raw}


def equal(found: dict, wanted: dict) -> None:
    assert found["names"] == wanted["names"], set(found["names"]) ^ set(wanted["names"])
    for part in ("rows", "completions", "files"):
        assert found[part].keys() == wanted[part].keys()
        differs = [name for name, value in wanted[part].items() if found[part][name] != value]
        assert not differs, part


def kept(out: Path, wanted: dict, before: int) -> int:
    """The step a killed run goes on from, -1 for none: never an earlier one than before, and every
    row up to it is there, once and as it must be."""
    path = latest_verified(out, clean=False)
    step = -1 if path is None else int(path.name.split("-")[1])
    assert step >= before
    for name in ("metrics.jsonl", "evals.jsonl"):
        rows = [row for row in read_rows(out / name) if row["step"] <= step]
        if step > 0:
            whole = [row for row in wanted["rows"][name] if row["step"] <= step]
            assert timeless(rows) == whole, name
    if step > 0:
        logged = tables(out, step)
        assert logged == {n: wanted["completions"][n] for n in logged} and len(logged) == step
    return step


def draw(draws: Draws, events: int) -> dict:
    """The next kill; `events`: of an unbroken run."""
    kind = draws.below(4)
    if kind == 0:
        return {"after": draws.below(600) / 1000}
    near = draws.below(3)  # early ones are many: a run that never gets on proves little
    at = 1 + draws.below(events if near == 0 else events // 3)
    return {"event": at, "torn": kind == 1}


def broken(server: Server, out: Path, kind: str, draws: Draws, wanted: dict, events: int):
    """A run killed until it is through; how many kills of which kind there were."""
    ends: Counter[str] = Counter()
    step = -1
    for tried in range(PATIENCE + 1):
        kill = draw(draws, events) if tried < PATIENCE else None
        resume = bool(checkpoints(out))
        end = server.attempt(out, kind, kill, resume)
        if end["status"] == 0:
            break
        assert end["status"] == -9, Path(f"{out}.log").read_text()
        ends["time" if "after" in kill else "torn" if kill["torn"] else "event"] += 1
        ends["before a checkpoint" if step < 0 else "after one"] += 1
        step = kept(out, wanted, step)
    equal(left(out), wanted)
    return ends


def proof(server: Server, folder: Path, kinds: list[str], kills: int) -> Counter[str]:
    """Runs of each kind in turn until there were so many kills."""
    draws, whole, ends = Draws("kill", kills), {}, Counter()
    while ends["time"] + ends["torn"] + ends["event"] < kills:
        kind = kinds[ends["runs"] % len(kinds)]
        if kind not in whole:
            out = folder / f"whole {kinds.index(kind)}"
            end = server.attempt(out, kind, None, False)
            assert end["status"] == 0, Path(f"{out}.log").read_text()
            whole[kind] = left(out), end["events"]
            once(whole[kind][0])
        out = folder / f"broken {ends['runs']}"
        ends += broken(server, out, kind, draws, *whole[kind])
        ends["runs"] += 1
        print(dict(ends))
        shutil.rmtree(out)
    return ends


def once(wanted: dict) -> None:
    """Completions are trained on once: no problem comes twice, no step is missing or empty."""
    rows = [row for table in wanted["completions"].values() for row in table]
    assert len({row["id"] for row in rows}) == len(rows)
    assert all(row["completions/blake2b"] for row in wanted["rows"]["metrics.jsonl"])
    groups = Counter(row["problem_id"] for row in rows)
    assert rows and set(groups.values()) == {4}
    assert [row["step"] for row in wanted["rows"]["metrics.jsonl"]] == [1, 2, 3, 4, 5]
    assert [row["step"] for row in wanted["rows"]["evals.jsonl"]] == [0, 2, 4, 5]
    live = [row["process/prm_grad_norm"] > 0 for row in wanted["rows"]["metrics.jsonl"]]
    assert sum(live) >= 2


def test_30_kills_and_the_run_is_the_unbroken_one(server, tmp_path):
    ends = proof(server, tmp_path, list(KINDS)[:1], 30)
    assert min(ends["time"], ends["torn"], ends["event"]) > 0


@pytest.mark.torture
def test_1000_kills_and_the_run_is_the_unbroken_one(server, tmp_path):
    proof(server, tmp_path, list(KINDS), 1000)


@pytest.mark.torture
def test_a_kill_before_every_event_of_a_run(server, tmp_path):
    """Every file operation and flush of every save, and all between them, none left out; torn
    where a file was opened for writing in every third."""
    kind, out = list(KINDS)[0], tmp_path / "whole"
    events = server.attempt(out, kind, None, False)["events"]
    wanted = left(out)
    for at in range(1, events + 1):
        out = tmp_path / f"{at}"
        kill = {"event": at, "torn": at % 3 == 0}
        assert server.attempt(out, kind, kill, False)["status"] == -9
        kept(out, wanted, -1)
        resume = bool(checkpoints(out))
        assert server.attempt(out, kind, None, resume)["status"] == 0, Path(f"{out}.log")
        equal(left(out), wanted)
        shutil.rmtree(out)
    print(f"{events} kills")
