"""The Triton kernels without a GPU: numerics in the interpreter, and what the compiler makes of
them.

TRITON_INTERPRET is read when kernels are defined, so numerics (triton_cases.py) run in a process of
their own. The compile gate builds every kernel at its shipped configuration for four architectures,
with the divisibility that the JIT would assume, and reads registers, stack and instructions off the
result. A build is no timing.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from bench.builds import archs, build, read_amd, read_nvidia, shipped  # noqa: E402

# the interpreter multiplies with numpy, whose AVX2 kernel rounds a row by its place in the tile: a
# product that is made again, as the gradient's is, must come out the same, as it does on a GPU
BLAS = {"OPENBLAS_CORETYPE": "Prescott"}


@pytest.fixture(autouse=True, scope="module")
def triton_here(require):
    found = importlib.util.find_spec("triton") is not None
    require("triton", None if found else "pip install triton")


@pytest.mark.parametrize(
    "cases", ["triton_cases.py", "triton_layer_cases.py", "triton_memory_cases.py"]
)
def test_in_the_interpreter(cases):
    env = os.environ | BLAS | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    where = str(HERE / cases)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", where]
    run = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout


ARCHES = [80, 90, 100, "gfx942"]


@pytest.mark.parametrize("arch", ARCHES)
def test_kernels_build_without_stack_or_spills(arch, tmp_path):
    quick = (
        "scale",
        "logp.stats",
        "logp.grad",
        "policy.10",
        "tiles.product.keep+bias+entropy+warm",
        "layers.norm_grad.1024",
        "slots.attend.128.4",
        "draw.pick",
        "packed.back",
    )
    gate(arch, "bf16", tmp_path, quick)


@pytest.mark.torture
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_builds_without_stack_or_spills(arch, dtype, tmp_path):
    gate(arch, dtype, tmp_path, None)


def gate(arch, dtype, folder, names):
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what 3.9 does; said, so that it holds
    for name, kernel, types, constants, options in shipped(dtype):
        if names is not None and name not in names or arch not in archs(name):
            continue
        compiled = build(kernel, types, constants, options, arch)
        if isinstance(arch, str):
            text = compiled.asm["amdgcn"]
            found = read_amd(text)
            assert found["stack"] == found["spills"] == 0, f"{name} {arch}: {found}"
            continue
        seen = read_nvidia(compiled, folder)
        bad = {key: seen[key] for key in ("STACK", "LOCAL", "LDL", "STL") if seen[key]}
        assert not bad, f"{name} sm_{arch} {dtype}: {bad}"
        if name.startswith("logp"):  # a row of a vocabulary of a multiple of 16, as the JIT sees it
            assert seen["wide"], f"{name} sm_{arch}: {seen}"
        if name.startswith("tiles.product"):
            assert seen["HGMMA"] and seen["UTMALDG"] >= 2, f"{name} sm_{arch}: {seen}"
            assert bool(seen["UTMASTG"]) == ("keep" in name), f"{name} sm_{arch}: {seen}"


def test_where_tiles_are_chosen(monkeypatch):
    """Half types on cards of compute capability 9.0, which a HIP build would claim as well."""
    import torch

    from reasonrl.kernels import tiles

    class There:
        """A matrix that says it lies on a card."""

        def __init__(self, *shape, size=2, address=256):
            self.shape, self.is_cuda, self.device = shape, True, "there"
            self.element_size, self.data_ptr = lambda: size, lambda: address

    generation = [(9, 0)]
    monkeypatch.setattr(tiles, "_generation", lambda device: generation[0])

    def chosen(n=2048, depth=896, vocab=49152, softcap=None, **given):
        return tiles.worth(n, There(n, depth, **given), There(vocab, depth, **given), softcap)

    assert chosen() and chosen(depth=4096)
    assert not any((chosen(depth=4104), chosen(depth=900), chosen(vocab=49153), chosen(n=128)))
    assert not any((chosen(softcap=30.0), chosen(size=4), chosen(address=8)))
    for other in ((8, 0), (10, 0)):
        generation[0] = other
        assert not chosen()
    generation[0] = (9, 0)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert not chosen()


def test_a_new_number_or_length_compiles_nothing():
    """Every numeric argument of a kernel is a run-time argument: flags and block sizes alone are
    not."""
    from reasonrl.kernels import common, draw, layers, logp, packed, policy_loss, slots, tiles, turn

    flags = {"CAPPED", "WARM", "ENTROPY", "RATIO", "SURROGATE", "KL", "KL_ON", "DELTA", "DUAL"}
    flags |= {"OLD", "REF", "W", "ENT", "MASK", "BLOCK", "BIAS", "KEEP"}
    flags |= {"BM", "BV", "BK", "GROUP", "R", "TILES"}
    flags |= {"ADDED", "KEPT", "LEARNT", "NORMED", "QUERIES", "HALF", "PARTS", "SIZE", "HEADS"}
    flags |= {"MANY"}
    kernels = [
        kernel
        for module in (common, draw, layers, logp, packed, policy_loss, slots, tiles, turn)
        for name, kernel in vars(module).items()
        if name.endswith("kernel") and hasattr(kernel, "params")
    ]
    assert len(kernels) >= 18
    for kernel in kernels:
        assert {p.name for p in kernel.params if p.is_constexpr} <= flags, kernel
