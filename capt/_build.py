"""Finds and loads the native part: what was built, whether it loads here, and if not, why."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("capt_ops.so")
#: What the Python part expects of the library; one built from older sources lacks some.
OPS = (
    "asymmetric_loss",
    "attention_readout",
    "bank_topk",
    "bank_topk_ranges",
    "confusion_pairs",
    "expert_mix",
    "expert_router",
    "grid_adapter",
    "pair_frontier",
    "prompt_attention",
    "prompt_attention_shared",
)


@dataclass(frozen=True)
class NativeBuild:
    """State of the native library in this process.

    loaded: torch.ops.capt.* exist. reason: why not, empty if loaded. cuda: CUDA version the kernels were compiled
    with, None for a CPU build. cuda_archs: CMake architecture list. cpu_level: instruction set the CPU kernels use
    here. compiler: C++ compiler.
    """

    loaded: bool
    reason: str = ""
    cuda: str | None = None
    cuda_archs: str = ""
    cpu_level: str = ""
    compiler: str = ""


@cache
def native() -> NativeBuild:
    """Load the native library once and describe it. Never raises: a failure becomes ``reason``."""
    if not LIBRARY.is_file():
        return NativeBuild(
            False, "the native library was not built; reinstall capt with cmake, ninja and a C++ compiler"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
        from capt import _C
    except (OSError, RuntimeError, ImportError) as error:
        message = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        return NativeBuild(False, f"the native library does not load with torch {torch.__version__}: {message}")
    lacking = [name for name in OPS if not hasattr(torch.ops.capt, name)]
    if lacking:
        return NativeBuild(
            False, f"the native library is older than this capt (no {', '.join(lacking)}); reinstall capt"
        )
    info = _C.build_info()
    return NativeBuild(True, "", info["cuda"], info["cuda_archs"], info["cpu_level"], info["compiler"])
