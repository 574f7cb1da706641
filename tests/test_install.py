"""What pip makes of the tree: wheel, sdist, the link, the fall-back, the cost of an import.

One wheel is built for all tests here, without isolation and without CUDA, in about 15 seconds.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = (
    "setup.py pyproject.toml MANIFEST.in CMakeLists.txt README.md LICENSE Makefile "
    "constraints.txt CHANGELOG.md .clang-format csrc kernels reasonrl tests"
).split()


def copy_of_the_tree(target: Path) -> Path:
    """The sources as a clone has them, in a folder whose name has a space."""
    tree = target / "source tree"
    tree.mkdir()
    skip = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info", "build")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=skip)
        elif source.exists():
            shutil.copy(source, tree / name)
    (tree / "README.md").touch()
    return tree


def build(tree: Path, what: str, **env: str) -> subprocess.CompletedProcess:
    """`what` by the build backend, with the tools of this environment; offline."""
    code = f"from setuptools import build_meta as b; print(b.build_{what}('out'))"
    (tree / "out").mkdir(exist_ok=True)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    clean = {k: v for k, v in os.environ.items() if not k.startswith("REASONRL_")}
    run = {**clean, "PATH": path, "REASONRL_CUDA": "0", **env}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=tree, env=run, capture_output=True, text=True
    )


@pytest.fixture(scope="session")
def tree(require, tmp_path_factory) -> Path:
    missing = [n for n in ("cmake", "ninja") if not shutil.which(n, path=tool_path())]
    compiler = None if shutil.which(os.environ.get("CXX", "c++")) else "a C++ compiler"
    require("native", compiler or (f"no {missing[0]}" if missing else None))
    return copy_of_the_tree(tmp_path_factory.mktemp("install"))


def tool_path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])


@pytest.fixture(scope="session")
def wheel(tree) -> Path:
    done = build(tree, "wheel", REASONRL_REQUIRE_NATIVE="1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next((tree / "out").glob("*.whl"))


@pytest.fixture(scope="session")
def unpacked(wheel, tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def python(site: Path, code: str, **env: str) -> str:
    """Run code that sees the unpacked wheel and no editable install of this tree (-S: no .pth)."""
    libraries = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    run = {**os.environ, "PYTHONPATH": os.pathsep.join([str(site), *sorted(libraries)]), **env}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, cwd=site.parent, env=run, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (ROOT / "kernels").glob("*.py"):
        assert f"reasonrl/kernels/{path.name}" in names
    for path in (ROOT / "reasonrl").rglob("*.py"):
        assert str(path.relative_to(ROOT)) in names, path
    for path in (ROOT / "reasonrl" / "recipes").glob("*.yaml"):
        assert f"reasonrl/recipes/{path.name}" in names
    assert sum(name.startswith("reasonrl/_C") and name.endswith(".so") for name in names) == 1
    tops = {name.split("/")[0] for name in names}
    assert tops == {"reasonrl", next(t for t in tops if t.endswith(".dist-info"))}
    assert not any(name.startswith("kernels/") for name in names)


def test_wheel_works_from_anywhere(unpacked):
    code = """
import torch, reasonrl
from reasonrl import LossSpec, policy_loss
from reasonrl.kernels import native
assert native.available() is None, native.available()
x = torch.zeros(4, requires_grad=True)
out = policy_loss(x, None, torch.ones(4), LossSpec.named("dapo"), impl="native")
out.loss.backward()
print(reasonrl.__file__, native.__file__, x.grad.tolist())
"""
    package, kernel, *grad = python(unpacked, code).split(" ", 2)
    assert package.startswith(str(unpacked)) and kernel.startswith(str(unpacked))
    assert grad == ["[-0.25, -0.25, -0.25, -0.25]"]


def test_core_needs_neither_torch_nor_a_driver(unpacked):
    code = "import sys, reasonrl._C as c; print(c.isa(), 'torch' in sys.modules)"
    isa, torch_seen = python(unpacked, code, CUDA_VISIBLE_DEVICES="").split()
    assert isa in ("avx512", "avx2", "portable") and torch_seen == "False"
    library = next((unpacked / "reasonrl").glob("_C*.so"))
    linked = subprocess.run(["ldd", str(library)], capture_output=True, text=True).stdout
    assert not re.search("libcuda|libcudart|libtorch|libc10", linked)


def test_import_loads_nothing_heavy(unpacked):
    code = """
