"""csrc/cuda under the CPU shim with the face of reasonrl._C, by ctypes, for kernels/cuda.py."""

from __future__ import annotations

import ctypes as c
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "simt"
KERNELS = tuple(ROOT / "csrc" / "cuda" / name for name in ("policy.cu", "segments.cu"))
FLAGS = "-std=gnu++17 -g -fPIC -Wall -Werror".split()
AS_CPU = [*"-x c++ -DSIMT -fno-strict-aliasing -ffp-contract=off".split(), f"-I{HERE}"]
VARIANTS = {  # flags of the kernels, flags of the link, sources of the runtime
    "plain": (["-O2"], [], ["runtime.cpp"]),
    "cover": (["-O0", "--coverage"], ["--coverage"], ["runtime.cpp"]),
    "asan": (
        "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined".split(),
        ["-fsanitize=address,undefined"],
        ["runtime.cpp"],
    ),
    "race": (
        "-O1 -fsanitize=thread --param tsan-instrument-func-entry-exit=0".split(),
        ["-Wl,-z,defs", "-ldl"],
        ["runtime.cpp", "race.cpp"],
    ),
}
P, I64, INT, F64, F32 = c.c_void_p, c.c_int64, c.c_int, c.c_double, c.c_float


class Loss(c.Structure):
    """The struct Loss of math.h."""

    _fields_ = [(name, INT) for name in ("ratio", "surrogate", "kl")]
    _fields_ += [
        (name, F32) for name in "low high delta dual kl_coef entropy_coef sapo_pos sapo_neg".split()
    ]


class PolicyTask(c.Structure):
    """The struct PolicyTask of launch.h."""

    _fields_ = [
        (name, P)
        for name in (
            "logp old_logp advantage ref_logp entropy weight mask cu divisors grad_logp "
            "grad_entropy sums loss metrics arrived"
        ).split()
    ]
    _fields_ += [("tokens", I64), ("batch", I64), ("per_completion", INT)]
    _fields_ += [("divisor", F64), ("entropy_divisor", F64)]


class CreditTask(c.Structure):
    """The struct CreditTask of launch.h."""

    _fields_ = [
        (name, P)
        for name in (
            "outcome group scored token_reward step_reward step_scored step step_cu"
        ).split()
    ]
    _fields_ += [
        (name, INT) for name in "tokens_paid kind pay by_place divide verl_baseline".split()
    ]
    _fields_ += [(name, F64) for name in "gamma ddof eps outcome_weight process_weight".split()]
    _fields_ += [(name, P) for name in ("relative", "mean", "value")]


SIGNATURES = {
    "policy": (c.POINTER(Loss), c.POINTER(PolicyTask), P),
    "core": (c.POINTER(Loss), c.POINTER(PolicyTask), c.POINTER(CreditTask), P),
    "credit_advantage": (c.POINTER(CreditTask), P, P, I64, P, P),
    "count_tokens": (P, P, I64, P, P),
    "group_advantage": (P, P, P, I64, INT, F64, F64, P, P),
    "returns": (P, P, P, I64, F64, INT, P, P),
    "step_reduce": (P, P, P, I64, INT, P, P, P),
    "step_reduce_grad": (P, P, P, I64, INT, P, P, P, P),
    "step_expand": (P, P, I64, P, P),
}


def build(variant: str, folder: Path, sources: tuple[Path, ...] = KERNELS) -> Path:
    """Compile .cu files as C++, two at a time, and link them with the shim."""
    kernel_flags, link_flags, runtime = VARIANTS[variant]
    folder.mkdir(parents=True, exist_ok=True)
    define = ["-DSIMT_ASAN"] if variant == "asan" else []
    jobs, objects = [], []
    for source in (*sources, *(HERE / name for name in runtime)):
        flags = [*AS_CPU, *kernel_flags] if source.suffix == ".cu" else [*define, "-O2"]
        objects.append(folder / f"{source.stem}.o")
        jobs.append(["g++", *FLAGS, *flags, "-c", str(source), "-o", str(objects[-1])])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda job: subprocess.run(job, check=True, cwd=folder), jobs))
    library = folder / f"{variant}.so"
    link = ["g++", "-shared", *map(str, objects), *link_flags, "-o", str(library)]
    subprocess.run(link, check=True, cwd=folder)
    return library


class SimtError(RuntimeError):
    """A launch failed; the text says where."""


class Core:
    """Stands for reasonrl._C in kernels/cuda.py; `launches` counts the kernels run."""

    Loss, PolicyTask, CreditTask, SUM_COUNT = Loss, PolicyTask, CreditTask, 10

    def __init__(self, library: Path, schedule: str = "first"):
        self.lib, self.launches = c.CDLL(str(library)), 0
        self.lib.simt_error.restype = c.c_char_p
        self.lib.reasonrl_policy_items.argtypes = (c.POINTER(Loss), I64, I64, INT, INT)
        self.lib.simt_launches.restype = c.c_uint
        self.lib.reasonrl_policy_items.restype = I64
        for name, signature in SIGNATURES.items():
            getattr(self.lib, f"reasonrl_{name}").argtypes = signature
        self.schedule(schedule)

    def schedule(self, name: str) -> None:
        self.lib.simt_schedule(name.encode())

    def cuda_policy_items(self, *sizes):
        return self.lib.reasonrl_policy_items(*sizes)

    def call(self, op: str, like, *args) -> None:
        """In the place of kernels.cuda.call."""
        self.lib.simt_launches()
        code = getattr(self.lib, f"reasonrl_{op}")(*args, None)
        self.launches += self.lib.simt_launches()
        if code:
            raise SimtError(f"{op}: {code}: {self.lib.simt_error().decode()}")

    def count(self, tensor) -> None:
        """Count the bytes that kernels read from and write to this tensor (race build)."""
        self.lib.simt_count(P(tensor.data_ptr()), c.c_size_t(tensor.nbytes))

    def counted(self, tensor) -> tuple[int, int]:
        out = (c.c_uint64 * 2)()
        self.lib.simt_counted(P(tensor.data_ptr()), out)
        return out[0], out[1]


def attach(core: Core):
    """kernels.cuda with its launches going to the shim; CPU tensors in, CPU tensors out."""
    from reasonrl.kernels import cuda

    cuda.core, cuda.call = lambda: core, core.call
    return cuda
