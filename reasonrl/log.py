"""What a run writes about itself while it runs, one call a step.

    RUN/config.yaml                             the config, as it is now
    RUN/metrics.jsonl                           one JSON object a step
    RUN/evals.jsonl                             one JSON object an evaluation (step 0: before RL)
    RUN/cold_start.jsonl                        the same for the cold start's own steps
    RUN/completions/completions_00001.parquet   one row a completion, TRL's column names
    RUN/images/KEY.png                          pictures of its prompts that no file holds

Every line is flushed to the disk before the step ends, a table is never written again, and a step's
row holds the hash of its table ("completions/blake2b"). A number that JSON has not (NaN, infinity)
is written as null, its name listed under "nonfinite_metrics". A resumed run first drops a torn last
line and whatever lies beyond its checkpoint. Times come from `with log.phase("rollout"):`, which
adds up to "time/rollout" of the step. Only rank 0 writes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet
import torch

from reasonrl.checkpoint import FULL
from reasonrl.config import Config
from reasonrl.keys import refuse
from reasonrl.log_backends import backends
from reasonrl.log_view import View, view
from reasonrl.monitors import Live
from reasonrl.records import InputError
from reasonrl.watchdog import beat

COMPLETIONS = re.compile(r"completions_([0-9]{5,})\.parquet")
COLUMNS = {  # types that must not depend on what a step happens to hold
    "step": pyarrow.int64(),
    "prompt": pyarrow.string(),
    "completion": pyarrow.string(),
    "images": pyarrow.list_(pyarrow.string()),
    "answer": pyarrow.string(),
    "reward": pyarrow.float64(),
    "outcome": pyarrow.float64(),
    "advantage": pyarrow.float64(),
    "steps": pyarrow.list_(pyarrow.list_(pyarrow.int64())),
    "step_rewards": pyarrow.list_(pyarrow.float64()),
    "step_advantages": pyarrow.list_(pyarrow.float64()),
}


class RunLog:
    """The log of one run. resume_step: the step of the checkpoint it goes on from, 0 = none."""

    def __init__(
        self,
        out: str | Path,
        config: Config,
        *,
        quiet: bool = False,
        resume_step: int = 0,
        stream: IO[str] | None = None,
    ):
        self.out, self.config = Path(out), config
        ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.writes = not ranks or torch.distributed.get_rank() == 0
        self.times: dict[str, float] = {}
        self.logged = ""  # hash of the completions table of the step under way
        self.view: View = view(quiet or not self.writes, stream or sys.stdout)
        self.backends = []
        if not self.writes:
            return
        refuse(config.model_dump(mode="json"), "config")
        try:
            (self.out / "completions").mkdir(parents=True, exist_ok=True)
            replace_file(self.out / "config.yaml", config.to_yaml().encode())
            self._forget(resume_step)
        except OSError as error:
            raise unwritable(self.out, error) from None
        self.cold_ready = False
        self.live = Live(read_rows(self.out / "metrics.jsonl"))
        self.backends = backends(config, self.out)

    def _forget(self, step: int) -> None:
        """Drop what lies beyond a step; before the first one the whole past."""
        for name in ("metrics.jsonl", "evals.jsonl"):
            truncate_rows(self.out / name, step)
        for path in (self.out / "completions").iterdir():
            match = COMPLETIONS.fullmatch(path.name)
            if path.name.endswith(".tmp") or (match and int(match[1]) > step):
                path.unlink()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the step; calls of one name add up."""
        began = time.perf_counter()
        self.view.phase(name)
        beat()
        try:
            yield
        finally:
            beat()
            self.times[name] = self.times.get(name, 0.0) + time.perf_counter() - began

    def step(self, step: int, total: int, metrics: Mapping[str, Any], sample: str = "") -> None:
        """End step `step` of `total`: its row in metrics.jsonl, the backends, the terminal."""
        row = {"step": step, **metrics, **self._phase_times()}
        new = self.live.see(row) if self.writes else []
        if new:
            row["warnings"] = new
        if self.logged:
            row["completions/blake2b"], self.logged = self.logged, ""
        self._write("metrics.jsonl", row)
        for warning in new:
            self.note(f"warning at step {step}: {warning}")
        part = {"sft": "SFT", "dpo": "DPO"}.get(self.config.algorithm, "RL")
        self.view.step(part, step, total, row, sample)

    def cold_step(self, step: int, total: int, metrics: Mapping[str, Any]) -> None:
        """The same for a step of the cold start, in a file of its own."""
        row = {"step": step, **metrics, **self._phase_times()}
        if self.writes and not self.cold_ready:
            truncate_rows(self.out / "cold_start.jsonl", step - 1)
            self.cold_ready = True
        self._write("cold_start.jsonl", row, to_backends=False)
        self.view.step("cold start", step, total, row, "")

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """One row in evals.jsonl, step 0 = before RL; the step's own row carries it too."""
        self._write("evals.jsonl", {"step": step, **metrics}, to_backends=False)
        self.view.evaluation(step, metrics)

    def completions(self, step: int, columns: Mapping[str, Sequence[Any]]) -> None:
        """Write the completions of a step: equal-length columns by TRL's names, see COLUMNS. The
        step's row will hold the file's hash."""
        if not self.writes:
            return
        arrays = {name: _column(name, values) for name, values in columns.items()}
        written = io.BytesIO()
        pyarrow.parquet.write_table(pyarrow.table(arrays), written, write_page_checksum=True)
        self.logged = digest(written.getvalue())
        path = self.out / "completions" / f"completions_{step:05d}.parquet"
        try:  # flushed: a checkpoint of this step must not outlive its rows
            replace_file(path, written.getvalue())
        except OSError as error:
            raise unwritable(path, error) from None

    def pictures(self, drawn: Mapping[str, Any]) -> None:
        """Keep pictures that no file holds, by their name in the run; each is drawn once."""
        for name, picture in drawn.items():
            path = self.out / name
            if not self.writes or path.exists():
                continue
            aside = path.with_suffix(".tmp")
            try:
                path.parent.mkdir(exist_ok=True)
                picture.draw().save(aside, "PNG")
                os.replace(aside, path)
            except OSError as error:
                raise unwritable(path, error) from None

    def note(self, text: str) -> None:
        """A line for whoever watches the run."""
        self.view.note(text)

    def close(self, complete: bool = True) -> None:
        self.view.close(complete, self.out)
        for backend in self.backends:
            backend.close()
        self.backends = []

    def _phase_times(self) -> dict[str, float]:
        times = {f"time/{name}": seconds for name, seconds in self.times.items()}
        self.times = {}
        return times

    def _write(self, name: str, row: dict[str, Any], to_backends: bool = True) -> None:
        if not self.writes:
            return
        clean = json_row(row)
        try:
            with (self.out / name).open("ab") as file:
                file.write(json.dumps(clean, allow_nan=False).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise unwritable(self.out / name, error) from None
        numbers = {k: v for k, v in clean.items() if type(v) in (int, float) and k != "step"}
        for backend in self.backends if to_backends else ():
            backend.log(row["step"], numbers)


def digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as JSON values: tensors and NumPy scalars as numbers, the non-finite null and named."""
    clean: dict[str, Any] = {}
    lost = []
    for key, value in row.items():
        plain = value.item() if hasattr(value, "item") else value
        if isinstance(plain, float) and not math.isfinite(plain):
            lost.append(key)
            plain = None
        clean[key] = plain
    return clean | ({"nonfinite_metrics": lost} if lost else {})


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a metrics file; a torn last line is left out, damage elsewhere an InputError."""
    try:
        rows, bad = whole_rows(Path(path).read_bytes())
    except FileNotFoundError:
        return []
    if bad:
        raise InputError(f"{path}: row {bad[0]}: expected a JSON object with a step")
    return rows


def whole_rows(data: bytes) -> tuple[list[dict[str, Any]], list[int]]:
    """The rows of a metrics file, and the numbers of the lines that hold none; a torn last line is
    only left out, its writer was killed inside it or still writes."""
    rows, bad = [], []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError):
            row = ()
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
        elif row is not None and number < len(lines):
            bad.append(number)
    return rows, bad


def truncate_rows(path: Path, step: int) -> None:
    """Keep the rows up to a step; up to step 0 none, since nothing is done yet."""
    if path.exists():
        rows = [row for row in read_rows(path) if 0 < step and row["step"] <= step]
        replace_file(path, b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def replace_file(path: Path, data: bytes) -> None:
    """Write a file so that at every moment the old or the new content is there."""
    aside = path.with_name(f"{path.name}.tmp")
    with aside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def _column(name: str, values: Sequence[Any]) -> pyarrow.Array:
    kind = COLUMNS.get(name)
    if kind is None and all(v is None or isinstance(v, int | float) for v in values):
        kind = None if all(isinstance(v, bool) for v in values) else pyarrow.float64()
    clean = [v.encode("utf-8", "replace").decode() if isinstance(v, str) else v for v in values]
    return pyarrow.array(clean, kind)


def unwritable(path: Path, error: OSError) -> InputError:
    hint = "; make room, then go on with --resume" if error.errno in FULL else ""
    return InputError(f"{path}: cannot be written ({error.strerror or error}){hint}")
