"""Run by test_grid_adapter_triton.py in its own process: Triton reads TRITON_INTERPRET when kernels are decorated.

Prints one line per case: name, relative L2 error. bfloat16 is left out: the interpreter computes it wrongly.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from capt import reference
from capt.kernels import grid_adapter as kernels
from tests.accuracy import relative_l2

# Small blocks, so that a small shape still has several programs in each direction, with tails.
kernels.BLOCK_P, kernels.BLOCK_C = 8, 16
CASES = [(1, (1, 1), 1, 0, 0), (2, (3, 4), 20, 1, 1), (2, (5, 2), 16, 0, 0)]


def main() -> None:
    """Compare both kernels with the reference."""
    torch.manual_seed(0)
    for batch, grid, dim, n_prefix, n_suffix in CASES:
        for dtype in (torch.float32, torch.float16):
            length = n_prefix + grid[0] * grid[1] + n_suffix
            tokens = torch.randn(batch, length + 1, dim + 3).to(dtype)[:, 1:, :dim]
            grad, weight = torch.randn(batch, length, dim).to(dtype), torch.randn(dim, 3, 3)
            label = f"{batch}x{grid[0]}x{grid[1]}x{dim}-{str(dtype).removeprefix('torch.')}"
            alphas = {"number": None, "one": torch.rand(1), "image": torch.rand(batch)}
            # The interpreter is slow: each variant is run on one shape, in float32; the others take one of them.
            every = dtype == torch.float32 and dim == 20
            for transpose in (False, True) if every else (True,):
                used = (weight.flip(1, 2) if transpose else weight).double()
                for name in alphas if every else ("image",):
                    alpha = alphas[name]
                    out = kernels.grid_adapter(tokens, weight, alpha, 0.5, *grid, n_prefix, transpose)
                    factor = 0.5 if alpha is None else alpha.double() * 0.5
                    want = reference.grid_adapter(tokens.double(), used, factor, grid, n_prefix)
                    print(f"adapter-{label}-{name}-{transpose}", relative_l2(out, want.to(dtype)))
            partial = kernels.grid_adapter_correlate(tokens, grad, *grid, n_prefix)
            probe = torch.zeros(batch, dim, 3, 3, dtype=torch.float64, requires_grad=True)
            total = sum(
                (reference.grid_adapter(tokens[b : b + 1].double(), probe[b], 1.0, grid, n_prefix) * grad[b]).sum()
                for b in range(batch)
            )
            (want,) = torch.autograd.grad(total, probe)
            print(f"correlate-{label}", relative_l2(partial, want.reshape(batch, dim, 9).transpose(1, 2)))
    inf = torch.full((1, 5, 4), float("inf"))
    out = kernels.grid_adapter(inf, torch.zeros(4, 3, 3), None, 1.0, 2, 2, 1, False)
    print("outside-the-grid", float(not out[:, 0].isinf().all()))


if __name__ == "__main__":
    main()
