"""The CUDA sources, compiled by g++ against the block emulation and executed on the CPU.

This covers indexing, borders, masks, barriers, shared memory and rounding. It does not cover data races or timing.
"""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks.gpu_parts import same_bits
from benchmarks.parity import Problem
from benchmarks.parity import grid_adapter as parity
from capt import reference
from tests.accuracy import ADAPTER_SHAPES, DTYPES, assert_as_accurate_as_torch, relative_l2
from tests.native_build import CSRC, run

POINTER, LONG = ctypes.c_void_p, ctypes.c_int64


class Adapter(ctypes.Structure):
    """struct CaptGridAdapter of csrc/grid_adapter.h."""

    _fields_ = [
        *((name, POINTER) for name in ("tokens", "weight", "alpha", "out")),
        *((name, LONG) for name in ("batch", "length", "dim", "height", "width", "n_prefix")),
        *((name, LONG) for name in ("batch_stride", "token_stride", "alpha_stride")),
        ("scale", ctypes.c_float),
        ("transpose", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
    ]


class Correlate(ctypes.Structure):
    """struct CaptGridCorrelate of csrc/grid_adapter.h."""

    _fields_ = [
        *((name, POINTER) for name in ("tokens", "grad", "partial")),
        *((name, LONG) for name in ("batch", "length", "dim", "height", "width", "n_prefix")),
        *((name, LONG) for name in ("batch_stride", "token_stride", "grad_batch_stride", "grad_token_stride")),
        ("dtype", ctypes.c_int32),
    ]


def run_adapter(library, tokens, weight, alpha, scale, grid, n_prefix, transpose):
    batch, length, dim = tokens.shape
    guard = 32
    buffer = torch.full((tokens.numel() + 2 * guard,), float("nan"), dtype=tokens.dtype)
    out = buffer[guard:-guard].view(tokens.shape)
    args = Adapter(
        tokens.data_ptr(), weight.data_ptr(), None if alpha is None else alpha.data_ptr(), out.data_ptr(),
        batch, length, dim, *grid, n_prefix, tokens.stride(0), tokens.stride(1),
        int(alpha is not None and alpha.numel() == batch), scale, int(transpose), DTYPES.index(tokens.dtype),
    )  # fmt: skip
    assert library.capt_grid_adapter_cuda(ctypes.byref(args), None) == 0
    assert buffer[:guard].isnan().all() and buffer[-guard:].isnan().all()
    return out


def run_correlate(library, tokens, grad, grid, n_prefix):
    batch, _, dim = tokens.shape
    partial = torch.full((batch, 9, dim), float("nan"))
    args = Correlate(
        tokens.data_ptr(), grad.data_ptr(), partial.data_ptr(), *tokens.shape, *grid, n_prefix,
        tokens.stride(0), tokens.stride(1), grad.stride(0), grad.stride(1), DTYPES.index(tokens.dtype),
    )  # fmt: skip
    assert library.capt_grid_correlate_cuda(ctypes.byref(args), None) == 0
    return partial


def run_problem(library, problem: Problem):
    """What parity.run returns: the forward, and the gradients as the op's backward composes them."""
    tokens, weight, upstream = problem.arguments
    alpha, grid, n_prefix = (problem.options[name] for name in ("alpha", "grid", "n_prefix"))
    if tokens.shape[2] > 1 and tokens.stride(2) != 1:
        tokens = tokens.contiguous()  # as the binding does
    factor, scale = (alpha.reshape(-1), 1.0) if isinstance(alpha, torch.Tensor) else (None, alpha)
    out = run_adapter(library, tokens, weight, factor, scale, grid, n_prefix, False)
    grad_tokens = run_adapter(library, upstream, weight, factor, scale, grid, n_prefix, True)
    partial = run_correlate(library, tokens, upstream, grid, n_prefix) * scale
    mixed = partial if factor is None else partial * factor.reshape(-1, 1, 1)
    found = [out, grad_tokens, mixed.sum(0).t().reshape(weight.shape)]
    if factor is not None:
        per_image = (partial * weight.reshape(-1, 9).t()).sum((1, 2))
        found.append((per_image if len(factor) == len(per_image) else per_image.sum()).reshape(alpha.shape))
    return tuple(found)


def test_500_seeded_problems(emulated):
    complaints = []
    for seed in range(500):
        problem = parity.problem(seed)
        complaints.append(parity.complaint(problem, run_problem(emulated, problem)))
    assert not any(complaints), [f"seed {seed}: {text}" for seed, text in enumerate(complaints) if text][:5]


def test_100_repeats_give_the_same_bits(emulated):
    for seed in range(3):  # one of each dtype
        problem = parity.problem(seed, sizes=[(3, (3, 4), 33, 2, 1)])
        first = run_problem(emulated, problem)
        assert all(same_bits(first, run_problem(emulated, problem)) for _ in range(100))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ADAPTER_SHAPES)
