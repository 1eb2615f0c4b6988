"""The CUDA kernels of expert_gating and their registration, executed on the CPU (csrc/emulation)."""

from __future__ import annotations

import ctypes
import importlib.util
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parity import expert_gating as parity
from capt import reference
from tests import expert_gating_chain as chain
from tests.accuracy import DTYPES
from tests.native_build import CSRC, run

KERNELS = ("expert_gating", "expert_mix")
NATIVE = Path(__file__).with_name("native")
DENSE, GATHER = 1, 2
SMALL, LARGE = 1, 2


class Mix(ctypes.Structure):
    """struct CaptExpertMixCuda of csrc/expert_gating_cuda.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "weights", "w_in", "b_in", "w_out", "b_out", "y", "workspace")),
        *((name, ctypes.c_int64) for name in ("tokens", "dim", "hidden", "experts", "seed")),
        ("dropout", ctypes.c_double),
        ("chunk", ctypes.c_int64),
        *((name, ctypes.c_int32) for name in ("path", "tile", "dtype")),
    ]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """Kernels and registration as one library; its ops are torch.ops.capt_emulated."""
    folder = tmp_path_factory.mktemp("expert_gating")
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler, "no C++ compiler"
    spec = importlib.util.find_spec("torch")
    assert spec and spec.origin
    torch_dir = Path(spec.origin).parent
    flags = ["-fPIC", "-Wall", "-Wextra", "-Wno-unknown-pragmas", f"-I{CSRC}", "-c"]
    objects = [folder / f"{name}.o" for name in (*KERNELS, "registration")]
    for name, target in zip(KERNELS, objects, strict=False):
        run([compiler, "-std=c++17", "-O1", *flags, "-x", "c++", CSRC / f"{name}.cu", "-o", target])
    stable = ["-std=c++20", "-isystem", torch_dir / "include", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    run([compiler, *stable, *flags, NATIVE / "expert_gating_emulated.cpp", "-o", objects[-1]])
    path = folder / "libexpert_gating.so"
    run([compiler, "-shared", *objects, torch_dir / "lib" / "libtorch_cpu.so", "-o", path])
    torch.ops.load_library(path)
    loaded = ctypes.CDLL(str(path))
    loaded.capt_expert_mix_cuda_workspace.restype = ctypes.c_int64
    return loaded


@pytest.fixture
def ops(library) -> Any:
    return torch.ops.capt_emulated


def mix(library, path, tile, chunk, x, weights, w_in, b_in, w_out, b_out, dropout, seed) -> Tensor:
    """expert_mix with the way of evaluation forced; a step over either end of y or of the workspace is noticed."""
    x, weights, w_in, b_in, w_out, b_out = (v.contiguous() for v in (x, weights, w_in, b_in, w_out, b_out))
    tokens, dim = x.shape
    guarded = torch.full((tokens + 2, dim), float("nan"), dtype=x.dtype)
    args = Mix(
        x.data_ptr(), weights.data_ptr(), w_in.data_ptr(), b_in.data_ptr(), w_out.data_ptr(), b_out.data_ptr(),
        guarded[1:].data_ptr(), None, tokens, dim, w_in.shape[1], w_in.shape[0], seed, dropout, chunk, path, tile,
        DTYPES.index(x.dtype),
    )  # fmt: skip
    size = library.capt_expert_mix_cuda_workspace(ctypes.byref(args))
    workspace = torch.full((size + 512,), 255, dtype=torch.uint8)
    start = -workspace.data_ptr() % 256
    args.workspace = workspace.data_ptr() + start
    assert library.capt_expert_mix_cuda(ctypes.byref(args), None) == 0
    assert (workspace[:start] == 255).all() and (workspace[start + size :] == 255).all()
    assert guarded[0].isnan().all() and guarded[-1].isnan().all()
    return guarded[1:-1].clone()


def forced(library, path: int, tile: int, chunk: int) -> Any:
    """The four ops with expert_mix evaluated one way."""
    native = torch.ops.capt_emulated
    return SimpleNamespace(
        expert_router=native.expert_router,
        expert_router_backward=native.expert_router_backward,
        expert_mix=lambda *args: mix(library, path, tile, chunk, *args),
        expert_mix_backward=native.expert_mix_backward,
    )


def ways(library, seed: int) -> Any:
    """Half of the problems as a call would choose; the others gathered or dense, in chunks, in small or large tiles."""
    if seed % 2 == 0:
        return torch.ops.capt_emulated
    tile = LARGE if seed % 16 == 1 else SMALL
    return forced(library, DENSE if seed % 8 == 3 else GATHER, tile, (0, 3, 17)[seed % 3])


@pytest.mark.parametrize("block", range(10))
def test_500_problems(library, block):
    for seed in range(50 * block, 50 * block + 50):
        problem = parity.problem(seed)
        assert parity.complaint(problem, chain.run(ways(library, seed), problem)) == "", problem.label


@pytest.mark.parametrize("seed", parity.LARGE_SEEDS[:6])
def test_large_problems(ops, seed):
    """Gathered rows and large tiles, as a call would choose them."""
    problem = parity.problem(seed)
    assert parity.complaint(problem, chain.run(ops, problem)) == "", problem.label


def layer(tokens: int, dim: int, hidden: int, experts: int, top_k: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(x, weights, w_in, b_in, w_out, b_out)."""
    x = torch.randn(tokens, dim)
    weights, _, _ = reference.expert_router(x, torch.randn(experts, dim), top_k)
    parts = (x, torch.randn(experts, hidden, dim) * dim**-0.5, torch.randn(experts, hidden),
             torch.randn(experts, dim, hidden) * hidden**-0.5, torch.randn(experts, dim))  # fmt: skip
    x, *rest = (value.to(dtype) for value in parts)
    return (x, weights, *rest)


