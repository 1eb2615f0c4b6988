"""The CUDA kernels of bank_topk, compiled by g++ against the block emulation and executed on the CPU.

Both the portable kernels and those for Hopper (TMA, WGMMA) run. What no emulation shows: data races, timing, and
whether the bits of a tensor map or a matrix descriptor mean to the hardware what they mean here.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.parity import Problem
from benchmarks.parity import bank_topk as parity
from capt import reference
from tests.accuracy import DTYPES
from tests.native_build import CSRC, run

POINTERS = ("queries", "rows", "ranges", "row_ids", "exclude", "scores", "index", "workspace")
SIZES = ("n_query", "n_rows", "dim", "n_pairs", "n_ranges", "k")
AUTO, PORTABLE, HOPPER = 0, 1, 2


class Args(ctypes.Structure):
    """struct CaptBankTopkCuda of csrc/bank_topk_cuda.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in SIZES),
        *((name, ctypes.c_int32) for name in ("dtype", "path", "parts", "tile")),
    ]


def search(
    library, problem: Problem, path: int = AUTO, parts: int = 0, tile: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores and row numbers by the emulated kernels; memory around the outputs and the workspace stays untouched."""
    queries, rows = (value.contiguous() for value in problem.arguments)
    options: dict[str, Any] = problem.options
    k, ranges = options["k"], options.get("ranges")
    shape = (*(ranges.shape[:2] if ranges is not None else queries.shape[:1]), k)
    given = [queries, rows, ranges, options.get("row_ids"), options.get("exclude")]
    given = [None if value is None else value.contiguous() for value in given]
    guard = 8
    count = torch.Size(shape).numel()
    scores = torch.full((count + 2 * guard,), 7.0)
    index = torch.full((count + 2 * guard,), 7, dtype=torch.int64)
    args = Args(
        *(None if value is None else value.data_ptr() for value in given),
        scores[guard:].data_ptr(), index[guard:].data_ptr(), None,
        *queries.shape[:1], *rows.shape, 1 if ranges is None else ranges.shape[1],
        0 if ranges is None else ranges.shape[2], k, DTYPES.index(queries.dtype), path, parts, tile,
    )  # fmt: skip
    library.capt_bank_topk_cuda_workspace.restype = ctypes.c_int64
    size = library.capt_bank_topk_cuda_workspace(ctypes.byref(args))
    workspace = torch.full((size + 16,), 0x5A, dtype=torch.uint8)
    args.workspace = workspace.data_ptr()
    assert library.capt_bank_topk_cuda(ctypes.byref(args), None) == 0
    assert (workspace[size:] == 0x5A).all()
    for value in (scores, index):
        assert (value[:guard] == 7).all() and (value[count + guard :] == 7).all()
    return scores[guard : count + guard].reshape(shape), index[guard : count + guard].reshape(shape)


def wrong(library, problems: Iterable[Problem], path: int) -> list[str]:
    """Complaints about problems, each with another number of parts."""
    found = [
        parity.complaint(problem, search(library, problem, path, parts=i % 4)) for i, problem in enumerate(problems)
    ]
    return [complaint for complaint in found if complaint]


def for_hopper(problem: Problem) -> bool:
    """16-bit values, lines of whole and aligned 16 bytes, the whole bank."""
    queries, rows = problem.arguments
    fits = queries.dtype != torch.float32 and queries.shape[1] % 8 == 0 and "ranges" not in problem.options
    aligned = all(value.contiguous().data_ptr() % 16 == 0 for value in problem.arguments)
    return fits and aligned and min(len(queries), len(rows)) > 0


def test_seeded_problems(emulated):
    assert wrong(emulated, map(parity.problem, range(500)), PORTABLE) == []


def test_seeded_problems_of_the_hopper_kernel(emulated, monkeypatch):
    monkeypatch.setattr(parity, "DIMS", (8, 16, 32, 64, 72, 136))
    seeds = (seed for seed in range(1700) if seed not in parity.LARGE_SEEDS)
    problems = [problem for problem in map(parity.problem, seeds) if for_hopper(problem)]
    assert len(problems) >= 500
    assert wrong(emulated, problems, HOPPER) == []


def integers(n_query: int, n_rows: int, dim: int, dtype: torch.dtype, **options: Any) -> Problem:
    """Small integers: products are exact in every precision, and many scores tie."""
    queries = torch.randint(-2, 3, (n_query, dim)).to(dtype)
    rows = torch.randint(-2, 3, (n_rows, dim)).to(dtype)
    return Problem("integers", (queries, rows), options, exact=True)


def assert_exact(library, problem: Problem, path: int, parts: int = 0, tile: int = 0) -> None:
    """Bitwise the reference."""
    want = reference.bank_topk(*problem.arguments, **problem.options)
    for found, expected in zip(search(library, problem, path, parts, tile), want, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("path", "tile"), [(PORTABLE, 16), (PORTABLE, 64), (HOPPER, 16), (HOPPER, 64), (HOPPER, 256)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_query_tile(emulated, path, tile, dtype):
    """Queries beyond one tile, several row tiles and parts, more slices than one, a short last slice."""
    if dtype == torch.float32 and path == HOPPER:
        path, tile = PORTABLE, min(tile, 64)
    problem = integers(tile + 5, 300, 72, dtype, k=3)
    assert_exact(emulated, problem, path, parts=2, tile=tile)


@pytest.mark.parametrize("path", [PORTABLE, HOPPER])
def test_lists_longer_than_a_fold(emulated, path):
    problem = integers(7, 700, 40, torch.bfloat16, k=150)
    for parts in (1, 5):
        assert_exact(emulated, problem, path, parts)


def test_more_slices_than_stages(emulated):
    for path, dtype in ((PORTABLE, torch.float32), (PORTABLE, torch.float16), (HOPPER, torch.float16)):
        assert_exact(emulated, integers(3, 140, 520, dtype, k=4), path, parts=1)


@pytest.mark.parametrize("path", [PORTABLE, HOPPER])
def test_every_score_equal_and_rising(emulated, path):
    """The worst orders for a threshold: all scores tie, and every row beats all before it."""
    queries = torch.ones(2, 8)
    for rows in (torch.ones(300, 8), torch.arange(250.0)[:, None] * torch.eye(8)[0]):
        for parts in (1, 2):
            problem = Problem("", (queries.half(), rows.half()), {"k": 40}, exact=True)
            assert_exact(emulated, problem, path, parts)


def test_k_has_no_limit(emulated):
    assert_exact(emulated, integers(2, 1300, 3, torch.float32, k=1200), PORTABLE, parts=2)
    ranges = torch.tensor([[[[0, 800], [700, 1300]]]])
    assert_exact(emulated, integers(1, 1300, 3, torch.float32, k=1500, ranges=ranges), PORTABLE, parts=8)


def test_only_the_rows_of_the_ranges_are_read(emulated):
    """Offsets beyond 2^32 elements; the rows outside the ranges are not in memory at all, only their addresses are."""
    rows, before = torch.randint(-2, 3, (40, 16)).float(), 1 << 28
    ranges = torch.tensor([[[[0, 20], [10, 40]]]])
    near = search(emulated, Problem("", (torch.ones(1, 16), rows), {"k": 5, "ranges": ranges}), PORTABLE, 2)
    bank = _pretend(rows, before, 1 << 31)
    far = search(emulated, Problem("", (torch.ones(1, 16), bank), {"k": 5, "ranges": ranges + before}), PORTABLE, 2)
    assert torch.equal(far[0], near[0]) and torch.equal(far[1], near[1] + before)


def _pretend(rows: torch.Tensor, before: int, total: int) -> Any:
    """A bank of `total` rows of which only those from `before` on exist."""

    class Bank:
        shape = (total, rows.shape[1])

        def contiguous(self) -> Bank:
            return self

        def data_ptr(self) -> int:
            return rows.data_ptr() - before * rows.shape[1] * rows.element_size()

    return Bank()


@pytest.mark.parametrize("path", [PORTABLE, HOPPER])
def test_repeats_and_parts_give_the_same_bits(emulated, path):
    problem = Problem("", (torch.randn(5, 64).half(), torch.randn(300, 64).half()), {"k": 9})
    first = search(emulated, problem, path, parts=1)
    for i in range(100):
        again = search(emulated, problem, path, parts=1 + i % 3)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


def test_workspace_is_bounded(emulated):
    emulated.capt_bank_topk_cuda_workspace.restype = ctypes.c_int64
    for n_query, n_rows, k in (
        (1, 1, 1),
        (16, 10**6, 100),
        (4096, 10**7, 1024),
        (10**6, 10**9, 2048),
        (1, 10**9, 10**8),
    ):
        args = Args(*[None] * 8, n_query, n_rows, 512, 1, 0, k, 2, AUTO, 0, 0)
        assert 0 <= emulated.capt_bank_topk_cuda_workspace(ctypes.byref(args)) <= 64 << 20


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory) -> Path:
    """tests/native/bank_topk_check.cpp and the kernels, under the address and undefined-behaviour sanitizers."""
    folder = tmp_path_factory.mktemp("sanitized")
    program = folder / "bank_topk_check"
    sanitize = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = ["-std=c++17", "-O0", *sanitize, f"-I{CSRC}", "-Wno-unknown-pragmas", "-x", "c++"]
    check = Path(__file__).with_name("native") / "bank_topk_check.cpp"
    kernels = [CSRC / "bank_topk.cu", CSRC / "bank_topk_hopper.cu"]
    run([shutil.which("g++") or "c++", *flags, check, *kernels, "-o", program])
    return program


def test_kernels_are_clean_under_sanitizers(sanitized):
    assert "bank_topk: 24 cases" in run([sanitized]).stdout


def test_a_bank_that_is_too_short_would_be_caught(sanitized):
    done = subprocess.run([sanitized, "overrun"], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
