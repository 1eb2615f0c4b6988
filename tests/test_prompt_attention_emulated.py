"""The CUDA kernels of prompt attention, compiled by g++ against the block emulation and executed on the CPU."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch

from tests.native_build import CSRC, run
from tests.prompt_attention_backends import PARITIES, complaint, operators
from tests.prompt_attention_emulation import Emulation


@pytest.fixture(scope="module")
def emulation(tmp_path_factory) -> Emulation:
    """Only the sources of these ops: no other test of this file needs the rest."""
    folder = tmp_path_factory.mktemp("prompt_attention")
    objects, compiler = [], shutil.which("g++") or "c++"
    for source in sorted(CSRC.glob("prompt_attention*.cu")):
        objects.append(folder / f"{source.stem}.o")
        flags = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{CSRC}"]
        run([compiler, *flags, "-x", "c++", "-c", source, "-o", objects[-1]])
    run([compiler, "-shared", *objects, "-o", folder / "library.so"])
    return Emulation(ctypes.CDLL(str(folder / "library.so")))


@pytest.fixture(scope="module")
def ops(emulation):
    """The emulated ops with gradients."""
    return operators(
        (emulation.gathered, emulation.gathered_backward), (emulation.shared, emulation.shared_backward)
    )  # fmt: skip


@pytest.mark.parametrize("start", range(0, 500, 100))
def test_gathered_problems(ops, start):
    complaints = [complaint(PARITIES["prompt_attention"], seed, ops) for seed in range(start, start + 100)]
    assert not [text for text in complaints if text]


@pytest.mark.parametrize("seed", [1003, 1007])
def test_wide_gathered_problems(ops, seed):
    assert complaint(PARITIES["prompt_attention"], seed, ops) == ""


def test_an_index_outside_the_table_is_an_absent_pair(emulation):
    query, table = torch.randn(1, 8), torch.randn(2, 3, 8)
    beyond = emulation.gathered(query, table, table, torch.tensor([[1, 9]]), torch.tensor([[2, -5]]), None, 1.0)
    absent = emulation.gathered(query, table, table, torch.tensor([[1, -1]]), torch.tensor([[-1, -1]]), None, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(beyond, absent, strict=True))
    assert not beyond[1].any()
