"""Cases of grid_adapter: token layouts of CLIP towers, in cache and out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.comparison import Case, Comparison
from benchmarks.parity import excess
from benchmarks.rivals.grid_adapter import RIVALS
from capt import ops, reference

# name: batch, grid, channels, belongs to the goal, belongs to the quick run; one class token everywhere
SHAPES = {
    "ViT-B/16 x8": (8, (14, 14), 768, True, True),
    "ViT-B/16 x16": (16, (14, 14), 768, True, False),
    "ViT-B/16 x32": (32, (14, 14), 768, True, False),
    "ViT-B/16 x64": (64, (14, 14), 768, True, True),
    "ViT-B/16 x1": (1, (14, 14), 768, False, False),
    "ViT-B/32 x32": (32, (7, 7), 768, False, False),
    "ViT-L/14-336 x8": (8, (24, 24), 1024, False, False),
    "small x4": (4, (4, 4), 64, False, False),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Three times as fast as the form the published repositories use; the careful form is reported beside it.
GOALS = {("permute",): 3.0}
ALPHA = 0.5


def cases(device: str = "cpu") -> Iterator[Case]:
    """Every shape, dtype and direction."""
    for shape, (*_, goal, quick) in SHAPES.items():
        for dtype in DTYPES:
            for direction in ("forward", "both"):
                build = partial(compare, shape, dtype, direction, device, GOALS if goal else {})
                yield Case("grid_adapter", shape, dtype, direction, quick, build)


def compare(
    shape: str, dtype: str, direction: str, device: str, goals: dict[tuple[str, ...], float], backend: str | None
) -> Comparison:
    """``ours`` and every rival on the same inputs, forward or forward and backward."""
    batch, grid, dim, *_ = SHAPES[shape]
    tokens = torch.randn(batch, 1 + grid[0] * grid[1], dim, device=device).to(DTYPES[dtype])
    weight = torch.randn(dim, 3, 3, device=device) * 0.1
    cast = weight.to(DTYPES[dtype])

    def ours(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ops.grid_adapter(x, w, alpha=ALPHA, grid=grid, n_prefix=1, backend=backend)

    forms: dict[str, Callable[..., torch.Tensor]] = {"ours": ours}
    forms |= {name: lambda x, w, rival=rival: rival(x, w, ALPHA, grid, 1) for name, rival in RIVALS.items()}
    weights = {name: weight if name == "ours" else cast for name in forms}
    plan = ops.explain(
        "grid_adapter", batch=batch, grid=grid, dim=dim, dtype=DTYPES[dtype], device=device, backend=backend
    )
    upstream = torch.randn_like(tokens)

    def both(form: Callable[..., torch.Tensor], kernel: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        x, w = tokens.clone().requires_grad_(), kernel.clone().requires_grad_()
        return lambda: torch.autograd.grad(form(x, w), (x, w), upstream)

    if direction == "forward":
        calls = {name: lambda form=form, w=weights[name]: (form(tokens, w),) for name, form in forms.items()}
        n_bytes, flops = plan.bytes, plan.flops
    else:
        calls = {name: both(form, weights[name]) for name, form in forms.items()}
        # forward and input gradient: read and write once each; weight gradient: two reads
        n_bytes, flops = 3 * plan.bytes, 3 * plan.flops

    def verify() -> str:
        few = slice(0, min(batch, 2))
        x, w = tokens[few].double().requires_grad_(), weight.double().requires_grad_()
        out = reference.grid_adapter(x, w, ALPHA, grid, 1)
        wanted = (out,) if direction == "forward" else torch.autograd.grad(out, (x,), upstream[few].double())
        exact = wanted[0].detach()
        for name, call in calls.items():
            found = call()[0][few]
            own = exact.to(DTYPES[dtype])
            # Rivals round the convolution before they add it: two quanta more.
            if wrong := excess(found.detach(), own, exact, 4 * float(exact.abs().max())):
                return f"{name}: {wrong}"
        return ""

    return Comparison(calls, verify, n_bytes, flops, "copy", goals)
