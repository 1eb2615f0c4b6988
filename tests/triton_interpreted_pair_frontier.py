"""Run by test_pair_frontier_triton.py in its own process: Triton reads TRITON_INTERPRET when kernels are decorated.

Prints the number of problems and one line for each complaint.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from benchmarks.gpu_parts import same_bits
from benchmarks.parity import Problem
from benchmarks.parity import pair_frontier as parity
from capt import ops
from capt.kernels import pair_frontier as kernels
from capt.ops import _plan
from tests.quick_interpreter import quicken

#: Pairs of the problems. With these blocks a row spans several programs of several blocks.
SIZES = (0, 1, 5, 8, 40, 67)
kernels.MAX_BLOCK, kernels.SPAN, kernels.MAX_TABLE, kernels.MAX_SLOTS = 16, 32, 32, 64


def interpretable(problem: Problem) -> Problem:
    """The interpreter computes with bfloat16 wrongly, and 16-bit values are exact in float32."""

    def wide(value: object) -> object:
        return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value

    arguments = tuple(value.float() if value.dtype == torch.bfloat16 else value for value in problem.arguments)
    options = {name: wide(value) for name, value in problem.options.items()}
    return Problem(problem.label, arguments, options, problem.exact)


def main() -> None:
    """Drive the whole op, its backend forced, with the Triton launcher registered for the CPU."""
    torch.set_num_threads(1)
    quicken()
    torch.library.impl("capt_triton::pair_frontier", "cpu", kernels.pair_frontier)
    # A forced backend is checked against the device; the interpreter runs Triton on the CPU.
    place = _plan.Dispatch.obstacle
    _plan.Dispatch.obstacle = lambda self, backend, device, dtype: place(self, backend, "cuda", dtype)
    complaints, n = [], 0
    for seed in range(500):
        batch = 1 if seed % 50 else 0
        problem = interpretable(parity.problem(seed, n_pairs=SIZES[seed // 36 % len(SIZES)], batch=batch))
        complaints.append(parity.complaint(problem, parity.run(problem, backend="triton")))
        n += 1
    for seed in range(8):  # several rows a launch, and the same bits each time: 104 repeats
        problem = interpretable(parity.problem(36 + 5 * seed, n_pairs=70, batch=3))
        found = parity.run(problem, backend="triton")
        complaints.append(parity.complaint(problem, found))
        same = all(same_bits(found, parity.run(problem, backend="triton")) for _ in range(13))
        complaints.append("" if same else f"{problem.label}: not repeatable")
    assert isinstance(ops.explain("pair_frontier", batch=1, n_pairs=4, backend="triton"), _plan.Plan)
    print(n)
    print("\n".join(filter(None, complaints)))


if __name__ == "__main__":
    main()
