"""The mutation gate for C++ and CUDA: each wrong kernel of mutants_native.py must make a test fail.

A mutant is compiled from a copy of csrc: C++ into a `_C` of the portable instruction set (objects
that it does not touch are compiled once), CUDA under the SIMT shim. Then the tests of its op run
against it in a process of their own. All by `make torture`, else a sample that changes by the day.
"""

from __future__ import annotations

import datetime
import importlib.machinery
import importlib.util
import os
import random
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))

from mutants_native import CPU, CUDA  # noqa: E402
from simt import core  # noqa: E402

TODAY = random.Random(datetime.date.today().toordinal() + 1)
ALONE = ("module.cpp", "dispatch.cpp")  # in csrc: no formula stands there
ONCE = ("segments.cpp", "credit.cpp", "layer.cpp", "trust.cpp")  # in csrc/cpu
PER_ISA = tuple(
    f"{name}.cpp"
    for name in (
        *"adamw decode draw heads layers linear logp pack packed policy".split(),
        *"returns rotary slots softmax steps whiten".split(),
    )
)
FEW = {  # headers of few sources
    "attend.h": ("decode.cpp",),
    "enter.h": ("module.cpp",),
    "finish.h": ("linear.cpp",),
    "gate.h": ("layers.cpp", "linear.cpp"),
    "going.h": ("decode.cpp",),
    "meeting.h": ("decode.cpp",),
    "norm.h": ("decode.cpp", "layers.cpp"),
    "product.h": ("decode.cpp", "linear.cpp", "pack.cpp", "packed.cpp"),
    "packed.h": ("packed.cpp",),
    "sums.h": ("decode.cpp",),
    "tiles.h": ("linear.cpp", "pack.cpp", "packed.cpp"),
}
FLAGS = "-std=gnu++17 -O1 -fPIC -fopenmp -fvisibility=hidden -fno-math-errno -fno-trapping-math"


@pytest.fixture(scope="session")
def pybind(require) -> list[str]:
    missing = None if shutil.which("g++") else "g++ (apt install g++)"
    if importlib.util.find_spec("pybind11") is None:
        missing = "pip install pybind11"
    require("native", missing)
    import pybind11

    folders = (sysconfig.get_path("include"), pybind11.get_include())
    return [f"-I{folder}" for folder in folders]  # one word each, spaces or not


def compiled(csrc: Path, out: Path, names: tuple[str, ...], pybind: list[str]) -> list[Path]:
    """Object files of these sources, two at a time."""
    out.mkdir(parents=True, exist_ok=True)
    jobs, objects = [], []
    for name in names:
        source = csrc / name if name in ALONE else csrc / "cpu" / name
        objects.append(out / f"{source.stem}.o")
        isa = ["-DISA=portable"] if name in PER_ISA else []
        command = ["g++", *FLAGS.split(), *isa, *pybind, "-c", str(source), "-o", str(objects[-1])]
        jobs.append(command)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: subprocess.run(job, check=True), jobs))
    return objects


@pytest.fixture(scope="session")
def base(pybind, tmp_path_factory) -> Path:
    """The objects of the sources as they are."""
    folder = tmp_path_factory.mktemp("base")
    compiled(ROOT / "csrc", folder, (*ALONE, *ONCE, *PER_ISA), pybind)
    return folder


def mutated(folder: Path, mutant: tuple) -> Path:
    _, file, old, new, _ = mutant
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    path = folder / file
    text = path.read_text()
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
    path.write_text(text.replace(old, new))
    return folder / "csrc"


def touched(file: str) -> tuple[str, ...]:
    """What must be compiled again: the source, or all that may include the header."""
    name = Path(file).name
    if name in FEW:
        return FEW[name]
    return (name,) if name.endswith(".cpp") else (*ONCE, *PER_ISA)


