"""Random and mutated bytes in place of every kind of file: a value or an InputError, never another
error. Weights, states, manifests, logs, tables, rows, configs and kept replies.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reasonrl import checkpoint, models, prm_heads, rows
from reasonrl.audit import audit
from reasonrl.chat.cache import Cache
from reasonrl.config import Config, read
from reasonrl.log import read_rows
from reasonrl.records import InputError
from reasonrl.report.gather import gather, read_table
from reasonrl.state_file import load_state, save_state

ROW = {"step": 1, "prompt": "1+1:", "completion": "2", "reward": 1.0, "steps": [[0, 1]]}
KEY = "ab" * 24
COUNTS = [100, pytest.param(2000, marks=pytest.mark.torture)]


def saved(folder: Path, name: str) -> Path:
    """A whole file of the kind."""
    path = folder / name
    if name.startswith("state"):
        tree = {"a": torch.ones(3), "b": [(1, b"x"), {2: float("nan")}]}
        save_state(folder / "state", tree)
    elif name.endswith("parquet"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROW, ROW]), path)
    elif name == "manifest.json":
        made = checkpoint.save(folder, 1, lambda at: (at / "x").write_bytes(b"x") and None, {})
        return made / name
    elif name == "config.yaml":
        path.write_text(Config().to_yaml())
    elif name == "kept.json":
        Cache(folder).put(KEY, "text")
        return next(folder.rglob("*.json"))
    elif name == "rows.json":
        path.write_text(json.dumps([ROW, ROW]))
    elif name.endswith("jsonl"):
        path.write_text(2 * (json.dumps(ROW) + "\n"))
    else:
        models.load("tiny", width=32, layers=1, heads=2).save(folder)
    return path


READERS: dict[str, Callable[[Path], object]] = {
    "state.json": lambda p: load_state(p.parent / "state"),
    "state.safetensors": lambda p: load_state(p.parent / "state"),
    "manifest.json": lambda p: checkpoint.latest_verified(p.parent.parent),
    "metrics.jsonl": read_rows,
    "rows.jsonl": rows.read_rows,
    "rows.json": rows.read_rows,
    "rows.parquet": rows.read_rows,
    "completions.parquet": read_table,
    "config.yaml": read,
    "kept.json": lambda p: Cache(p.parent.parent).get(KEY),
    "model.safetensors": lambda p: models.load(str(p.parent)),
    "tokenizer.json": lambda p: models.load(str(p.parent)),
    "config.json": lambda p: models.load(str(p.parent)),
    "tokenizer_config.json": lambda p: prm_heads.load(p.parent, separator="=", pair=("1", "2")),
}


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes changed, cut out, doubled or put in, most often near the beginning; or all of them."""
    if draw(st.integers(0, 5)) == 0:
        return draw(st.binary(max_size=80))
    out = bytearray(data)
    near = st.integers(0, min(len(data), 400)) | st.integers(0, len(data))
    for _ in range(draw(st.integers(1, 4))):
        at, size = min(draw(near), len(out)), draw(st.integers(0, 12))
        kind = draw(st.sampled_from(["change", "cut", "double", "put", "end"]))
        if kind == "change":
            out[at : at + size] = draw(st.binary(min_size=size, max_size=size))
        elif kind == "cut":
            del out[at : at + size]
        elif kind == "double":
            out[at:at] = out[at : at + size]
        elif kind == "end":
            del out[at:]
        else:
            words = [b"null", b"-1", b"1e999", b"[[[[", b'"', b"\xff", b"9" * 30, b"{}", b"true"]
            out[at:at] = draw(st.sampled_from(words))
    return bytes(out)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", READERS)
def test_damage_of_any_kind_is_an_input_error(name, count, tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    path = saved(folder, name)
    whole = path.read_bytes()
    READERS[name](path)
    logging.getLogger("reasonrl.checkpoint").disabled = True

    @settings(max_examples=count)
    @given(mutated(whole))
    def damaged(data: bytes) -> None:
        path.write_bytes(data)
        try:
            READERS[name](path)
        except InputError:
            pass

    try:
        damaged()
    finally:
        logging.getLogger("reasonrl.checkpoint").disabled = False


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("name", ["metrics.jsonl", "completions.parquet"])
def test_a_damaged_run_is_shown_and_audited_or_refused(name, count, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    (folder / "completions").mkdir()
    (folder / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    whole = saved(tmp_path_factory.mktemp("whole"), name).read_bytes()
    place = "completions/completions_00001.parquet" if "parquet" in name else name

    @settings(max_examples=count)
    @given(mutated(whole))
    def damaged(data: bytes) -> None:
        (folder / place).write_bytes(data)
        for look in (lambda: gather([folder]), lambda: audit(folder)):
            try:
                look()
            except InputError:
                pass

    damaged()
    shutil.rmtree(folder)
