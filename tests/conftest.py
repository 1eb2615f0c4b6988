"""Shared by all tests: one thread, fixed seeds, no network."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Callable, Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "0")  # waiting threads must not burn a core that another test needs

import numpy as np
import pytest
import torch

torch.set_num_threads(1)

#: enum CaptLevel of csrc/capt.h
CPU_LEVELS = ("baseline", "avx2", "avx512", "avx512bf16", "amx")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random state, whatever ran before."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The C interface of every CUDA source, compiled by g++ against csrc/emulation."""
    from tests.native_build import emulated_library

    return ctypes.CDLL(str(emulated_library(tmp_path_factory.mktemp("emulation"))))


@pytest.fixture
def limit_cpu_level() -> Iterator[Callable[[int], int]]:
    """``limit_cpu_level(level)``: the CPU kernels use no higher instruction-set level; returns the level in use."""
    from capt._build import native

    assert native().loaded, native().reason
    yield torch.ops.capt.limit_cpu_level
    torch.ops.capt.limit_cpu_level(len(CPU_LEVELS))
