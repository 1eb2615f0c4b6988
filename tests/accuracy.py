"""Tolerances shared by the kernel tests: errors are measured against float64 and bounded by torch's own error."""

from __future__ import annotations

import torch
from torch import Tensor

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# batch, grid, channels, prefix, suffix: multiples of the vector widths, one more, one less, single rows and columns
ADAPTER_SHAPES = [
    (1, (1, 1), 1, 0, 0),
    (2, (1, 5), 16, 1, 0),
    (2, (5, 1), 15, 0, 2),
    (3, (3, 4), 33, 2, 1),
    (2, (7, 7), 64, 1, 0),
    (1, (9, 10), 130, 1, 3),
]


def relative_l2(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in float64; NaN counts as infinite error."""
    difference = (found.double() - expected.double()).norm()
    value = float(difference / expected.double().norm().clamp_min(1e-30))
    return value if value == value else float("inf")


def assert_as_accurate_as_torch(found: Tensor, torch_own: Tensor, oracle: Tensor, inputs: Tensor) -> None:
    """Largest error against float64 at most twice torch's own in the same precision, plus one rounding quantum.

    The quantum is that of the larger of results and inputs: a sum that cancels keeps the rounding of its terms.
    """
    assert found.isfinite().all()
    quantum = torch.finfo(found.dtype).eps * max(float(oracle.abs().max()), float(inputs.abs().max()))
    own = float((torch_own.double() - oracle).abs().max())
    error = float((found.double() - oracle).abs().max())
    assert error <= 2 * own + quantum, f"error {error:.3g} against {own:.3g} of torch and quantum {quantum:.3g}"
    limit = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[found.dtype]
    assert relative_l2(found, oracle) <= limit or oracle.numel() < 10  # a ratio of norms needs more than a few values
