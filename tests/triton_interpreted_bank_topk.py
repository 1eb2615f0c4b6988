"""Run by test_bank_topk_triton.py in its own process: Triton reads TRITON_INTERPRET when kernels are decorated.

Prints the number of problems and one line for each complaint.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from dataclasses import replace

import torch

from benchmarks.parity import bank_topk as parity
from capt.kernels import bank_topk as kernels
from capt.ops import _plan
from tests.quick_interpreter import quicken

# Tiny problems and blocks: several blocks, splits and groups of queries, and long lists in several walks.
parity.QUERIES, parity.DIMS, parity.ROWS = (1, 3), (1, 3, 17), (0, 1, 4, 9)
kernels.BLOCK_Q, kernels.BLOCK_N, kernels.RANGE_N, kernels.BLOCK_M = 2, 2, 4, 16
kernels.BLOCK_D = kernels.STRIDED_D = 16
kernels.MIN_LIST, kernels.MAX_LIST, kernels.MAX_LISTS, kernels.MIN_BLOCKS = 1, 4, 8, 2


def main() -> None:
    """Drive the whole op, its backend forced, with the Triton launchers registered for the CPU."""
    torch.set_num_threads(1)
    quicken()
    torch.library.impl("capt_triton::bank_topk", "cpu", kernels.bank_topk)
    torch.library.impl("capt_triton::bank_topk_ranges", "cpu", kernels.bank_topk_ranges)
    # A forced backend is checked against the device; the interpreter runs Triton on the CPU.
    place = _plan.Dispatch.obstacle
    _plan.Dispatch.obstacle = lambda self, backend, device, dtype: place(self, backend, "cuda", dtype)
    complaints = []
    for seed in range(500):
        problem = parity.problem(seed)
        # The interpreter computes with bfloat16 wrongly, and 16-bit values are exact in float32.
        if problem.arguments[0].dtype == torch.bfloat16:
            problem = replace(problem, arguments=tuple(value.float() for value in problem.arguments))
        found = parity.run(problem, backend="triton")
        complaints.append(parity.complaint(problem, found))
        if seed % 50 == 0:
            again = parity.run(problem, backend="triton")
            same = all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
            kernels.MAX_LISTS = 1  # one split
            unsplit = parity.run(problem, backend="triton")
            kernels.MAX_LISTS = 8
            same = same and all(torch.equal(a, b) for a, b in zip(found, unsplit, strict=True))
            complaints.append("" if same else f"{problem.label}: not the same bits again, or with other splits")
    for ranges in (None, torch.tensor([[[[0, 5], [3, 9]]]])):
        problem = parity.Problem("", (torch.randn(1, 3), torch.randn(9, 3)), {"k": 2, "ranges": ranges})
        first = parity.run(problem, backend="triton")
        for _ in range(100):
            again = parity.run(problem, backend="triton")
            if not all(
                torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, again, strict=True)
            ):
                complaints.append(f"repeats differ, ranges {ranges is not None}")
    print(seed + 1)
    print("\n".join(filter(None, complaints)))


if __name__ == "__main__":
    main()
