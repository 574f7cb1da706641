"""What compilers make of the GPU kernels, without a GPU: registers, shared memory, stack, spills.

    python -m bench builds --out bench/results

Triton kernels are compiled ahead of time at their shipped configurations, with the divisibility
that the JIT would assume; CUDA sources by nvcc. A build is no timing and no promise of one: every
number here is *counted*. Exit status 1 where a kernel has a stack or spills.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

from bench import builds_layers

ROOT = Path(__file__).resolve().parent.parent
CUDA_ARCHS = ("80", "90", "100", "120")
TRITON_ARCHS = (80, 90, 100, "gfx942")
FP32 = "*fp32"
TENSOR = ("HGMMA", "UTMALDG", "UTMASTG")  # warp-group products, bulk copies in and out


def main(arguments: Sequence[str]) -> int:
    """Print the table; 0, 1 where something spills, 2 where no compiler is there."""
    parser = argparse.ArgumentParser(
        prog="python -m bench builds", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--out", type=Path, help="folder for a JSON file")
    options = parser.parse_args(arguments)
    rows = [*cuda_rows(), *triton_rows("bf16")]
    if not rows:
        print("bench builds: neither nvcc nor Triton is here", file=sys.stderr)
        return 2
    print(f"{'kernel':42} {'arch':8} {'registers':>9} {'shared B':>9} {'stack B':>8} {'spills':>7}")
    for row in rows:
        shown = [row[k] for k in ("registers", "shared", "stack", "spills")]
        print(f"{row['kernel']:42} {row['arch']:8} " + "{:>9} {:>9} {:>8} {:>7}".format(*shown))
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / time.strftime("builds-%Y%m%d-%H%M%S.json")
        path.write_text(json.dumps({"bench": "builds", "rows": rows}, indent=1) + "\n")
        print(f"written to {path}")
    return int(any(row["stack"] or row["spills"] for row in rows))


def nvcc() -> str | None:
    usual = "/usr/local/cuda/bin/nvcc"
    found = os.environ.get("CUDACXX") or shutil.which("nvcc")
    return found or (usual if os.path.exists(usual) else None)


def nvcc_report(compiler: str, source: Path, arch: str, out: Path) -> list[dict[str, Any]]:
    """One row a kernel, as ptxas says; CalledProcessError where it spills."""
    flags = f"-std=c++17 -O3 -arch=sm_{arch} -Xptxas -v,-warn-spills,-Werror -c".split()
    done = subprocess.run(
        [compiler, *flags, str(source), "-o", str(out)], capture_output=True, text=True, check=True
    )
    rows: list[dict[str, Any]] = []
    for line in done.stderr.splitlines():
        if "Compiling entry" in line:
            name = re.search(r"\d([a-z_]+_kernel)", line)
            assert name
            rows.append({"kernel": name[1], "arch": f"sm_{arch}", "shared": 0})
        if found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores", line):
            rows[-1] |= {"stack": int(found[1]), "spills": int(found[2])}
        if found := re.search(r"Used (\d+) registers", line):
            rows[-1]["registers"] = int(found[1])
            if shared := re.search(r"(\d+) bytes smem", line):
                rows[-1]["shared"] = int(shared[1])
    return rows


def cuda_rows() -> list[dict[str, Any]]:
    compiler, rows = nvcc(), []
    if compiler is None:
        return []
    with tempfile.TemporaryDirectory() as folder:
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
            for arch in CUDA_ARCHS:
                rows += nvcc_report(compiler, source, arch, Path(folder) / "out.o")
    return rows


def triton_rows(dtype: str) -> list[dict[str, Any]]:
    if find_spec("triton") is None:
        return []
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what 3.9 does; said, so that it holds
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, kernel, types, constants, options in shipped(dtype):
            for arch in archs(name):
                built = build(kernel, types, constants, options, arch)
                row: dict[str, Any] = {"kernel": f"triton {name}", "shared": built.metadata.shared}
                if isinstance(arch, str):
                    row |= {"arch": arch} | read_amd(built.asm["amdgcn"])
                else:
                    seen = read_nvidia(built, Path(folder))
                    row |= {"arch": f"sm_{arch}", "registers": seen["REG"], "stack": seen["STACK"]}
                    row["spills"] = seen["LDL"] + seen["STL"]
                    row |= {key: seen[key] for key in TENSOR if seen[key]}
                rows.append(row)
    return rows


def read_amd(text: str) -> dict[str, int]:
    def field(name: str) -> int:
        (found,) = re.findall(rf"\.{name}:\s*(\d+)", text)
        return int(found)

    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    stack = field("private_segment_fixed_size")
    return {"registers": field("vgpr_count"), "stack": stack, "spills": spills}


def archs(name: str) -> tuple:
    """Where a kernel is used: one walks tiles by the means of one generation."""
    return (90,) if name.startswith("tiles.product") else TRITON_ARCHS


def shipped(dtype: str):
    """(name, kernel, argument types, compile-time values, options), with every flag on."""
    from reasonrl.kernels import common, logp, policy_loss, tiles
    from reasonrl.kernels.tiles import BK, BM, BV, GROUP

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
    types |= {f"{name}_ptr": f"*{dtype}" for name in ("x", "u", "du")}
    types |= {"target_ptr": "*i64", "cu_ptr": "*i64", "mask_ptr": "*i1"}
    types |= {name: "i32" for name in ("n", "vocab", "stride", "hidden", "tiles")}
    types |= {"bias_ptr": f"*{dtype}", "part_ptr": FP32}
    for name, rows, columns in (("x", BM, BK), ("w", BV, BK), ("u", BM, BV)):
        types[f"{name}_desc"] = f"tensordesc<{dtype}[{rows}, {columns}]>"
    numbers = "heat cold softcap per_softcap low high log_low log_high delta dual pos neg kl_coef"
    types |= {name: "fp32" for name in numbers.split()}
    policy = types | {"w_ptr": FP32}
    four, eight = ({"num_warps": n, **logp.ROUNDED} for n in (4, 8))
    capped = {"CAPPED": True, "WARM": True}
    yield "logp.stats", logp.stats_kernel, types, capped | {"BLOCK": 4096}, four
    grad = capped | {"ENTROPY": True, "BLOCK": 2048}
    yield "logp.grad", logp.grad_kernel, types, grad, eight
    yield "scale", common.scale_kernel, types, {"BLOCK": 4096}, {"num_warps": 4}
    if dtype != "fp32":
        shape = {"BM": BM, "BV": BV, "BK": BK, "GROUP": GROUP}
        for keep, entropy, warm in product((True, False), repeat=3):
            own = {"KEEP": keep, "ENTROPY": entropy, "WARM": warm, "BIAS": keep}
            words = ["keep+bias" if keep else "alone", *["entropy"] * entropy, *["warm"] * warm]
            yield (
                "tiles.product." + "+".join(words),
                tiles.tile_kernel,
                types,
                own | shape,
                tiles.OPTIONS,
            )
        join = {"KEEP": True, "ENTROPY": True, "WARM": True, **tiles.JOINED}
        yield "tiles.join", tiles.join_kernel, types, join, {"num_warps": 4, **logp.ROUNDED}
    on = {key: True for key in ("KL_ON", "DELTA", "DUAL", "OLD", "REF", "W", "ENT", "MASK")}
    for ratio, surrogate in ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 3), (0, 4)):
        flags = on | {"RATIO": ratio, "SURROGATE": surrogate, "KL": 3, "BLOCK": 512}
        yield f"policy.{ratio}{surrogate}", policy_loss.kernel, policy, flags, {"num_warps": 4}
    yield from builds_layers.shipped(dtype)


def build(kernel, types, constants, options, arch):
    from triton import compile as build_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    even = ("n", "vocab", "stride", "hidden", "width", "size", "half")
    attrs = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if n not in constants and (types[n].startswith("*") or n in even)
        if n not in (kernel.do_not_specialize or ())
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
    seen = {name: len(re.findall(rf"\b{name}", sass)) for name in ("LDL", "STL", *TENSOR)}
    seen["wide"] = len(re.findall(r"\bLDG\.\S*128", sass))  # loads of 16 bytes a thread
    return {name: int(value) for name, value in usage.items()} | seen
