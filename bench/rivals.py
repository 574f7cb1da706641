"""Other libraries' code for the same work, where it is installed; never copied into this tree.

`make bench` puts the two whose own pins clash (verl, cut-cross-entropy) without their dependencies
into a folder of the environment, `hosts`; single files are loaded from there.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

FOLDER = Path(sys.prefix) / "hosts"


@cache
def module(name: str) -> ModuleType | None:
    """An installed package's module, or None."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


@cache
def from_file(path: str) -> ModuleType | None:
    """One file of a package in the rivals' folder, without the package around it; or None."""
    file = FOLDER / path
    if not file.exists():
        return None
    spec = importlib.util.spec_from_file_location(f"rival_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


@cache
def cut_cross_entropy() -> ModuleType | None:
    if not (FOLDER / "cut_cross_entropy").exists():
        return None
    sys.path.append(str(FOLDER))
    try:
        return module("cut_cross_entropy")
    finally:
        sys.path.remove(str(FOLDER))


def verl_linear() -> ModuleType | None:
    return from_file("verl/utils/experimental/torch_functional.py")


def liger() -> ModuleType | None:
    return module("liger_kernel.chunked_loss.grpo_loss")


def trl() -> ModuleType | None:
    return module("trl.trainer.utils")


def missing() -> list[str]:
    known = {
        "trl": trl(),
        "liger-kernel": liger(),
        "verl": verl_linear(),
        "cut-cross-entropy": cut_cross_entropy(),
    }
    return [name for name, found in known.items() if found is None]
