"""Registers, stack, spills, shared memory and special instructions of every GPU kernel, compiled without a GPU.

Shared memory of a CUDA kernel is what its code declares; what a launch adds is not in its code and so is 0 here: fixed
sizes are constants of their sources, and CAPT_ALLOW_SHARED refuses a launch that asks for more than the device has.
Every CUDA source must also compile to portable code (compute_80), which no table describes.

``python -m tests.kernel_resources cuda`` and ``... triton OP`` print a JSON table; ``--write`` records all of them in
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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tests.native_build import CSRC, ROOT, run, sources

TABLE = Path(__file__).parent / "data" / "kernel_resources.json"
SHARED_LIMIT = 232448  # bytes a block may use on sm_90
JOBS = 2  # compilers at a time
COMPILE_SECONDS = 900
#: Machine instructions whose loss would go unnoticed in the results: matrix products and asynchronous copies. By the
#: name that PTX has for them.
PTX_NAMES = {"HGMMA": "wgmma.mma_async", "HMMA": "mma.sync", "LDGSTS": "cp.async.c", "UTMALDG": "cp.async.bulk.tensor"}
SPECIAL = set(PTX_NAMES)


def cuda_table() -> dict[str, Any]:
    """Entry functions of all .cu files, from ptxas -v and the machine code."""
    nvcc = shutil.which("nvcc")
    assert nvcc, "nvcc is not on PATH"
    kernels: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(JOBS) as pool:
        for source, found in zip(
            sources("cuda"), pool.map(lambda s: _one_source(nvcc, s, Path(folder)), sources("cuda")), strict=True
        ):
            twice = kernels.keys() & found.keys()
            assert not twice, f"{source.name} has kernels that another source has, too: {sorted(twice)}"
            kernels |= found
    version = re.search(r"release (\S+),", run([nvcc, "--version"]).stdout)
    return {"compiler": f"nvcc {version[1] if version else 'unknown'}", "kernels": dict(sorted(kernels.items()))}


def _one_source(nvcc: str, source: Path, folder: Path) -> dict[str, dict[str, Any]]:
    portable = ["-gencode", "arch=compute_80,code=compute_80", f"-I{CSRC}"]
    _compile([nvcc, "-std=c++17", "-O3", *portable, "-c", str(source), "-o", str(folder / f"{source.stem}.portable.o")])
    target = folder / f"{source.stem}.o"
    gencode = ["-gencode", "arch=compute_90a,code=sm_90a"]
    flags = ["-std=c++17", "-O3", *gencode, "-Xptxas", "-v", f"-I{CSRC}", "-c"]
    log = _compile([nvcc, *flags, str(source), "-o", str(target)])
    found = _parse_ptxas(log)
    code = _instructions(target)
    for mangled, usage in found.items():
        usage["instructions"] = code.get(mangled, [])
    return dict(zip(_short_names(list(found)), found.values(), strict=True))


def _compile(command: list[str]) -> str:
    """What a compiler says; large sources take minutes."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stderr


def _parse_ptxas(log: str) -> dict[str, dict[str, Any]]:
    """Usage by mangled name."""
    entry = re.compile(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers([^\n]*)",
        re.DOTALL,
    )
    found = {}
    for mangled, stack, stores, loads, registers, rest in entry.findall(log):
        shared = re.search(r"(\d+) bytes smem", rest)
        found[mangled] = {
            "registers": int(registers),
            "stack": int(stack),
            "spills": int(stores) + int(loads),
            "shared": int(shared[1]) if shared else 0,
        }
    return found


def _short_names(mangled: list[str]) -> list[str]:
    """``grid_adapter_kernel<float, 4>`` out of mangled names with a file-dependent namespace."""
    if not mangled:
        return []
    readable = run([shutil.which("cu++filt") or "c++filt", *mangled]).stdout.splitlines()
    return [_short_name(full) for full in readable]


def _short_name(full: str) -> str:
    match = re.search(r"(\w+)(<.*>)?\((?!anonymous)", full)
    return re.sub(r"\((int|bool|unsigned int|long)\)", "", match[1] + (match[2] or "")) if match else full


def _instructions(binary: Path) -> dict[str, list[str]]:
    """Instructions of ``SPECIAL`` in the machine code of each kernel, by mangled name."""
    disassembler = shutil.which("cuobjdump") or str(_triton_tool("cuobjdump"))
    found: dict[str, set[str]] = {}
    names: set[str] = set()
    for line in run([disassembler, "--dump-sass", binary]).stdout.splitlines():
        if "Function :" in line:
            names = found.setdefault(line.split(":")[1].strip(), set())
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z]+)\b", line):
            names |= {match[1]} & SPECIAL
    return {name: sorted(held) for name, held in found.items()}


def _triton_tool(name: str) -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def triton_ops() -> list[str]:
    """Ops with variants to compile."""
    return [path.stem for path in sorted((ROOT / "tests" / "triton_variants").glob("[!_]*.py"))]


def triton_table(op: str) -> dict[str, Any]:
    """Every Triton kernel and configuration of an op, compiled ahead of time by a driver that owns no device."""
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
    variants = importlib.import_module(f"tests.triton_variants.{op}").variants
    kernels = {f"{op} {name}": _cubin_usage(compiled) for name, compiled in variants(MockTensor)}
    return {"compiler": f"triton {triton.__version__}", "kernels": kernels}


def _cubin_usage(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        log = run([_triton_tool("cuobjdump"), "--dump-resource-usage", file.name]).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", log)}
    return {
        "registers": usage["REG"],
        "stack": usage["STACK"],
        "spills": usage["LOCAL"],
        "shared": int(compiled.metadata.shared),
        "instructions": sorted(name for name in SPECIAL if PTX_NAMES[name] in compiled.asm["ptx"]),
    }


def in_own_process(kind: str, op: str = "") -> dict[str, Any]:
    """A table made by a fresh interpreter (Triton's driver can be replaced only before its first use)."""
    if kind == "triton" and not op:
        with ThreadPoolExecutor(JOBS) as pool:
            tables = list(pool.map(lambda name: in_own_process("triton", name), triton_ops()))
        kernels = {name: usage for table in tables for name, usage in table["kernels"].items()}
        return {"compiler": tables[0]["compiler"], "kernels": kernels}
    command = [sys.executable, "-m", "tests.kernel_resources", kind, *([op] if op else [])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=2 * COMPILE_SECONDS, check=False)
    assert done.returncode == 0, done.stderr
    table: dict[str, Any] = json.loads(done.stdout)
    return table


def main() -> None:
    """Print one table, or record both."""
    if sys.argv[1:] == ["--write"]:
        TABLE.parent.mkdir(exist_ok=True)
        recorded = {kind: in_own_process(kind) for kind in ("cuda", "triton")}
        TABLE.write_text(json.dumps(recorded, indent=2) + "\n", encoding="utf-8")
        return
    table = triton_table(sys.argv[2]) if sys.argv[1] == "triton" else cuda_table()
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
