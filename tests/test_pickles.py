"""Files that would run code where somebody unpickles them: 40 pickles (ways to reach a function,
protocols, wrappers), one after the other in every place where a file is read. Each is an InputError
and runs nothing; that they would run is shown first, in a process of its own.
"""

from __future__ import annotations

import base64
import builtins
import bz2
import codecs
import io
import json
import lzma
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy
import pyarrow
import pyarrow.parquet
import pytest
import torch

from reasonrl import checkpoint, models, prm, prm_heads, rows
from reasonrl.chat.cache import Cache
from reasonrl.config import read
from reasonrl.encoder import Encoder
from reasonrl.log import read_rows
from reasonrl.records import InputError
from reasonrl.report.gather import read_table
from reasonrl.state_file import load_state, save_state


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function, *given, state=None):
        self.made = (function, given) if state is None else (function, given, state)

    def __reduce__(self):
        return self.made


def bombs(mark: str) -> dict[str, bytes]:
    """40 pickles that make the file `mark` (or would, were they read)."""
    touch, code = f"touch '{mark}'", f"open({mark!r}, 'w').close()"
    calls = {
        "os.system": Call(os.system, touch),
        "os.popen": Call(os.popen, touch),
        "subprocess.call": Call(subprocess.call, ["touch", mark]),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", mark]),
        "subprocess.check_output": Call(subprocess.check_output, ["touch", mark]),
        "exec": Call(builtins.exec, code),
        "eval": Call(builtins.eval, f"open({mark!r}, 'w').close()"),
        "open": Call(builtins.open, mark, "w"),
        "io.open": Call(io.open, mark, "w"),
        "io.FileIO": Call(io.FileIO, mark, "w"),
        "Path.touch": Call(Path.touch, Path(mark)),
        "Path.write_text": Call(Path.write_text, Path(mark), "x"),
        "os.mkdir": Call(os.mkdir, mark),
        "os.mknod": Call(os.mknod, mark),
        "os.symlink": Call(os.symlink, "/", mark),
        "shutil.copy": Call(shutil.copy, "/etc/hostname", mark),
        "codecs.open": Call(codecs.open, mark, "w"),
        "bz2.open": Call(bz2.BZ2File, mark, "w"),
        "lzma.open": Call(lzma.LZMAFile, mark, "w"),
        "zipfile": Call(zipfile.ZipFile, mark, "w"),
        "tarfile": Call(tarfile.open, mark, "w"),
        "numpy.save": Call(numpy.save, mark, 1),
        "torch.save": Call(torch.save, 1, mark),
        "compile, exec": Call(builtins.exec, Call(builtins.compile, code, "x", "exec")),
        "a state that is set": Call(dict, state=Call(os.system, touch)),
        "in a list": [1, [2, Call(os.system, touch)]],
        "in a key": {("a", 1): Call(os.system, touch)},
        "in a tensor's place": {"model.embed_tokens.weight": Call(os.system, touch)},
        "twice pickled": Call(pickle.loads, pickle.dumps(Call(os.system, touch))),
    }
    made = {name: pickle.dumps(value, 2) for name, value in calls.items()}
    plain = calls["os.system"]
    made |= {f"protocol {n}": pickle.dumps(plain, n) for n in (0, 1, 3, 4, 5)}
    made["by hand"] = b"cos\nsystem\n(S'touch " + mark.encode() + b"'\ntR."
    made["an instance"] = b"(S'touch " + mark.encode() + b"'\nios\nsystem\n."
    raw = f"touch {mark}".encode()
    made["stack global"] = (
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([len(raw)]) + raw + b"\x85R."
        if len(raw) < 256
        else made["by hand"]
    )
    whole = io.BytesIO()
    torch.save({"weight": torch.ones(2), "more": plain}, whole)
    made["torch.save"] = whole.getvalue()
    legacy = io.BytesIO()
    torch.save({"more": plain}, legacy, _use_new_zipfile_serialization=False)
    made["torch.save, legacy"] = legacy.getvalue()
    array = io.BytesIO()
    numpy.save(array, numpy.array([plain], dtype=object), allow_pickle=True)
    made["npy of objects"] = array.getvalue()
    made["compressed"] = zlib.compress(made["by hand"])
    return made


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    models.load("tiny", width=32, layers=1, heads=2).save(folder)
    return folder


