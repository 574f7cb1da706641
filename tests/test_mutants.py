"""The mutation gate: every wrong kernel of mutants.py must make a test fail.

A mutant lives in a copy of the package made of links, with one file rewritten; the tests run
against it in a process of their own. All of them by `make torture`; a sample that changes with the
day otherwise.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def load():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tests" / "mutants.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.SPECIFICATION, module.TRITON, module.LAYERS


SPECIFICATION, TRITON, LAYERS = load()
TODAY = random.Random(datetime.date.today().toordinal())
ALL = [*SPECIFICATION, *TRITON, *LAYERS]


def planted(folder: Path, file: str, old: str, new: str) -> Path:
    """A package in which `file` holds the mutant and everything else is a link."""
    source = (ROOT / file).read_text()
    assert source.count(old) == 1, f"{file} holds {old!r} {source.count(old)} times"
    (folder / "reasonrl" / "kernels").mkdir(parents=True)
    for path in (ROOT / "reasonrl").iterdir():
        if path.name not in ("kernels", "__pycache__"):
            (folder / "reasonrl" / path.name).symlink_to(path)
    for path in (ROOT / "kernels").glob("*.py"):
        if path.name != Path(file).name:
            (folder / "reasonrl" / "kernels" / path.name).symlink_to(path)
    (folder / "reasonrl" / "kernels" / Path(file).name).write_text(source.replace(old, new))
    return folder


def caught(folder: Path, mutant: tuple) -> bool:
    _, file, old, new, *only = mutant
    where = planted(folder, file, old, new)
    names = (
        ["triton_layer_cases.py" if mutant in LAYERS else "triton_cases.py"]
        if only
        else ["test_loss.py", "test_advantage.py", "test_reference.py"]
    )
    chosen = only[0] if only else "not never_holds"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", chosen]
    command += ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    env = os.environ | {"PYTHONPATH": str(where), "OMP_NUM_THREADS": "1"}
    if only:  # numpy's products as test_triton.py has them
        env |= {"OPENBLAS_CORETYPE": "Prescott", "TRITON_INTERPRET": "1"}
    command += [str(ROOT / "tests" / name) for name in names]
    run = subprocess.run(command, env=env, cwd=where, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stdout[-3000:] + run.stderr[-3000:]
    return run.returncode == 1


def ids(mutant: tuple) -> str:
    return f"{Path(mutant[1]).stem}: {mutant[0]}"


def skip_without_triton(mutant: tuple, require) -> None:
    if len(mutant) > 4:
        found = importlib.util.find_spec("triton") is not None
        require("triton", None if found else "pip install triton")


@pytest.mark.parametrize("mutant", TODAY.sample(ALL, 8), ids=ids)
def test_a_sample_of_wrong_kernels_is_caught(mutant, tmp_path, require):
    skip_without_triton(mutant, require)
    assert caught(tmp_path, mutant)


@pytest.mark.torture
@pytest.mark.parametrize("mutant", ALL, ids=ids)
def test_every_wrong_kernel_is_caught(mutant, tmp_path, require):
    skip_without_triton(mutant, require)
    assert caught(tmp_path, mutant)


def test_the_right_kernels_are_not_caught(tmp_path):
    assert not caught(
        tmp_path, ("nothing", "kernels/reference.py", "EXP_MAX = 20.0", "EXP_MAX = 20.0")
    )


def test_every_mutant_still_has_its_place():
    assert len(ALL) >= 60 and len({ids(m) for m in ALL}) == len(ALL)
    for name, file, old, new, *_ in ALL:
        assert (ROOT / file).read_text().count(old) == 1, f"{file}: {name}"
        assert old != new
