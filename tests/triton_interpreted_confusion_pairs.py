"""Run by test_confusion_pairs_triton.py in its own process: Triton reads TRITON_INTERPRET when kernels are decorated.

Prints the number of problems and one line for each complaint.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from benchmarks.gpu_parts import same_bits
from benchmarks.parity import confusion_pairs as parity
from capt import ops
from capt.kernels import confusion_pairs as kernels
from capt.ops import _plan
from tests.quick_interpreter import quicken

#: Classes of the problems. With these blocks a row spans several of them, and long lists several walks.
SIZES = (2, 3, 5, 8, 9)
kernels.MAX_BLOCK, kernels.MAX_LIST, kernels.CHUNK = 8, 8, 8


def main() -> None:
    """Drive the whole op, its backend forced, with the Triton launcher registered for the CPU."""
    torch.set_num_threads(1)
    quicken()
    torch.library.impl("capt_triton::confusion_pairs", "cpu", kernels.confusion_pairs)
    # A forced backend is checked against the device; the interpreter runs Triton on the CPU.
    place = _plan.Dispatch.obstacle
    _plan.Dispatch.obstacle = lambda self, backend, device, dtype: place(self, backend, "cuda", dtype)
    complaints, n = [], 0
    for seed in range(500):
        batch = 1 if seed % 72 else 0
        problem = parity.problem(seed, n_classes=SIZES[seed // 6 % len(SIZES)], batch=batch)
        (logits,) = problem.arguments
        # The interpreter computes with bfloat16 wrongly, and 16-bit values are exact in float32.
        if logits.dtype == torch.bfloat16:
            problem = parity.Problem(problem.label, (logits.float(),), problem.options, problem.exact)
        complaints.append(parity.complaint(problem, parity.run(problem, backend="triton")))
        n += 1
    for seed in range(8):  # several rows a launch, and the same bits each time: 104 repeats
        problem = parity.problem(432 + seed, n_classes=11, batch=3)
        found = parity.run(problem, backend="triton")
        complaints.append(parity.complaint(problem, found))
        same = all(same_bits(found, parity.run(problem, backend="triton")) for _ in range(13))
        complaints.append("" if same else f"{problem.label}: not repeatable")
    wide = parity.problem(2, n_classes=40, batch=1)
    kernels.MAX_BLOCK, kernels.MAX_LIST, kernels.CHUNK = 64, 32, 16
    complaints.append(parity.complaint(wide, parity.run(wide, backend="triton")))
    assert isinstance(ops.explain("confusion_pairs", batch=1, n_classes=4, backend="triton"), _plan.Plan)
    print(n)
    print("\n".join(filter(None, complaints)))


if __name__ == "__main__":
    main()
