"""Builds reasonrl._C with CMake and maps kernels/ to reasonrl.kernels; needs no torch.

REASONRL_REQUIRE_NATIVE=1   a failed native build is an error (otherwise one line says so)
REASONRL_CUDA=0|1|auto      CUDA objects: never, required, or where nvcc is found (auto)
REASONRL_CUDA_ARCHS         CMake's list of architectures, such as "80-real;90-real;100-real;120"
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
REQUIRED = os.environ.get("REASONRL_REQUIRE_NATIVE") == "1"


class CMakeBuild(build_ext):
    """Runs CMake in the temporary build folder; a lasting one would cache tools of a past pip."""

    def build_extension(self, ext):
        cuda = os.environ.get("REASONRL_CUDA", "auto")
        try:
            try:
                self.run_cmake(ext, cuda)
            except subprocess.CalledProcessError:
                if cuda != "auto":
                    raise
                print("reasonrl: no build with CUDA; trying without it", file=sys.stderr)
                self.run_cmake(ext, "0")
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            if REQUIRED:
                message = f"reasonrl: native build failed, REASONRL_REQUIRE_NATIVE=1: {error}"
                raise SystemExit(message) from error
            print(
                "reasonrl: no native code (the C++ build failed); installing pure Python, "
                "which is slower. Set REASONRL_REQUIRE_NATIVE=1 to see this as an error.",
                file=sys.stderr,
            )
            raise CompileError(str(error)) from error

    def run_cmake(self, ext, cuda):
        import pybind11

        build = Path(self.build_temp).resolve() / "native"
        build.mkdir(parents=True, exist_ok=True)
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": Path(self.get_ext_fullpath(ext.name))
            .resolve()
            .parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "REASONRL_CUDA": cuda,
        }
        if archs := os.environ.get("REASONRL_CUDA_ARCHS"):
            options["REASONRL_CUDA_ARCHS"] = archs
        flags = [f"-D{name}={value}" for name, value in options.items()]
        configure = ["cmake", "--fresh", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        subprocess.run([*configure, *flags], check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    packages=[*find_packages(include=["reasonrl", "reasonrl.*"]), "reasonrl.kernels"],
    package_dir={"reasonrl.kernels": "kernels"},
    package_data={"reasonrl": ["recipes/*.yaml", "report/*", "py.typed"]},
    include_package_data=False,
    ext_modules=[Extension("reasonrl._C", [], optional=not REQUIRED)],
    cmdclass={"build_ext": CMakeBuild},
)
