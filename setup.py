"""Builds the native part of capt with CMake and Ninja; project metadata is in pyproject.toml.

Environment:
  CAPT_NATIVE      AUTO (default): build if cmake, ninja and a C++ compiler are found; ON: fail without them;
                   OFF: pure Python
  CAPT_CUDA        AUTO (default): CUDA kernels if nvcc is found; ON: fail without; OFF: never. No GPU is needed.
  CAPT_CUDA_ARCHS  CMake architecture list, default "80-virtual;90a-real" (portable PTX and Hopper code)
  MAX_JOBS         parallel compilations, default the number of CPUs
  CMAKE_ARGS       further arguments for cmake
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def setting(name: str) -> str:
    """AUTO, ON or OFF from the environment."""
    value = os.environ.get(name, "AUTO").upper()
    if value not in ("AUTO", "ON", "OFF"):
        sys.exit(f"{name}={value}: use AUTO, ON or OFF")
    return value


def missing_tools() -> list[str]:
    """What a native build lacks here."""
    compilers = [os.environ["CXX"]] if "CXX" in os.environ else ["c++", "g++", "clang++"]
    lacking = [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
    if not any(shutil.which(shlex.split(compiler)[0]) for compiler in compilers):
        lacking.append("a C++ compiler")
    try:
        import pybind11  # noqa: F401
    except ImportError:
        lacking.append("pybind11")
    return lacking


class CMakeBuild(build_ext):
    """Runs cmake: configure, build, install into the build folder (and into the source tree when editable)."""

    def run(self) -> None:
        """Build, or explain why only the pure-Python part is installed."""
        native, cuda = setting("CAPT_NATIVE"), setting("CAPT_CUDA")
        lacking = missing_tools()
        if native == "OFF" or (native == "AUTO" and cuda != "ON" and lacking):
            why = "CAPT_NATIVE=OFF" if native == "OFF" else f"not found: {', '.join(lacking)}"
            print(f"capt: no native kernels are built ({why}); every op runs on its PyTorch reference", file=sys.stderr)
            self.extensions = []
            return
        if lacking:
            sys.exit(f"capt: native kernels were required, but not found: {', '.join(lacking)}")
        self.build(cuda)

    def build(self, cuda: str) -> None:
        """Configure, compile and install with cmake."""
        import pybind11

        target = Path(self.get_ext_fullpath("capt._C")).resolve().parent.parent
        folder = Path(self.build_temp).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCAPT_CUDA={cuda}",
        ]  # fmt: skip
        if "CAPT_CUDA_ARCHS" in os.environ:
            configure.append(f"-DCAPT_CUDA_ARCHS={os.environ['CAPT_CUDA_ARCHS']}")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        subprocess.check_call([*configure, *shlex.split(os.environ.get("CMAKE_ARGS", ""))])
        subprocess.check_call(["cmake", "--build", str(folder), "--parallel", jobs])
        prefixes = {target} if not (self.inplace or self.editable_mode) else {target, ROOT}
        for prefix in sorted(prefixes):
            subprocess.check_call(["cmake", "--install", str(folder), "--prefix", str(prefix)])

    def get_outputs(self) -> list[str]:
        """Files that belong to the native part, for the record of an installation."""
        folder = Path(self.build_lib) / "capt"
        return [str(path) for path in folder.glob("*.so")]


setup(
    ext_modules=[Extension("capt._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    # Folders of data count as packages too: setuptools wants every importable folder named.
    packages=[*find_namespace_packages(include=["capt", "capt.*"], exclude=["*__pycache__*"]), "capt.kernels"],
    package_dir={"capt": "capt", "capt.kernels": "kernels"},
)