@pytest.mark.parametrize("transpose", [False, True])
def test_forward_and_input_gradient(emulated, shape, dtype, transpose):
    batch, grid, dim, n_prefix, n_suffix = shape
    tokens = torch.randn(batch, n_prefix + grid[0] * grid[1] + n_suffix, dim).to(dtype)
    weight, alpha = torch.randn(dim, 3, 3), torch.rand(batch)
    out = run_adapter(emulated, tokens, weight, alpha, 0.5, grid, n_prefix, transpose)
    used = weight.flip(1, 2) if transpose else weight
    oracle = reference.grid_adapter(tokens.double(), used.double(), alpha.double() * 0.5, grid, n_prefix)
    own = reference.grid_adapter(tokens, used, alpha * 0.5, grid, n_prefix)
    assert_as_accurate_as_torch(out, own, oracle, tokens)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ADAPTER_SHAPES)
def test_weight_gradient_of_each_image(emulated, shape, dtype):
    batch, grid, dim, n_prefix, n_suffix = shape
    tokens = torch.randn(batch, n_prefix + grid[0] * grid[1] + n_suffix, dim).to(dtype)
    grad = torch.randn(tokens.shape).to(dtype)
    partial = run_correlate(emulated, tokens, grad, grid, n_prefix)
    for b in range(batch):
        probe = torch.zeros(dim, 3, 3, dtype=torch.float64, requires_grad=True)
        out = reference.grid_adapter(tokens[b : b + 1].double(), probe, 1.0, grid, n_prefix)
        (want,) = torch.autograd.grad((out * grad[b : b + 1].double()).sum(), probe)
        assert relative_l2(partial[b], want.reshape(dim, 9).t()) < 1e-5


def test_strided_misaligned_and_number_alpha(emulated):
    weight = torch.randn(8, 3, 3)
    big = torch.randn(2, 9, 24)
    for view in (big[:, :7, 3:11], big[:, 1:8, 4:12], big[:1, :7, :8].expand(2, -1, -1)):
        out = run_adapter(emulated, view, weight, None, 0.7, (2, 3), 1, False)
        torch.testing.assert_close(out, reference.grid_adapter(view, weight, 0.7, (2, 3), 1))
    one = torch.tensor([2.0])
    out = run_adapter(emulated, big[:, :7, :8], weight, one, 0.5, (2, 3), 1, False)
    torch.testing.assert_close(out, reference.grid_adapter(big[:, :7, :8], weight, 1.0, (2, 3), 1))


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory) -> Path:
    """tests/native/emulation_check.cpp with the CUDA sources, under the address and undefined-behaviour sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    program = folder / "emulation_check"
    flags = ["-std=c++17", "-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CSRC}"]
    check = Path(__file__).with_name("native") / "emulation_check.cpp"
    run([shutil.which("g++") or "c++", *flags, "-Wno-unknown-pragmas", check, "-o", program])
    return program


def test_kernels_are_clean_under_sanitizers(sanitized):
    assert "grid_adapter: 18 cases" in run([sanitized]).stdout


def test_a_read_past_the_end_would_be_caught(sanitized):
    done = _run_anyway([sanitized, "overrun"])
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


def test_a_divergent_barrier_would_be_caught(sanitized):
    done = _run_anyway([sanitized, "divergence"])
    assert done.returncode != 0 and "wait at a barrier" in done.stderr


def _run_anyway(command):
    import subprocess

    return subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=120, check=False)
