"""Cases of asymmetric_loss: forward and backward against eager and compiled forms, at the start and after training."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.comparison import Case, Comparison, without_failing
from benchmarks.rivals.asymmetric_loss import RIVALS
from capt import ops, reference

#: The goal names the eager forms; torch.compile, which takes a minute to start, is reported beside them (--all-shapes).
EAGER = ("textbook", "lean", "entropy")
GOALS = {EAGER: 4.0}
# name: batch, classes, mean of the logits (0: an untrained model, -5: nearly all negatives below the margin), quick
SHAPES = {
    "B16 C20": (16, 20, 0.0, False),
    "B16 C80": (16, 80, 0.0, True),
    "B16 C1000": (16, 1000, 0.0, True),
    "B16 C5000": (16, 5000, 0.0, False),
    "B256 C80": (256, 80, 0.0, False),
    "B256 C5000": (256, 5000, 0.0, True),
    "B16 C80, trained": (16, 80, -5.0, False),
    "B256 C5000, trained": (256, 5000, -5.0, False),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def cases(device: str = "cpu") -> Iterator[Case]:
    """Every shape in float32, those of an untrained model in bfloat16, too; the largest also forward alone."""
    for shape, (*_, mean, quick) in SHAPES.items():
        for dtype in DTYPES:
            if dtype == "float32" or mean == 0:
                yield _case(shape, dtype, "both", quick and dtype == "float32", device)
    yield _case("B256 C5000", "float32", "forward", False, device)


def _case(shape: str, dtype: str, direction: str, quick: bool, device: str) -> Case:
    def build(backend: str | None) -> Comparison:
        return compare(shape, dtype, direction, device, backend)

    return Case("asymmetric_loss", shape, dtype, direction, quick, build)


def compare(shape: str, dtype: str, direction: str, device: str, backend: str | None) -> Comparison:
    """``ours`` on bool targets, the rivals on float32 ones, which suit them best."""
    batch, n_classes, mean, quick = SHAPES[shape]
    logits = (torch.randn(batch, n_classes, device=device) * 2 + mean).to(DTYPES[dtype])
    targets = torch.rand(batch, n_classes, device=device) < 4 / n_classes
    floats = targets.float()

    def both(form: Callable[[Tensor, Tensor], Tensor], y: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        x = logits.clone().requires_grad_(direction == "both")

        def call() -> tuple[Tensor, ...]:
            loss = form(x, y)
            return (loss,) if direction == "forward" else (loss.detach(), *torch.autograd.grad(loss, x))

        return call

    def own(x: Tensor, y: Tensor) -> Tensor:
        return ops.asymmetric_loss(x, y, backend=backend)

    functions: dict[str, Callable[[], tuple[Tensor, ...]]] = {"ours": both(own, targets)}
    functions |= {name: both(rival, floats) for name, rival in RIVALS.items() if name in EAGER or not quick}

    def verify() -> str:
        x = logits.double().requires_grad_()
        loss = reference.asymmetric_loss(x, targets, 0.0, 4.0, 0.05, 1e-8, "mean")
        wanted = (loss.detach(), *torch.autograd.grad(loss, x))
        for name, function in functions.items():
            for found, want in zip(function(), wanted, strict=False):
                # Rivals lose digits of 1 - p, which float32 rounds.
                slack = 1e-6 if name == "ours" else 1e-5
                limit = (2 * torch.finfo(found.dtype).eps + slack) * float(want.abs().max())
                if not float((found.double() - want).abs().max()) <= limit:
                    return f"{name}: error {float((found.double() - want).abs().max()):.3g}, allowed {limit:.3g}"
        return ""

    plan = ops.explain(
        "asymmetric_loss", batch=batch, n_classes=n_classes, dtype=DTYPES[dtype], device=device, backend=backend
    )
    # The backward reads the slope and writes the gradient.
    n_bytes = plan.bytes + (logits.numel() * (4 + logits.element_size()) if direction == "both" else 0)
    goals = GOALS if direction == "both" and n_classes >= 80 else {}
    return Comparison(without_failing(functions), verify, n_bytes, plan.flops, "copy", goals)
