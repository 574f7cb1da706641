"""The C++ sources under AddressSanitizer and UBSan: the native tests in a process of their own.

Torch's allocator goes through malloc, so a byte past a tensor is a byte in a red zone.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.torture
def test_native_tests_under_sanitizers(require, tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    missing = [tool for tool in ("cmake", "ninja", "g++") if not shutil.which(tool, path=path)]
    require("native", f"no {', '.join(missing)}" if missing else None)
    skip = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("reasonrl", "kernels", "csrc", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=skip)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path / name)
    env = os.environ | {"PATH": path}
    cmakedir = [sys.executable, "-m", "pybind11", "--cmakedir"]
    options = {
        "pybind11_DIR": subprocess.check_output(cmakedir, text=True).strip(),
        "Python_EXECUTABLE": sys.executable,
        "CMAKE_LIBRARY_OUTPUT_DIRECTORY": str(tmp_path / "reasonrl"),
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_CXX_FLAGS": "-O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined",
        "REASONRL_CUDA": "0",
    }
    flags = [f"-D{name}={value}" for name, value in options.items()]
    build = ["cmake", "-G", "Ninja", "-S", ".", "-B", "build", *flags]
    subprocess.run(build, cwd=tmp_path, env=env, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", "build"], cwd=tmp_path, env=env, check=True)
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [subprocess.check_output(["g++", f"-print-file-name={n}"], text=True) for n in names]
    env |= {
        "LD_PRELOAD": " ".join(line.strip() for line in found),
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "PYTHONPATH": str(tmp_path),
        "OMP_NUM_THREADS": "2",
    }
    parts = "linear attention layers decoder draw decode adamw products".split()
    tests = ["tests/test_native.py", *(f"tests/test_native_{part}.py" for part in parts)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