# Tails and whole tiles, several tiles each way, a depth of several stages, split and not.
SHAPES = [(1, 1, 1, 1, 1), (65, 8, 136, 3, 2), (33, 200, 65, 2, 2), (9, 16, 600, 2, 1), (129, 9, 24, 5, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_ways_of_evaluation_agree(library, shape, dtype):
    args = layer(*shape, dtype)
    oracle = reference.expert_mix(*(value.double() for value in args), 0.25, 77)
    own = float((reference.expert_mix(*args, 0.25, 77).double() - oracle).abs().max())
    quantum = torch.finfo(dtype).eps * max(4.0, float(oracle.abs().max()))
    for path, tile, chunk in ((DENSE, SMALL, 0), (GATHER, SMALL, 0), (DENSE, LARGE, 70), (GATHER, LARGE, 0)):
        found = mix(library, path, tile, chunk, *args, 0.25, 77)
        assert float((found.double() - oracle).abs().max()) <= 2 * own + quantum, (path, tile)


def test_gathered_and_dense_rows_give_the_same_bits(library):
    args = layer(40, 24, 40, 4, 2, torch.bfloat16)
    found = [mix(library, path, SMALL, chunk, *args, 0.5, 3) for path in (DENSE, GATHER) for chunk in (0, 7)]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_100_repeats_are_bitwise_equal(ops):
    every = (p for p in map(parity.problem, range(1000)) if len(p.options["wanted"]) == 6)
    problem = next(p for p in every if 2 <= len(p.arguments[0]) <= 9)
    first = chain.run(ops, problem)
    for _ in range(99):
        again = chain.run(ops, problem)
        assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, again, strict=True))


def test_router_with_many_experts_and_blocks(ops):
    for tokens, dim, experts, top_k in ((70, 33, 37, 5), (9, 64, 16, 16), (3, 8, 17, 1), (0, 8, 3, 2)):
        x = (torch.randn(tokens, dim) * 8).round().to(torch.bfloat16) / 16
        gate = (torch.randn(experts, dim) * 8).round().to(torch.bfloat16) / 16
        found = ops.expert_router(x, gate, top_k)
        wanted = reference.expert_router(x, gate, top_k)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert torch.equal(found[2], wanted[2])
        leaves = [v.double().requires_grad_() for v in (x, gate)]
        weights, probs, _ = reference.expert_router(*leaves, top_k)
        upstream = [torch.randn(tokens, experts) for _ in range(2)]
        expected = torch.autograd.grad((weights, probs), leaves, [grad.double() for grad in upstream])
        grads = ops.expert_router_backward(*upstream, *found[:2], x, gate, True, True)
        torch.testing.assert_close(grads[0].double(), expected[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(grads[1].double(), expected[1], rtol=2e-2, atol=2e-2)


def test_long_sums_are_split_and_added_in_order(ops):
    tokens = 300  # three strips
    x, weights, *experts = layer(tokens, 5, 6, 2, 1, torch.float32)
    grad = torch.randn(tokens, 5)
    found = ops.expert_mix_backward(x, weights, *experts, 0.0, 0, grad, *[True] * 6)
    leaves = [value.double().requires_grad_() for value in (x, weights, *experts)]
    expected = torch.autograd.grad(reference.expert_mix(*leaves, 0.0, 0), leaves, grad.double())
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=1e-4)


def test_workspace_is_bounded(library):
    args = Mix(tokens=10**7, dim=768, hidden=3072, experts=8, path=GATHER, dtype=2)
    assert library.capt_expert_mix_cuda_workspace(ctypes.byref(args)) <= (256 << 20) + 4096


@pytest.mark.parametrize(
    "change, message",
    [
        ({"b_in": lambda v: v[:, 1:]}, "b_in must be"),
        ({"w_out": lambda v: v.transpose(1, 2)}, "w_out"),
        ({"weights": lambda v: v[1:]}, "weights must be"),
        ({"w_in": lambda v: v.double()}, "dtype of x"),
        ({"dropout": lambda _: 1.0}, "dropout must lie"),
    ],
)
def test_bad_arguments_name_the_argument(ops, change, message):
    names = ("x", "weights", "w_in", "b_in", "w_out", "b_out", "dropout", "seed")
    args = dict(zip(names, (*layer(3, 4, 5, 2, 1, torch.float32), 0.0, 0), strict=True))
    for name, altered in change.items():
        args[name] = altered(args[name])
    with pytest.raises(RuntimeError, match=message):
        ops.expert_mix(*args.values())


def test_kernels_are_clean_under_sanitizers(tmp_path):
    program = tmp_path / "expert_gating_check"
    flags = ["-std=c++17", "-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", f"-I{CSRC}"]
    compiler = shutil.which("g++") or "c++"
    kernels = [CSRC / f"{name}.cu" for name in KERNELS]
    run(
        [
            compiler,
            *flags,
            "-Wno-unknown-pragmas",
            NATIVE / "expert_gating_check.cpp",
            "-x",
            "c++",
            *kernels,
            "-o",
            program,
        ]
    )
    assert "expert_gating: 24 cases" in run([program]).stdout
