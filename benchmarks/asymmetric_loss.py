"""Cases of asymmetric_loss: forward and backward against eager and compiled forms, at the start and after training.

    python -m benchmarks.asymmetric_loss --out benchmarks/results/asymmetric_loss.json

times the sizes of the goal beside what no kernel can save: autograd around nothing. Processor time on one thread,
which other work on the machine disturbs least.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison import Case, Comparison, without_failing
from benchmarks.machine import machine_card
from benchmarks.rivals.asymmetric_loss import RIVALS
from benchmarks.timer import interleaved
from capt import ops, reference
from capt.files import write_json

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


class _Nothing(torch.autograd.Function):
    """Forward and backward of a loss that computes nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Tensor) -> Tensor:  # type: ignore[override]
        ctx.slope = slope
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.slope, None


def floors(batch: int, n_classes: int) -> dict[str, Callable[[], object]]:
    """What autograd costs without any loss in it, and the kernel without autograd."""
    x = torch.randn(batch, n_classes, requires_grad=True)
    slope, targets = torch.zeros(batch, n_classes), torch.rand(batch, n_classes) < 4 / n_classes

    def kernel() -> object:
        with torch.no_grad():
            return ops.asymmetric_loss(x, targets)

    return {
        "sum": lambda: torch.autograd.grad(x.sum(), x),
        "function of nothing": lambda: torch.autograd.grad(_Nothing.apply(x, slope), x),
        "ours, no gradient asked for": kernel,
    }


def times(shape: str) -> dict[str, Any]:
    """Microseconds of processor time of every form and floor, and the ratio to the best eager form."""
    batch, n_classes, *_ = SHAPES[shape]
    comparison = compare(shape, "float32", "both", "cpu", None)
    if wrong := comparison.verify():
        raise SystemExit(f"{shape}: {wrong}")
    functions: dict[str, Callable[[], object]] = {name: comparison.functions[name] for name in ("ours", *EAGER)}
    functions |= floors(batch, n_classes)
    timing = interleaved(functions, rounds=201 if batch * n_classes < 100_000 else 15, clock=time.process_time)
    spent = {name: round(1e3 * timing[name].median, 1) for name in functions}
    best = min(spent[name] for name in EAGER)
    return {"shape": shape, "us": spent, "ratio": round(best / spent["ours"], 2), "goal": GOALS[EAGER]}


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    shapes = [name for name, (_, n_classes, mean, _) in SHAPES.items() if n_classes >= 80 and mean == 0]
    found = {"machine": machine_card(), "times": [times(shape) for shape in shapes]}
    print(json.dumps(found, indent=2))
    if arguments.out:
        write_json(arguments.out, found)


if __name__ == "__main__":
    main()
