"""Does a backend of grid_adapter compute what the reference defines? Used by benchmarks/gpu.py and by the CPU tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from capt import ops, reference

# batch, grid, channels, prefix, suffix
SHAPES = [(1, (1, 1), 1, 0, 0), (2, (3, 4), 33, 2, 1), (3, (7, 7), 64, 1, 0), (2, (14, 14), 768, 1, 4)]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}  # relative L2 error


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|; NaN counts as infinite."""
    found, expected = found.detach().double(), expected.detach().double()
    value = float((found - expected).norm() / expected.norm().clamp_min(1e-30))
    return value if value == value else float("inf")


def check_backend(backend: str, device: str) -> list[dict[str, Any]]:
    """Forward and all gradients on every shape and dtype against float64; repeated runs must be bitwise equal."""
    rows = []
    for batch, grid, dim, n_prefix, n_suffix in SHAPES:
        for dtype in DTYPES:
            length = n_prefix + grid[0] * grid[1] + n_suffix
            tokens = torch.randn(batch, length, dim, device=device).to(dtype)
            weight = torch.randn(dim, 3, 3, device=device)
            alpha, upstream = torch.rand(batch, device=device), torch.randn_like(tokens)
            leaves = [value.requires_grad_() for value in (tokens, weight, alpha)]
            exact = [value.detach().double().requires_grad_() for value in leaves]
            outs = [
                ops.grid_adapter(leaves[0], leaves[1], alpha=leaves[2], grid=grid, n_prefix=n_prefix, backend=backend)
                for _ in range(3)
            ]
            want = reference.grid_adapter(exact[0], exact[1], exact[2], grid, n_prefix)
            grads = [torch.autograd.grad(out, leaves, upstream) for out in outs]
            want_grads = torch.autograd.grad(want, exact, upstream.double())
            errors = [relative_l2(outs[0], want)]
            errors += [relative_l2(found, expected) for found, expected in zip(grads[0], want_grads, strict=True)]
            repeatable = all(torch.equal(outs[0], out) for out in outs) and all(
                torch.equal(a, b) for other in grads for a, b in zip(grads[0], other, strict=True)
            )
            rows.append(
                {
                    "backend": backend,
                    "shape": f"{batch}x{grid[0]}x{grid[1]}x{dim}+{n_prefix}+{n_suffix}",
                    "dtype": str(dtype).removeprefix("torch."),
                    "errors": [float(f"{error:.3g}") for error in errors],  # out, tokens, weight, alpha
                    "repeatable": repeatable,
                    "ok": repeatable and max(errors) <= LIMITS[dtype],
                }
            )
    return rows


def check_integration(backend: str, device: str) -> dict[str, str]:
    """opcheck, torch.compile without graph breaks; on a GPU also a side stream and a replayed CUDA graph."""
    outcome: dict[str, str] = {}
    tokens, weight = torch.randn(2, 10, 16, device=device), torch.randn(16, 3, 3, device=device)

    def step(x: Tensor) -> Tensor:
        return ops.grid_adapter(x, weight, alpha=0.5, grid=(3, 3), n_prefix=1, backend=backend)

    want = reference.grid_adapter(tokens, weight, 0.5, (3, 3), 1)
    namespace = torch.ops.capt_triton if backend == "triton" else torch.ops.capt
    args = (tokens.clone().requires_grad_(), weight.clone().requires_grad_(), None, 0.5, 3, 3, 1, False)
    torch.library.opcheck(namespace.grid_adapter, args)
    outcome["opcheck"] = "ok"
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(tokens), want)
    outcome["compile"] = "ok"
    if device == "cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # a late producer: a kernel on the wrong stream would read old values
            late = tokens * 2
            out = step(late)
        stream.synchronize()
        torch.testing.assert_close(out, want * 2)
        outcome["side stream"] = "ok"
        static = tokens.clone()
        step(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = step(static)
        for factor in (1.0, -3.0, 0.5):
            static.copy_(tokens * factor)
            graph.replay()
            torch.cuda.synchronize()
            torch.testing.assert_close(out, want * factor)
        outcome["cuda graph"] = "ok"
    return outcome
