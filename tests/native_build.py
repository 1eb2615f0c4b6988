"""Native sources by kind, and the CUDA ones compiled by g++ against the emulation."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
#: Compiler flags of instruction-set levels, as in CMakeLists.txt.
LEVEL_FLAGS = {
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"],
}


def sources(kind: str) -> list[Path]:
    """The sources of one kind in csrc/sources.txt."""
    lines = (CSRC / "sources.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split() for line in lines if line and not line.startswith("#")]
    return [ROOT / path for found, path in pairs if found == kind]


def run(command: list[str | Path], **options: object) -> subprocess.CompletedProcess[str]:
    """Run a command; its whole output is in the failure message."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=300, check=False, **options
    )  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


def emulated_library(folder: Path) -> Path:
    """Every CUDA source compiled by g++ against csrc/emulation, as one shared library with the C interface."""
    library = folder / "libcapt_emulated.so"
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "no C++ compiler"
    flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{CSRC}", "-x", "c++", "-c"]
    objects = [folder / f"{source.stem}.o" for source in sources("cuda")]
    for source, target in zip(sources("cuda"), objects, strict=True):
        run([compiler, *flags, source, "-o", target])
    run([compiler, "-shared", *objects, "-o", library])
    return library
