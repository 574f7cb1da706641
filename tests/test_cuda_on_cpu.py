"""The CUDA sources executed on this CPU: numbers, schedules, sanitizers, races, coverage, bytes.

csrc/cuda is compiled as C++ against tests/simt, where CUDA threads are fibers. This shows: every
line runs, the numbers are right, no access is out of place, no barrier is missing. It cannot show
speed, nvcc's own code or memory order between blocks. test_gpu.py does on a GPU.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from reasonrl import LossSpec, TokenCredit, checks

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
sys.path.insert(0, str(TESTS))  # the helpers are a package of their own: simt.core, simt.cases

sys.path.insert(0, str(ROOT))

from simt import cases, core  # noqa: E402

from bench import builds  # noqa: E402

CUDA = ROOT / "csrc" / "cuda"
SCHEDULES = ("first", "last", "1", "2", "3")
PLANTED = core.HERE / "planted.cu"
ARCHS = ("80", "90", "100", "120")


@pytest.fixture(scope="session")
def built(require, tmp_path_factory) -> Callable[..., Path]:
    """built(variant, *sources): the library, compiled once a session."""
    missing = None if shutil.which("g++") else "g++ (apt install g++)"
    if os.uname().machine != "x86_64":
        missing = "an x86-64 CPU: the shim switches stacks in its assembly"
    require("native", missing)
    libraries: dict[tuple, Path] = {}

    def library(variant: str, *sources: Path) -> Path:
        key = (variant, sources)
        if key not in libraries:
            folder = tmp_path_factory.mktemp(variant)
            libraries[key] = core.build(variant, folder, sources or core.KERNELS)
        return libraries[key]

    return library


@pytest.fixture(autouse=True)
def untouched(monkeypatch):
    """What `attach` puts into kernels.cuda is taken back after each test."""
    from reasonrl.kernels import cuda

    monkeypatch.setattr(cuda, "core", cuda.core)
    monkeypatch.setattr(cuda, "call", cuda.call)


def in_a_process(library: Path, *schedules: str, preload: str = "") -> str:
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)]),
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "simt.cases", str(library), *schedules]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def sanitizers() -> str:
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [subprocess.check_output(["g++", f"-print-file-name={n}"], text=True) for n in names]
    return " ".join(path.strip() for path in found)


def test_numbers_and_one_hash_over_schedules(built):
    shim = core.Core(built("plain"))
    hashes = set()
    for schedule in SCHEDULES:
        shim.schedule(schedule)
        hashes.add(cases.run(shim))
    assert len(hashes) == 1 and shim.launches > 500


def test_no_memory_or_undefined_behaviour_error(built):
    in_a_process(built("asan"), "1", preload=sanitizers())


def test_no_race_on_any_schedule(built):
    shim = core.Core(built("race"))
    for schedule in ("first", "last"):
        shim.schedule(schedule)
        cases.run(shim)


def test_every_line_runs(built):
    library = built("cover")
    in_a_process(library, "first")
    ran: dict[str, bool] = {}
    for source in core.KERNELS:
        report = subprocess.check_output(
            ["gcov", "--stdout", "-o", str(library.parent), str(library.parent / source.stem)],
            text=True, cwd=library.parent, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        current = ""
        for line in report.splitlines():
            count, number, text = [*line.split(":", 2), "", ""][:3]
            if text.startswith("Source:"):
                current = Path(text.removeprefix("Source:")).name
            elif (
                current.endswith((".cu", "device.h", "credit.h", "tokens.h"))
                and number.strip().isdigit()
            ):
                # a template's or a header's line stands once for each use: any of them counts
                if count.strip() not in ("-", ""):
                    key = f"{current}:{number.strip()}"
                    ran[key] = ran.get(key, False) or not count.strip().startswith(("#", "="))
    missed = [key for key, done in ran.items() if not done]
    assert len(ran) > 300 and not missed, missed


def test_bytes_equal_the_formula(built):
    """One read of each input a token; a sequence ratio: again for its mean, again to share."""
    shim = core.Core(built("race"))
    cuda = cases.attach(shim)
    n, cu = 600, torch.tensor([0, 250, 600])
    live, mask = 431, torch.arange(600) % 600 < 431
    passes = {"dapo": 1, "grpo": 1, "sapo": 1, "gspo_token": 2, "gmpo": 2, "gspo": 3}
    for name, times in passes.items():
        shim.lib.simt_count_nothing()  # the addresses of the last round's tensors come back
        inputs = [torch.randn(n) for _ in range(6)]
        for x in (*inputs, mask):
            shim.count(x)
        logp, old, advantage, ref, entropy, weight = inputs
        spec = LossSpec.named(name, kl_coef=0.1, entropy_coef=0.1)
        cuda.policy_loss(logp, old, advantage, spec, cu, mask, ref, entropy, weight, None)
        assert [shim.counted(x) for x in inputs] == [(4 * live * times, 0)] * 6, name
        assert shim.counted(mask) == (n * (times + 1), 0)  # once more to count the tokens
    shim.lib.simt_count_nothing()
    reward = torch.randn(n)
    shim.count(reward)
    cuda.returns(reward, cu, mask, 0.9)
    assert shim.counted(reward) == (4 * live, 0)
    shim.lib.simt_count_nothing()


def two_completions(n: int = 300):
    """A token credit of two completions, and the (N,) values of a loss."""
    x, cu = torch.randn(n), torch.tensor([0, n - 40, n])
    credit = TokenCredit(torch.randn(n), torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.long))
    return x, cu, credit.packed(checks.Layout((n,), cu, None), torch.float32)


def test_launches_per_op(built):
    """From advantages or from rewards, loss, gradient and metrics are one launch."""
    shim = core.Core(built("plain"))
    cuda = cases.attach(shim)
    x, cu, credit = two_completions()
    mask = torch.ones(len(x), dtype=torch.bool)
    for advantage in (x, credit):
        for name in ("dapo", "gspo", "gmpo"):
            for kept, divisor, wanted in ((None, None, 1), (mask, 7.0, 1), (mask, None, 2)):
                if name != "dapo" and wanted == 2:
                    continue  # a mean over completions needs no count of all tokens
                shim.launches = 0
                spec = LossSpec.named(name)
                cuda.policy_loss(x, x, advantage, spec, cu, kept, x, None, None, divisor)
                assert shim.launches == wanted, (name, kept is None, divisor)
    shim.launches = 0
    cuda.credit_advantage(credit, cu, None)
    assert shim.launches == 1


def test_the_core_reads_what_the_loss_and_the_rewards_hold(built):
    """Bytes of the fused core: each input once, token rewards again for their means."""
    shim = core.Core(built("race"))
    cuda = cases.attach(shim)
    x, cu, credit = two_completions()
    n, old, ref = len(x), torch.randn(300), torch.randn(300)
    shim.lib.simt_count_nothing()
    for tensor in (x, old, ref, credit.token_reward):
        shim.count(tensor)
    cuda.policy_loss(x, old, credit, LossSpec.named("dapo"), cu, None, ref, None, None, None)
    assert [shim.counted(t) for t in (x, old, ref)] == [(4 * n, 0)] * 3
    assert shim.counted(credit.token_reward) == (8 * n, 0)
    shim.lib.simt_count_nothing()


def barriers() -> list[tuple[str, int, str]]:
    found = []
    for path in sorted(CUDA.iterdir()):
        for number, line in enumerate(path.read_text().splitlines()):
            for what in ("__syncthreads();", "__threadfence();"):
                if what in line:
                    found.append((path.name, number, what))
    return found


@pytest.mark.parametrize("place", barriers(), ids=lambda p: f"{p[0]}:{p[1] + 1}")
def test_every_barrier_is_needed(built, tmp_path, place):
    """With this barrier or fence blanked out, the race detector speaks, on the kindest schedule."""
    built("plain")
    file, number, what = place
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "csrc" / "cuda" / file
    lines = path.read_text().splitlines()
    lines[number] = lines[number].replace(what, "")
    path.write_text("\n".join(lines) + "\n")
    sources = tuple(path.parent / source.name for source in core.KERNELS)
    shim = core.Core(core.build("race", tmp_path / "race", sources), "last")
    cuda = cases.attach(shim)
    x, cu, credit = two_completions()
    gspo, gmpo = LossSpec.named("gspo"), LossSpec.named("gmpo")
    with pytest.raises(core.SimtError, match="race"):
        cuda.returns(x, torch.tensor([0, len(x)]), None, 0.9)
        cuda.policy_loss(x, x, x, gspo, torch.tensor([0, 300]), None, x, None, None, None)
        cuda.policy_loss(x, x, x, gspo, cu, None, x, None, None, None)
        cuda.policy_loss(x, x, credit, gmpo, cu, None, x, None, None, None)


def plant(library: Path, name: str, schedule: str = "first", n: int = 256):
    lib = ctypes.CDLL(str(library))
    lib.simt_error.restype = ctypes.c_char_p
    lib.simt_schedule(schedule.encode())
    out = torch.zeros(n)
    code = getattr(lib, f"plant_{name}")(ctypes.c_void_p(out.data_ptr()), n, None)
    return code, lib.simt_error().decode(), out


@pytest.mark.parametrize(
    "name, text",
    [
        ("early_return", "after a thread returned"),
        ("divergent", "divergent barriers"),
        ("half_warp", "deadlock"),
        ("wrong_lane", "outside the mask"),
        ("too_much_shared", "48 KiB"),
    ],
)
def test_the_shim_catches_wrong_kernels(built, name, text):
    for schedule in SCHEDULES:
        code, error, _ = plant(built("plain", PLANTED), name, schedule)
        assert code == 719 and text in error, error


def test_the_shim_poisons_and_counts_like_the_driver(built):
    library = built("plain", PLANTED)
    assert plant(library, "clean")[0] == 0
    assert plant(library, "unwritten_shared")[2].isnan().all()
    assert plant(library, "too_many_threads")[0] == 9


@pytest.mark.parametrize("name", ["no_barrier", "same_cell", "blocks"])
def test_the_detector_finds_races_on_any_schedule(built, name):
    library = built("race", PLANTED)
    assert plant(library, "clean")[:2] == (0, "")
    for schedule in SCHEDULES:
        code, error, _ = plant(library, name, schedule)
        assert code == 719 and "race" in error, (schedule, error)


@pytest.mark.parametrize("name", ["past_the_end", "past_shared"])
def test_the_sanitizer_finds_what_is_out_of_place(built, name):
    library = built("asan", PLANTED)
    script = (
        "import ctypes, sys\n"
        "lib, libc = ctypes.CDLL(sys.argv[1]), ctypes.CDLL(None)\n"
        "libc.malloc.restype = ctypes.c_void_p\n"
        "out = libc.malloc(ctypes.c_size_t(1024))\n"
        "print(getattr(lib, 'plant_' + sys.argv[2])(ctypes.c_void_p(out), 256, None))\n"
    )
    env = os.environ | {"LD_PRELOAD": sanitizers(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-c", script, str(library)]
    clean = subprocess.run([*command, "clean"], env=env, capture_output=True, text=True)
    assert clean.stdout.strip() == "0", clean.stderr
    wrong = subprocess.run([*command, name], env=env, capture_output=True, text=True)
    assert wrong.returncode != 0 and "heap-buffer-overflow" in wrong.stderr


def test_one_place_knows_the_shim():
    """The tested code is the shipped code: no other file may differ under SIMT."""
    users = [p.name for p in (ROOT / "csrc").rglob("*.*") if "SIMT" in p.read_text()]
    assert users == ["device.h"]
    for path in CUDA.glob("*.cu"):
        text = path.read_text()
        assert text.index('#include "device.h"') == text.index("#include"), path
        for banned in ("<<<", "asm(", "__shared__", "atomicAdd", "cooperative", "cub::"):
            assert banned not in text, (path, banned)
    assert (CUDA / "device.h").read_text().count("atomicAdd(") == 1  # the ticket, an integer


@pytest.fixture(scope="session")
def nvcc(require) -> str:
    found = builds.nvcc()
    require("nvcc", None if found else "nvcc is not on PATH")
    return str(found)


@pytest.mark.parametrize("arch", ARCHS)
def test_nvcc_compiles_without_stack_or_spills(nvcc, arch, tmp_path):
    """-warn-spills,-Werror is the gate; the register budget is tied to the compiler's version."""
    budget = json.loads((core.HERE / "registers.json").read_text())
    version = re.search(
        r"release ([\d.]+)", subprocess.check_output([nvcc, "--version"], text=True)
    )
    assert version
    used = {}
    for source in core.KERNELS:
        for row in builds.nvcc_report(nvcc, source, arch, tmp_path / "out.o"):
            assert row["stack"] == row["spills"] == 0, row
            name = row["kernel"]  # of a template's kernels the largest counts
            used[name] = max(used.get(name, 0), row["registers"])
    assert used.keys() == budget["kernels"].keys()
    if version[1] != budget["nvcc"]:
        pytest.skip(f"SKIPPED: the register budget is for nvcc {budget['nvcc']}, not {version[1]}")
    over = {name: n for name, n in used.items() if n > budget["kernels"][name][ARCHS.index(arch)]}
    assert not over, f"registers above the budget: {over}"
