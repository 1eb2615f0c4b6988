"""The CUDA kernels of prompt attention, compiled by g++ against the block emulation and executed on the CPU."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

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


@pytest.mark.parametrize("seed", [1005, 1007, 1008])
def test_wide_gathered_problems(ops, seed):
    assert complaint(PARITIES["prompt_attention"], seed, ops) == ""


@pytest.mark.parametrize("start", range(0, 500, 100))
def test_shared_problems(ops, start):
    complaints = [complaint(PARITIES["prompt_attention_shared"], seed, ops) for seed in range(start, start + 100)]
    assert not [text for text in complaints if text]


@pytest.mark.parametrize("seed", [1000, 1004, 1007, 1012, 1013, 1016])
def test_wide_shared_problems(ops, seed):
    """Several tiles in each direction, on tensor cores: resident and streamed keys, heads up to 128."""
    assert complaint(PARITIES["prompt_attention_shared"], seed, ops) == ""


def test_results_are_bitwise_repeatable(emulation):
    query, table, index = torch.randn(3, 24), torch.randn(2, 3, 24), torch.randint(-1, 2, (3, 4))
    given = (query, table, table, index, index, None, 0.2)
    first = emulation.gathered(*given)
    grads = torch.randn(3, 24), torch.randn(3, 24)
    gradients = emulation.gathered_backward(*grads, *given, *first[2:], True, True, True)
    keys, rows = torch.randn(2, 20, 32).half(), torch.randn(7, 32).half()
    shared = emulation.shared(rows, rows, keys, keys, 2, 0.2)
    slopes = (shared[0], shared[1], shared[2], shared[3], rows, rows, keys, keys, *shared, 2, 0.2, True, True, True)
    shared_gradients = emulation.shared_backward(*slopes)
    for _ in range(100):
        again = (
            *emulation.gathered(*given),
            *emulation.gathered_backward(*grads, *given, *first[2:], True, True, True),
            *emulation.shared(rows, rows, keys, keys, 2, 0.2),
            *emulation.shared_backward(*slopes),
        )
        expected = (*first, *gradients, *shared, *shared_gradients)
        assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


def test_kernels_are_clean_under_sanitizers(tmp_path):
    program = tmp_path / "check"
    flags = ["-std=c++17", "-O1", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CSRC}"]
    check = Path(__file__).with_name("native") / "prompt_attention_check.cpp"
    kernels = sorted(CSRC.glob("prompt_attention*.cu"))
    command = [shutil.which("g++") or "c++", *flags, "-Wno-unknown-pragmas", check, "-x", "c++", *kernels]
    run([*command, "-o", program])
    assert "prompt_attention: 36 cases" in run([program]).stdout


def test_an_index_outside_the_table_is_an_absent_pair(emulation):
    query, table = torch.randn(1, 8), torch.randn(2, 3, 8)
    beyond = emulation.gathered(query, table, table, torch.tensor([[1, 9]]), torch.tensor([[2, -5]]), None, 1.0)
    absent = emulation.gathered(query, table, table, torch.tensor([[1, -1]]), torch.tensor([[-1, -1]]), None, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(beyond, absent, strict=True))
    assert not beyond[1].any()
