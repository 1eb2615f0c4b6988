"""Run by test_grid_adapter_triton.py in its own process: Triton reads TRITON_INTERPRET when kernels are decorated.

Prints the number of problems and one line for each complaint.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.gpu_parts import same_bits
from benchmarks.parity import grid_adapter as parity
from capt.kernels import grid_adapter as kernels
from capt.ops import _plan
from tests.quick_interpreter import quicken

#: With these blocks a small shape has several programs in each direction, with tails.
kernels.BLOCK_P, kernels.BLOCK_C = 8, 16
# batch, grid, channels, prefix, suffix. The interpreter takes its time for every program: most have one a launch.
SIZES = [
    (1, (1, 1), 1, 0, 0),
    (1, (1, 5), 16, 1, 0),
    (1, (5, 1), 15, 0, 2),
    (1, (2, 3), 5, 2, 0),
    (1, (3, 2), 9, 0, 0),
    (0, (2, 2), 8, 1, 0),
]
SEVERAL = [(2, (3, 3), 3, 1, 0), (1, (3, 4), 17, 1, 1)]


def problem_of(seed: int, sizes: list[tuple[int, tuple[int, int], int, int, int]]) -> parity.Problem:
    """A seeded problem. The interpreter computes with bfloat16 wrongly: its values are held in float32 instead."""
    problem = parity.problem(seed, sizes=sizes)
    tokens, weight, upstream = problem.arguments
    if tokens.dtype != torch.bfloat16:
        return problem
    return parity.Problem(problem.label, (tokens.float(), weight, upstream.float()), problem.options)


def main() -> None:
    """Drive the whole op with its gradients, its backend forced, with the Triton launchers registered for the CPU."""
    torch.set_num_threads(1)
    quicken()
    torch.library.impl("capt_triton::grid_adapter", "cpu", kernels.grid_adapter)
    torch.library.impl("capt_triton::grid_adapter_correlate", "cpu", kernels.grid_adapter_correlate)
    # A forced backend is checked against the device; the interpreter runs Triton on the CPU.
    place = _plan.Dispatch.obstacle
    _plan.Dispatch.obstacle = lambda self, backend, device, dtype: place(self, backend, "cuda", dtype)
    complaints, n = [], 0
    for seed in range(500):
        problem = problem_of(seed, SEVERAL if seed % 25 == 0 else SIZES)
        if wrong := parity.complaint(problem, parity.run(problem, backend="triton")):
            complaints.append(f"seed {seed}, {problem.label}: {wrong}")
        n += 1
    several = problem_of(1, [(1, (3, 3), 5, 1, 0)])
    first = parity.run(several, backend="triton")
    complaints.append(parity.complaint(several, first))
    if not all(same_bits(first, parity.run(several, backend="triton")) for _ in range(100)):
        complaints.append("repeated runs differ in their bits")
    print(n)
    print("\n".join(filter(None, complaints)))


if __name__ == "__main__":
    main()
