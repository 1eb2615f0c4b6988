"""The compiled bank_topk kernels hold the instructions they were written for: tensor cores, WGMMA, TMA, cp.async."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
from pathlib import Path

import pytest

from capt import _build
from tests.native_build import run

#: Instructions of each kernel, by its name in the library (16-bit ones; float32 has no tensor-core product).
PROMISED = {"bank_topk_hopper_kernel": ("HGMMA", "UTMALDG"), "bank_topk_kernel": ("HMMA", "LDGSTS")}


def disassembler_folder() -> Path | None:
    """Where cuobjdump and nvdisasm are: on PATH, or inside the Triton package."""
    found = shutil.which("cuobjdump")
    if found and shutil.which("nvdisasm"):
        return Path(found).parent
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
    return folder if (folder / "cuobjdump").exists() and (folder / "nvdisasm").exists() else None


FOLDER = disassembler_folder()


def opcodes(assembly: str) -> dict[str, set[str]]:
    """Opcodes without modifiers of every function in the output of cuobjdump -sass."""
    functions = re.split(r"Function : (\w+)", assembly)[1:]
    return {
        name: set(re.findall(r"\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9]+)", body))
        for name, body in zip(functions[::2], functions[1::2], strict=True)
    }


@pytest.mark.skipif("90a" not in _build.native().cuda_archs, reason="the library holds no sm_90a code (CAPT_CUDA=OFF)")
@pytest.mark.skipif(FOLDER is None, reason="cuobjdump and nvdisasm are neither on PATH nor in an installed triton")
def test_promised_instructions_are_there():
    path = f"{FOLDER}{os.pathsep}{os.environ['PATH']}"
    found = opcodes(run([FOLDER / "cuobjdump", "-sass", _build.LIBRARY], env={**os.environ, "PATH": path}).stdout)
    for kernel, instructions in PROMISED.items():
        halves = {name for name in found if kernel in name and f"{kernel}If" not in name}
        assert len(halves) == (6 if "hopper" in kernel else 4), kernel
        for name in halves:
            assert set(instructions) <= found[name], name
