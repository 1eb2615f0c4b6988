"""Run by test_expert_gating_triton.py in its own process: Triton reads TRITON_INTERPRET when kernels are decorated.

Prints one line for each wrong problem, then how many problems there were. bfloat16 is left out: the interpreter computes
it wrongly.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.parity import expert_gating as parity
from capt.kernels import expert_gating as kernels
from tests import expert_gating_chain as chain

# The interpreter's time goes into programs: few of them, yet several in each direction, with tails.
for config in kernels.CONFIGS.values():
    config.update(BLOCK_N=16, BLOCK_C=64, BLOCK_K=64)
kernels.HIDDEN_CONFIG.update(BLOCK_N=16, BLOCK_H=64)
kernels.ROUTER_VALUES = 16 * 4 * 64


def main() -> None:
    """500 problems, and repeats of one."""
    torch.set_num_threads(1)
    seeds = [seed for seed in range(750) if parity.problem(seed).arguments[0].dtype != torch.bfloat16]
    for seed in seeds:
        problem = parity.problem(seed)
        complaint = parity.complaint(problem, chain.run(kernels, problem))
        if complaint:
            print(problem.label, complaint)
    problem = parity.problem(3)
    first = chain.run(kernels, problem)
    for _ in range(9):
        again = chain.run(kernels, problem)
        if not all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, again, strict=True)):
            print("repeats differ")
    print(f"{len(seeds)} problems")


if __name__ == "__main__":
    main()
