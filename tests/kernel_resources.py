"""Registers, stack, spills and shared memory of every GPU kernel, compiled for sm_90a without a GPU.

``python -m tests.kernel_resources cuda|triton`` prints a JSON table; ``--write`` records both in
tests/data/kernel_resources.json, which the tests compare against.
"""

from __future__ import annotations

import importlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.native_build import CSRC, ROOT, run, sources

TABLE = Path(__file__).parent / "data" / "kernel_resources.json"
SHARED_LIMIT = 232448  # bytes a block may use on sm_90


def cuda_table() -> dict[str, Any]:
    """Entry functions of the .cu files, from ptxas -v."""
    nvcc = shutil.which("nvcc")
    assert nvcc, "nvcc is not on PATH"
    kernels: dict[str, dict[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sources("cuda"):
            gencode = ["-gencode", "arch=compute_90a,code=sm_90a"]
            flags = ["-std=c++17", "-O3", *gencode, "-Xptxas", "-v", f"-I{CSRC}", "-c"]
            log = run([nvcc, *flags, source, "-o", Path(folder) / "kernel.o"]).stderr
            kernels |= _parse_ptxas(log)
    version = re.search(r"release (\S+),", run([nvcc, "--version"]).stdout)
    return {"compiler": f"nvcc {version[1] if version else 'unknown'}", "kernels": dict(sorted(kernels.items()))}


def _parse_ptxas(log: str) -> dict[str, dict[str, int]]:
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    found = {}
    for mangled, stack, stores, loads, registers, rest in entry.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[_short_name(mangled)] = {
            "registers": int(registers),
            "stack": int(stack),
            "spills": int(stores) + int(loads),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def _short_name(mangled: str) -> str:
    """``grid_adapter_kernel<float, 4>`` out of a mangled name with a file-dependent namespace."""
    full = run([shutil.which("cu++filt") or "c++filt", mangled]).stdout
    match = re.search(r"(\w+)<(.*)>\(", full)
    return f"{match[1]}<{match[2]}>".replace("(int)", "") if match else mangled


def triton_table() -> dict[str, Any]:
    """Every Triton kernel and configuration, compiled ahead of time through a driver that owns no device."""
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.driver import DriverBase
    from triton.runtime import driver
    from triton.runtime.jit import MockTensor

    class NoDevice(DriverBase):
        """Names the target and nothing else."""

        def __init__(self) -> None:
            super().__init__()

        @classmethod
        def is_active(cls) -> bool:
            return True

        def map_python_to_cpp_type(self, ty: str) -> str:
            return "int"

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

        def get_benchmarker(self) -> Any:
            return lambda function, quantiles=None: (function(), [0.0, 0.0, 0.0])[1]

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int = 0) -> int:
            return 0

        def get_device_interface(self) -> Any:
            return torch.cpu

    driver.set_active(NoDevice())
    kernels = {}
    for path in sorted((ROOT / "tests" / "triton_variants").glob("[!_]*.py")):
        variants = importlib.import_module(f"tests.triton_variants.{path.stem}").variants
        for name, compiled in variants(MockTensor):
            kernels[f"{path.stem} {name}"] = _cubin_usage(compiled)
    return {"compiler": f"triton {triton.__version__}", "kernels": kernels}


def _cubin_usage(compiled: Any) -> dict[str, int]:
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        log = run([cuobjdump, "--dump-resource-usage", file.name]).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", log)}
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "spills": usage["LOCAL"],
        "shared": int(compiled.metadata.shared),
    }


def in_own_process(kind: str) -> dict[str, Any]:
    """A table made by a fresh interpreter (Triton's driver can be replaced only before its first use)."""
    command = [sys.executable, "-m", "tests.kernel_resources", kind]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    table: dict[str, Any] = json.loads(done.stdout)
    return table


def main() -> None:
    """Print one table, or record both."""
    tables = {"cuda": cuda_table, "triton": triton_table}
    if sys.argv[1:] == ["--write"]:
        TABLE.parent.mkdir(exist_ok=True)
        recorded = {kind: in_own_process(kind) for kind in tables}
        TABLE.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
        return
    print(json.dumps(tables[sys.argv[1]](), indent=2))


if __name__ == "__main__":
    main()