def package(folder: Path, library: list[Path]) -> Path:
    """A reasonrl of links in which only `_C` is another one."""
    (folder / "reasonrl").mkdir(parents=True)
    for path in (ROOT / "reasonrl").iterdir():
        if not path.name.startswith(("_C.", "__pycache__")):
            (folder / "reasonrl" / path.name).symlink_to(path)
    found = folder / "reasonrl" / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"
    subprocess.run(["g++", "-shared", "-fopenmp", *map(str, library), "-o", str(found)], check=True)
    return folder


def caught_on_the_cpu(base: Path, folder: Path, mutant: tuple, pybind: list[str]) -> bool:
    csrc = mutated(folder, mutant)
    fresh = {p.name: p for p in compiled(csrc, folder / "o", touched(mutant[1]), pybind)}
    library = [fresh.get(p.name, p) for p in base.glob("*.o")]
    where = package(folder / "package", library)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-k", mutant[4], "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    names = (
        "native",
        "parity",
        "credit",
        "native_linear",
        "native_attention",
        "native_layers",
        "native_decoder",
        "native_draw",
        "native_decode",
        "native_adamw",
        "native_products",
        "trust",
    )
    command += [str(TESTS / f"test_{name}.py") for name in names]
    env = os.environ | {"PYTHONPATH": str(where), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=env, cwd=where, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stdout[-3000:] + run.stderr[-3000:]
    return run.returncode == 1


def caught_under_the_shim(folder: Path, mutant: tuple) -> bool:
    csrc = mutated(folder, mutant)
    sources = tuple(csrc / "cuda" / source.name for source in core.KERNELS)
    library = core.build("plain", folder / "o", sources)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]),
        "OMP_NUM_THREADS": "1",
        "ONLY": mutant[4],
    }
    command = [sys.executable, "-m", "simt.cases", str(library), "first"]
    run = subprocess.run(command, env=env, capture_output=True, text=True)
    assert run.returncode in (0, 1), run.stdout[-3000:] + run.stderr[-3000:]
    assert run.returncode == 0 or "AssertionError" in run.stderr or "SimtError" in run.stderr, run
    return run.returncode == 1


def ids(mutant: tuple) -> str:
    return f"{Path(mutant[1]).name}: {mutant[0]}"


SAMPLE = [*TODAY.sample(CPU, 4), *TODAY.sample(CUDA, 3)]


def run(mutant, base, folder, pybind) -> bool:
    if mutant in CUDA:
        return caught_under_the_shim(folder, mutant)
    return caught_on_the_cpu(base, folder, mutant, pybind)


@pytest.mark.parametrize("mutant", SAMPLE, ids=ids)
def test_a_sample_of_wrong_kernels_is_caught(mutant, base, tmp_path, pybind):
    assert run(mutant, base, tmp_path, pybind)


@pytest.mark.torture
@pytest.mark.parametrize("mutant", [*CPU, *CUDA], ids=ids)
def test_every_wrong_kernel_is_caught(mutant, base, tmp_path, pybind):
    assert run(mutant, base, tmp_path, pybind)


@pytest.mark.torture
def test_the_right_kernels_are_not_caught(base, tmp_path, pybind):
    same = (
        "nothing",
        "csrc/cpu/policy.cpp",
        "term.grad * share",
        "term.grad * share",
    )
    (tmp_path / "a").mkdir()
    assert not caught_on_the_cpu(base, tmp_path / "a", (*same, "not torture"), pybind)
    same = ("nothing", "csrc/cuda/policy.cu", "constexpr int64_t CHUNK", "constexpr int64_t CHUNK")
    (tmp_path / "b").mkdir()
    assert not caught_under_the_shim(tmp_path / "b", (*same, ""))


def test_every_mutant_still_has_its_place():
    everyone = [*CPU, *CUDA]
    assert len(everyone) >= 60 and len({ids(m) for m in everyone}) == len(everyone)
    for name, file, old, new, _ in everyone:
        assert (ROOT / file).read_text().count(old) == 1, f"{file}: {name}"
        assert old != new
