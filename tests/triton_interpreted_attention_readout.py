"""Run by test_attention_readout_triton.py in its own process: Triton reads TRITON_INTERPRET when kernels are decorated.

Prints the number of problems and one line for each complaint.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.gpu_parts import same_bits
from benchmarks.parity import Problem
from benchmarks.parity import attention_readout as parity
from capt.kernels import attention_readout as kernels
from capt.ops import _plan
from tests.quick_interpreter import quicken

#: Several steps for most problems, and several blocks of biases where there are more than 16.
kernels.CONFIGS = {256: (16, 4)}
kernels.MAX_BIASES = 16
# batch, length, heads, head dim, groups, biases. The interpreter takes its time for every program: most have few.
SIZES = [
    (1, 1, 1, 3, 1, 1),
    (1, 5, 1, 17, 2, 3),
    (1, 40, 1, 8, 2, 2),
    (0, 4, 2, 3, 2, 2),
    (1, 9, 2, 1, 1, 13),
    (1, 33, 1, 24, 1, 1),
]
SEVERAL = [(2, 7, 2, 5, 2, 18), (2, 20, 1, 20, 3, 2)]


def interpretable(problem: Problem) -> Problem:
    """The interpreter computes with bfloat16 wrongly: its values are held in float32 instead."""
    arguments = (value.float() if value.dtype == torch.bfloat16 else value for value in problem.arguments)
    return Problem(problem.label, tuple(arguments), problem.options)


def problem_of(seed: int) -> Problem:
    """A seeded problem of a size that suits the interpreter."""
    sizes = SEVERAL[seed // 25 % 2] if seed % 25 == 0 else SIZES[seed // 7 % len(SIZES)]
    return interpretable(parity.problem(seed, sizes=sizes))


def main() -> None:
    """Drive the whole op with its gradients, its backend forced, with the Triton launcher registered for the CPU."""
    torch.set_num_threads(1)
    quicken()
    torch.library.impl("capt_triton::attention_readout", "cpu", kernels.attention_readout)
    # A forced backend is checked against the device; the interpreter runs Triton on the CPU.
    place = _plan.Dispatch.obstacle
    _plan.Dispatch.obstacle = lambda self, backend, device, dtype: place(self, backend, "cuda", dtype)
    complaints = []
    for seed in range(500):
        problem = problem_of(seed)
        complaints.append(parity.complaint(problem, parity.run(problem, backend="triton")))
    problem = interpretable(parity.problem(0, sizes=(1, 9, 1, 5, 2, 3)))
    first = parity.run(problem, backend="triton")
    if not all(same_bits(first, parity.run(problem, backend="triton")) for _ in range(100)):
        complaints.append("repeated runs differ in their bits")
    print(500)
    print("\n".join(filter(None, complaints)))


if __name__ == "__main__":
    main()
