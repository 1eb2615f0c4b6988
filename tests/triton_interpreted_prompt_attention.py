"""Run by test_prompt_attention_triton.py in its own process: Triton reads TRITON_INTERPRET when kernels are decorated.

``python -m tests.triton_interpreted_prompt_attention OP COUNT`` prints how many problems it ran and every complaint.
bfloat16 is left out: the interpreter computes it wrongly.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

os.environ["TRITON_INTERPRET"] = "1"

import torch

from capt.kernels import prompt_attention as kernels
from capt.kernels import prompt_attention_shared as shared_kernels
from tests.prompt_attention_backends import PARITIES, complaint, operators
from tests.quick_interpreter import quicken

# The interpreter's cost is per program and operation: mostly blocks that hold a whole small problem, and for every
# eighth one blocks that cut it into several with tails.
GATHERED = {False: (32, 32), True: (8, 16)}
SHARED = {False: {512: (64, 64, 4, 1)}, True: {512: (16, 16, 4, 1)}}


def choose_blocks(small: bool) -> None:
    """Set the blocks of every kernel."""
    kernels.BLOCK_R, kernels.BLOCK_D = GATHERED[small]
    shared_kernels.CONFIGS = {key: SHARED[small] for key in shared_kernels.CONFIGS}


def repeats_are_identical(parity: ModuleType, ops: SimpleNamespace) -> bool:
    """Whether 100 runs of a tiny problem, forward and backward, give the same bits."""
    every = [parity.problem(seed) for seed in range(0, 300, 3)]
    # Finite, because NaN is not equal to itself.
    usable = [p for p in every if p.options["needs"][1] and all(v.numel() and v.isfinite().all() for v in p.arguments)]
    problem = min(usable, key=lambda p: sum(v.numel() for v in p.arguments))
    problem.options["needs"] = (True, True, True, problem.options.get("log_prior", 0) is not None)
    with patch.object(parity, "ops", ops):
        first = parity.run(problem)
        runs = (parity.run(problem) for _ in range(99))
        return all(all(map(torch.equal, first, again)) for again in runs)


def main() -> None:
    """Compare seeded problems with the reference."""
    quicken()
    torch.set_num_threads(1)
    ops = operators(
        (kernels.prompt_attention, kernels.prompt_attention_backward),
        (kernels.prompt_attention_shared, kernels.prompt_attention_shared_backward),
    )
    op, count = sys.argv[1], int(sys.argv[2])
    seeds = [seed for seed in range(3 * count) if seed % 3 < 2][:count]
    complaints = []
    for position, seed in enumerate(seeds):
        choose_blocks(position % 8 == 0)
        if text := complaint(PARITIES[op], seed, ops):
            complaints.append(text)
    if not repeats_are_identical(PARITIES[op], ops):
        complaints.append("repeats differ")
    print(f"{len(seeds)} problems", *complaints, sep="\n")


if __name__ == "__main__":
    main()
