"""Run by test_expert_gating_triton.py in its own process: Triton reads TRITON_INTERPRET when kernels are decorated.

Prints one line for each wrong problem, then how many problems there were. bfloat16 is left out: the interpreter
computes it wrongly.
"""

from __future__ import annotations

import os
import warnings

os.environ["TRITON_INTERPRET"] = "1"
os.environ["OPENBLAS_NUM_THREADS"] = "1"

import torch

from benchmarks.parity import expert_gating as parity
from capt.kernels import expert_gating as kernels
from tests import expert_gating_chain as chain
from tests.quick_interpreter import quicken


def use_blocks(n: int, c: int, k: int) -> None:
    """Tiles of n tokens, c columns and k of depth in every kernel."""
    for config in kernels.CONFIGS.values():
        config.update(BLOCK_N=n, BLOCK_C=c, BLOCK_K=k)
    kernels.HIDDEN_CONFIG.update(BLOCK_N=n, BLOCK_H=c)
    kernels.ROUTER_VALUES = n * 8 * k


def main() -> None:
    """500 problems, and 100 repeats of one."""
    torch.set_num_threads(1)
    quicken()
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # NaN and infinity are part of the problems
    count, seed = 0, -1
    while count < 500:
        seed += 1
        problem = parity.problem(seed)
        x, gate = problem.arguments[:2]
        # The interpreter's time goes into programs: one problem in 25 is large and has several programs in each
        # direction, with tails.
        large = count % 25 == 0
        if x.dtype == torch.bfloat16 or (not large and (len(x) > 9 or len(gate) > 3)):
            continue
        use_blocks(*((16, 32, 32) if large else (16, 128, 128)))
        count += 1
        complaint = parity.complaint(problem, chain.run(kernels, problem))
        if complaint:
            print(problem.label, complaint)
    every = (parity.problem(seed) for seed in range(0, 600, 3))
    usable = (p for p in every if 2 <= len(p.arguments[0]) <= 9 and len(p.options["wanted"]) >= 5)
    problem = min(usable, key=lambda p: sum(v.numel() for v in p.arguments))
    use_blocks(16, 32, 32)
    first = chain.run(kernels, problem)
    for _ in range(99):
        again = chain.run(kernels, problem)
        if not all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(first, again, strict=True)):
            print("repeats differ")
    print(f"{count} problems")


if __name__ == "__main__":
    main()