def test_the_pickles_are_40_and_do_what_they_say(tmp_path):
    """Read with pickle itself in a process of its own, they leave their mark."""
    code = "import pickle, sys, numpy, torch\npickle.loads(bytes.fromhex(sys.stdin.read()))"
    asleep = {"torch.save", "torch.save, legacy", "npy of objects", "compressed"}
    names = list(bombs(str(tmp_path / "x")))
    assert len(names) >= 40
    forms = {
        "torch.save": "import io; torch.load(io.BytesIO(data), weights_only=False)",
        "torch.save, legacy": "import io; torch.load(io.BytesIO(data), weights_only=False)",
        "npy of objects": "import io; numpy.load(io.BytesIO(data), allow_pickle=True)",
        "compressed": "import zlib; pickle.loads(zlib.decompress(data))",
    }
    assert set(forms) == asleep
    script = [code.split("\n")[0], "for line in sys.stdin:"]
    script += ["    name, data = line.rstrip().split('|'); data = bytes.fromhex(data)", "    try:"]
    script += [f"        pickle.loads(data) if name not in {asleep!r} else None"]
    for name, how in forms.items():
        script += [f"        if name == {name!r}:", f"            {how}"]
    script += ["    except Exception as error:", "        print(name, repr(error))"]
    lines = []
    for at, name in enumerate(names):
        mark = tmp_path / f"ran-{at}"
        lines.append(f"{name}|{bombs(str(mark))[name].hex()}")
    run = [sys.executable, "-c", "\n".join(script)]
    done = subprocess.run(run, input="\n".join(lines), capture_output=True, text=True)
    ran = {p.name.removesuffix(".npy") for p in tmp_path.glob("ran-*")}
    missing = [name for at, name in enumerate(names) if f"ran-{at}" not in ran]
    assert missing == [], done.stdout + done.stderr


def places(folder: Path, model: Path, data: bytes):
    """(name, a call that reads the bytes) for every place where a file is read."""

    def written(name: str) -> Path:
        path = folder / name
        path.write_bytes(data)
        return path

    save_state(folder / "json", {"a": torch.ones(2)})
    save_state(folder / "tensors", {"a": torch.ones(2)})
    written("json.json")
    written("tensors.safetensors")
    yield "state", lambda: load_state(folder / "json")
    yield "state's tensors", lambda: load_state(folder / "tensors")
    inner = {"array": ["|O", [1], base64.b64encode(data).decode()]}
    save_state(folder / "array", 1)
    (folder / "array.json").write_text(json.dumps(inner))
    yield "state's array of objects", lambda: load_state(folder / "array")
    (folder / "run/checkpoint-1").mkdir(parents=True)
    written("run/checkpoint-1/manifest.json")
    yield "manifest", lambda: checkpoint.load(folder / "run/checkpoint-1")
    yield "resume", lambda: checkpoint.latest_verified(folder / "run")
    (folder / "metrics.jsonl").write_bytes(data + b"\n")
    yield "metrics", lambda: read_rows(folder / "metrics.jsonl")
    for end in ("jsonl", "json", "parquet"):
        yield f"rows.{end}", partial(rows.read_rows, written(f"rows.{end}"))
    yield "completions", partial(read_table, written("completions.parquet"))
    yield "config", partial(read, written("config.yaml"))
    for name in ("model.safetensors", "tokenizer.json", "config.json", "tokenizer_config.json"):
        yield name, partial(models.load, str(replaced(model, folder, name, data)))
    stale = replaced(model, folder, "pytorch_model.bin", data)
    (stale / "model.safetensors").rename(stale / "other.safetensors")
    yield "pytorch_model.bin beside other tensors", lambda: models.load(str(stale))
    bare = replaced(model, folder, "adapter_model.bin", data)
    (bare / "model.safetensors").unlink()
    shutil.copy(bare / "adapter_model.bin", bare / "pytorch_model.bin")
    yield "pytorch_model.bin", lambda: models.load(str(bare))
    yield "encoder", lambda: Encoder.load(str(bare), None)  # type: ignore[arg-type]
    yield "published reward model", lambda: prm_heads.load(bare, pair=("1", "2"))
    headed = replaced(model, folder, "prm.json", data)
    yield "reward model", lambda: prm_heads.load(headed)
    broken = replaced(model, folder, prm.HEADS, data)
    about = {"format": 1, "kind": "sigmoid", "separator": None, "end": None, "delimiter": "\n"}
    (broken / "prm.json").write_text(json.dumps(about))
    yield "reward model's head", lambda: prm_heads.load(broken)


def replaced(model: Path, folder: Path, name: str, data: bytes) -> Path:
    """A copy of the model's folder in which one file is the bytes."""
    copy = folder / f"model with {name}"
    shutil.copytree(model, copy)
    (copy / name).write_bytes(data)
    return copy


def refused(call, where: str) -> None:
    try:
        call()
    except InputError:
        return
    raise AssertionError(f"{where}: read without an InputError")


@pytest.mark.parametrize("name", bombs("/nowhere"))
def test_a_pickle_in_any_place_is_an_input_error_and_runs_nothing(name, model, tmp_path):
    mark = tmp_path / "ran"
    data = bombs(str(mark))[name]
    folder = tmp_path / "files"
    folder.mkdir()
    for where, call in places(folder, model, data):
        refused(call, where)
        assert not [p for p in tmp_path.iterdir() if p.name.startswith("ran")], where
    cache = Cache(folder / "kept")
    cache.put("ab" * 24, "x")
    next((folder / "kept").rglob("*.json")).write_bytes(data)
    assert cache.get("ab" * 24) is None


def test_pickles_in_columns_stay_bytes(tmp_path):
    data = list(bombs(str(tmp_path / "ran")).values())
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": pyarrow.array(data, "binary")}), path)
    assert [row["prompt"] for _, row in rows.read_rows(path)] == data
    assert [row["prompt"] for row in read_table(path)] == data
    assert not (tmp_path / "ran").exists()
