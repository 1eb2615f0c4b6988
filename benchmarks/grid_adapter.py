"""Cases of grid_adapter, shared by the CPU benchmark and the GPU run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.rivals.grid_adapter import RIVALS
from benchmarks.roofline import bandwidth, copy_function, share_of_floor
from benchmarks.timer import interleaved
from capt import ops

# name: batch, grid, channels; one class token everywhere
SHAPES = {
    "ViT-B/16 x1": (1, (14, 14), 768),
    "ViT-B/16 x4": (4, (14, 14), 768),
    "ViT-B/16 x32": (32, (14, 14), 768),
    "ViT-B/32 x32": (32, (7, 7), 768),
    "ViT-L/14-336 x8": (8, (24, 24), 1024),
    "small x4": (4, (4, 4), 64),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def functions(
    shape: str, dtype: str, direction: str, device: str = "cpu", backend: str | None = None
) -> dict[str, Callable[[], object]]:
    """``ours`` and every rival on the same inputs, forward or forward and backward."""
    batch, grid, dim = SHAPES[shape]
    tokens = torch.randn(batch, 1 + grid[0] * grid[1], dim, device=device).to(DTYPES[dtype])
    weight = torch.randn(dim, 3, 3, device=device) * 0.1
    cast = weight.to(DTYPES[dtype])

    def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ops.grid_adapter(x, w, alpha=0.5, grid=grid, n_prefix=1, backend=backend)

    forms: dict[str, Callable[..., torch.Tensor]] = {"ours": ours}
    forms |= {name: lambda x, w, rival=rival: rival(x, w, 0.5, grid, 1) for name, rival in RIVALS.items()}
    weights = {name: weight if name == "ours" else cast for name in forms}
    if direction == "forward":
        return {name: lambda form=form, w=weights[name]: form(tokens, w) for name, form in forms.items()}
    upstream = torch.randn_like(tokens)

    def both(form: Callable[..., torch.Tensor], kernel: torch.Tensor) -> Callable[[], object]:
        x, w = tokens.clone().requires_grad_(), kernel.clone().requires_grad_()
        return lambda: torch.autograd.grad(form(x, w), (x, w), upstream)

    return {name: both(form, weights[name]) for name, form in forms.items()}


def compare(shape: str, dtype: str, direction: str, device: str = "cpu", backend: str | None = None) -> dict[str, Any]:
    """One row: milliseconds, ratio against the best rival, share of the copy floor (forward only)."""
    batch, grid, dim = SHAPES[shape]
    runs = functions(shape, dtype, direction, device, backend)
    plan = ops.explain("grid_adapter", batch=batch, grid=grid, dim=dim, dtype=DTYPES[dtype], device=device,
                       backend=backend)  # fmt: skip
    n_bytes = plan.bytes
    times = interleaved({**runs, "copy": copy_function(n_bytes, device)}, device=device)
    best = min((name for name in times if name in RIVALS), key=lambda name: times[name].median)
    row: dict[str, Any] = {
        "shape": shape,
        "dtype": dtype,
        "direction": direction,
        "backend": plan.backend,
        "ms": round(times["ours"].median, 4),
        "ms_p20": round(times["ours"].low, 4),
        "ms_p80": round(times["ours"].high, 4),
        "best_rival": best,
        "best_rival_ms": round(times[best].median, 4),
        "ratio": round(times[best].median / times["ours"].median, 2),
        "ratio_to_permute": round(times["permute"].median / times["ours"].median, 2),
    }
    if direction == "forward":
        row["copy_GB_per_s"] = round(bandwidth(n_bytes, times["copy"].median), 1)
        row["share_of_floor"] = round(share_of_floor(n_bytes, times["ours"].median, n_bytes, times["copy"].median), 2)
    return row
