"""Run by test_asymmetric_loss_triton.py in its own process: Triton reads TRITON_INTERPRET when kernels are decorated.

Prints the number of problems and one line for each complaint.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.gpu_parts import same_bits
from benchmarks.parity import Problem
from benchmarks.parity import asymmetric_loss as parity
from capt.kernels import asymmetric_loss as kernels
from capt.ops import _plan
from tests.quick_interpreter import quicken

kernels.BLOCK = 64  # several programs for most problems


def interpretable(problem: Problem) -> Problem:
    """The interpreter computes with bfloat16 wrongly: its values are held in float32 instead."""
    logits, targets, upstream = problem.arguments
    logits = logits.float() if logits.dtype == torch.bfloat16 else logits
    return Problem(problem.label, (logits, targets, upstream), problem.options)


def main() -> None:
    """Drive the whole op with its gradient, its backend forced, with the Triton launcher registered for the CPU."""
    torch.set_num_threads(1)
    quicken()
    torch.library.impl("capt_triton::asymmetric_loss", "cpu", kernels.asymmetric_loss)
    # A forced backend is checked against the device; the interpreter runs Triton on the CPU.
    place = _plan.Dispatch.obstacle
    _plan.Dispatch.obstacle = lambda self, backend, device, dtype: place(self, backend, "cuda", dtype)
    complaints = []
    for seed in range(500):
        problem = interpretable(parity.problem(seed))
        complaints.append(parity.complaint(problem, parity.run(problem, backend="triton")))
    problem = interpretable(parity.problem(0, shape=(3, 90)))
    first = parity.run(problem, backend="triton")
    if not all(same_bits(first, parity.run(problem, backend="triton")) for _ in range(100)):
        complaints.append("repeated runs differ in their bits")
    print(500)
    print("\n".join(filter(None, complaints)))


if __name__ == "__main__":
    main()
