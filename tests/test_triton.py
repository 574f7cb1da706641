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
import torch

HERE = Path(__file__).parent
FP32 = "*fp32"


@pytest.fixture(autouse=True, scope="module")
def triton_here(require):
    found = importlib.util.find_spec("triton") is not None
    require("triton", None if found else "pip install triton")


@pytest.mark.parametrize("cases", ["triton_cases.py", "triton_memory_cases.py"])
def test_in_the_interpreter(cases):
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    where = str(HERE / cases)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", where]
    run = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"\d+ passed", run.stdout) and "skipped" not in run.stdout


def shipped(dtype: str):
    """(name, kernel, argument types, compile-time values, options), with every flag on."""
    from reasonrl.kernels import linear_logp, logp, policy_loss

    names = (
        "logp",
        "stats",
        "ent",
        "g",
        "h",
        "out",
        "old",
        "adv",
        "ref",
        "share",
        "bonus",
        "c",
        "eta",
        "sums",
    )
    types = {f"{name}_ptr": FP32 for name in names}
    types |= {f"{name}_ptr": f"*{dtype}" for name in ("x", "b", "u", "du")}
    types |= {"target_ptr": "*i64", "cu_ptr": "*i64", "mask_ptr": "*i1"}
    types |= {name: "i32" for name in ("n", "hidden", "vocab", "part", "stride")}
    numbers = "temperature softcap low high log_low log_high delta dual pos neg kl_coef"
    types |= {name: "fp32" for name in numbers.split()}
    head = linear_logp.config(torch.empty(0, dtype=getattr(torch, TORCH[dtype])))
    options = {name: head.pop(name) for name in ("num_warps", "num_stages")}
    head |= {"BIAS": True, "CAPPED": True}
    wide, policy = types | {"w_ptr": f"*{dtype}"}, types | {"w_ptr": FP32}
    yield "linear_logp.stats", linear_logp.stats_kernel, wide, head, options
    yield "linear_logp.grad", linear_logp.grad_kernel, wide, head | {"ENTROPY": True}, options
    eight = {"num_warps": 8}
    yield "logp.stats", logp.stats_kernel, types, {"CAPPED": True, "BLOCK": 4096}, eight
    yield (
        "logp.grad",
        logp.grad_kernel,
        types,
        {"CAPPED": True, "ENTROPY": True, "BLOCK": 2048},
        eight,
    )
    on = {key: True for key in ("KL_ON", "DELTA", "DUAL", "OLD", "REF", "W", "ENT", "MASK")}
    for ratio, surrogate in ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 3), (0, 4)):
        flags = on | {"RATIO": ratio, "SURROGATE": surrogate, "KL": 3, "BLOCK": 512}
        yield f"policy.{ratio}{surrogate}", policy_loss.kernel, policy, flags, {"num_warps": 4}


TORCH = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def build(kernel, types, constants, options, arch):
    from triton import compile as build_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    even = ("hidden", "vocab", "stride", "part")
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if n not in constants and (types[n].startswith("*") or n in even)
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    target = GPUTarget("hip", arch, 64) if isinstance(arch, str) else GPUTarget("cuda", arch, 32)
    return build_kernel(source, target=target, options=options)


def read_nvidia(compiled, folder: Path) -> dict[str, int]:
    import triton

    cubin, tools = folder / "kernel.cubin", Path(triton.__file__).parent / "backends/nvidia/bin"
    cubin.write_bytes(compiled.asm["cubin"])

    def dump(what: str) -> str:
        command = [str(tools / "cuobjdump"), what, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump("-res-usage")))
    sass = dump("-sass")
    seen = {name: len(re.findall(rf"\b{name}", sass)) for name in ("LDL", "STL", "LDGSTS")}
    seen["tensor"] = len(re.findall(r"HMMA|HGMMA|UTCHMMA", sass))
    seen["wgmma"] = sass.count("HGMMA")
    return {name: int(value) for name, value in usage.items()} | seen


ARCHES = [80, 90, 100, "gfx942"]


@pytest.mark.parametrize("arch", ARCHES)
def test_kernels_build_without_stack_or_spills(arch, tmp_path):
    quick = ("linear_logp.stats", "linear_logp.grad", "logp.stats", "logp.grad", "policy.10")
    gate(arch, "bf16", tmp_path, quick)


@pytest.mark.torture
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("arch", ARCHES)
def test_every_kernel_builds_without_stack_or_spills(arch, dtype, tmp_path):
    gate(arch, dtype, tmp_path, None)


def gate(arch, dtype, folder, names):
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what 3.9 does; said, so that it holds
    for name, kernel, types, constants, options in shipped(dtype):
        if names is not None and name not in names:
            continue
        compiled = build(kernel, types, constants, options, arch)
        matrix = name.startswith("linear") and dtype != "fp32"
        if isinstance(arch, str):
            text = compiled.asm["amdgcn"]
            for field in ("vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size"):
                (found,) = re.findall(rf"\.{field}:\s*(\d+)", text)
                assert found == "0", f"{name} {arch}: {field} {found}"
            assert "v_mfma" in text or not matrix
            continue
        seen = read_nvidia(compiled, folder)
        bad = {key: seen[key] for key in ("STACK", "LOCAL", "LDL", "STL") if seen[key]}
        assert not bad, f"{name} sm_{arch} {dtype}: {bad}"
        if matrix:
            assert seen["tensor"] and seen["LDGSTS"], f"{name} sm_{arch}: {seen}"
            assert arch != 90 or seen["wgmma"]


def test_a_new_number_or_length_compiles_nothing():
    """Every numeric argument of a kernel is a run-time argument: flags and block sizes alone are
    not."""
    from reasonrl.kernels import linear_logp, logp, policy_loss

    flags = {
        "BIAS",
        "CAPPED",
        "ENTROPY",
        "EXACT",
        "RATIO",
        "SURROGATE",
        "KL",
        "KL_ON",
        "DELTA",
        "DUAL",
    }
    flags |= {"OLD", "REF", "W", "ENT", "MASK", "BLOCK", "ROWS", "COLS", "DEPTH"}
    kernels = (
        linear_logp.stats_kernel,
        linear_logp.grad_kernel,
        logp.stats_kernel,
        logp.grad_kernel,
    )
    for kernel in (*kernels, policy_loss.kernel):
        assert {p.name for p in kernel.params if p.is_constexpr} <= flags
    for kernel in kernels:
        lengths = [p for p in kernel.params if p.name == "n"]
        assert all(p.do_not_specialize for p in lengths)