import sys, torch, time
before = set(sys.modules)
start = time.process_time()
import reasonrl
from reasonrl import LossSpec, policy_loss
seconds = time.process_time() - start
heavy = {"triton", "transformers", "datasets", "accelerate", "trl", "sympy", "pyarrow"}
print(seconds, sorted(heavy & ({m.split(".")[0] for m in set(sys.modules) - before})))
"""
    seconds, heavy = python(unpacked, code).split(" ", 1)
    assert heavy == "[]" and float(seconds) < 0.3


def test_metadata(wheel):
    archive = zipfile.ZipFile(wheel)
    read = {name.split("/")[-1]: name for name in archive.namelist() if ".dist-info/" in name}
    metadata = archive.read(read["METADATA"]).decode()
    scripts = archive.read(read["entry_points.txt"]).decode()
    assert "reasonrl = reasonrl.cli:main" in scripts
    base = [line for line in metadata.splitlines() if line.startswith("Requires-Dist")]
    base = [line for line in base if "extra ==" not in line]
    for name in ("trl", "deepspeed", "datasets", "triton", "flash-attn"):
        assert not any(line.startswith(f"Requires-Dist: {name}") for line in base), name
    extras = set(re.findall(r"Provides-Extra: (\S+)", metadata))
    wanted = {"test", "bench", "cuda", "deepspeed", "trl", "report", "tasks", "vision"}
    assert wanted <= extras and "Requires-Python: >=3.10" in metadata


def test_without_a_compiler_pure_python_and_one_line(tree, tmp_path):
    copy = copy_of_the_tree(tmp_path)
    done = build(copy, "wheel", CXX="/nonexistent")
    assert done.returncode == 0, done.stderr[-2000:]
    said = [line for line in done.stderr.splitlines() if line.startswith("reasonrl:")]
    assert len(said) == 1 and "pure Python" in said[0]
    names = zipfile.ZipFile(next((copy / "out").glob("*.whl"))).namelist()
    assert "reasonrl/kernels/native.py" in names and not any(n.endswith(".so") for n in names)
    hard = build(copy, "wheel", CXX="/nonexistent", REASONRL_REQUIRE_NATIVE="1")
    assert hard.returncode != 0 and "REASONRL_REQUIRE_NATIVE=1" in hard.stderr


def test_pure_python_says_what_is_missing(unpacked, tmp_path):
    site = tmp_path / "site"
    shutil.copytree(unpacked, site, ignore=shutil.ignore_patterns("_C*.so"))
    code = """
import torch, reasonrl as rr
x = torch.zeros(4)
try:
    rr.policy_loss(x, None, x, rr.LossSpec.named("dapo"), impl="native")
except rr.KernelUnavailable as error:
    print(error)
print(float(rr.policy_loss(x, None, x + 1, rr.LossSpec.named("dapo")).loss))
"""
    said = python(site, code).splitlines()
    assert "reasonrl._C is not built" in said[0] and said[1] == "-1.0"


def test_sdist_can_be_built_from(tree):
    done = build(tree, "sdist")
    assert done.returncode == 0, done.stderr[-2000:]
    archive = next((tree / "out").glob("*.tar.gz"))
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[-1] for name in tar.getnames()}
    for path in [*(ROOT / "csrc").rglob("*.*"), *(ROOT / "kernels").glob("*.py")]:
        assert str(path.relative_to(ROOT)) in names, path
    assert {"CMakeLists.txt", "setup.py", "pyproject.toml"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


def test_kernels_is_a_committed_link(tmp_path):
    link = ROOT / "reasonrl" / "kernels"
    assert link.is_symlink() and os.readlink(link) == "../kernels"
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_cuda_objects_and_launches_without_a_driver(require):
    """Where _C has CUDA: every architecture is in it, and launches fail as Python exceptions."""
    from reasonrl.kernels import native

    require("native", native.available())
    module = native.core()
    usual = Path("/usr/local/cuda/bin/nvcc")
    nvcc = shutil.which("nvcc") or (str(usual) if usual.exists() else None)
    if not hasattr(module, "cuda_policy"):
        require("nvcc", "reasonrl._C was built without CUDA" if nvcc is None else "no CUDA in _C")
    tool = shutil.which("cuobjdump") or triton_cuobjdump()
    if tool:
        listed = subprocess.check_output([tool, "-lelf", "-lptx", module.__file__], text=True)
        found = set(re.findall(r"sm_(\d+)\.(?:cubin|ptx)", listed))
        assert {"80", "90", "100", "120"} <= found and "sm_120.ptx" in listed
    if module.cuda_missing() is None:
        pytest.skip("there is a driver here")
    assert "driver" in module.cuda_missing()
    for op, args in (("returns", (0, 0, 0, 3, 1.0, False, 0)), ("step_expand", (0, 0, 9, 0))):
        with pytest.raises(module.CudaError, match="no usable NVIDIA driver") as caught:
            getattr(module, f"cuda_{op}")(*args, 0)
        assert caught.value.code in (35, 100) and isinstance(caught.value, RuntimeError)
    from reasonrl.kernels import cuda

    assert "driver" in str(cuda.available())


def triton_cuobjdump() -> str | None:
    import importlib.util

    found = importlib.util.find_spec("triton")
    if found is None or not found.origin:
        return None
    tool = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(tool) if tool.exists() else None
