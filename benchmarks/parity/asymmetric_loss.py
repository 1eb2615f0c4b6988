"""Problems of asymmetric_loss: both sides of each cut-off, logits up to infinity, reductions, odd sizes, strides."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity import Problem, excess
from capt import ops, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
REDUCTIONS = ("mean", "none", "sum")
SHAPES = ((0, 5), (3, 0), (1, 1), (1, 3), (2, 8), (3, 5), (1, 17), (4, 16), (5, 13), (3, 80))
#: Several blocks, and more of them than one task takes.
LARGE_SHAPES = ((16, 80), (7, 300), (3, 5000), (70, 520))
LARGE_SEEDS = range(1000, 1040)
VALUES = ("normal", "trained", "wide", "cut-offs", "extreme", "undefined")
GAMMAS = ((0.0, 4.0), (0.0, 4.0), (1.0, 2.0), (0.0, 0.0), (0.5, 2.5), (2.0, 1.0), (0.0, 90.0))
MARGINS = (0.05, 0.05, 0.0, 0.3, 1e-9)
EPS = (1e-8, 1e-8, 0.0, 1e-3)
TARGETS = (torch.bool, torch.uint8, torch.float32, torch.int64, torch.float16)


def problem(seed: int, *, shape: tuple[int, int] | None = None) -> Problem:
    """Logits and targets [B, C] and the upstream gradient; ``shape`` replaces the seed's choice."""
    random = torch.Generator().manual_seed(seed)

    def one_of(values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=random))]

    values, dtype, reduction = VALUES[seed % 6], DTYPES[seed // 6 % 3], REDUCTIONS[seed // 18 % 3]
    own_shape = one_of(LARGE_SHAPES if seed in LARGE_SEEDS else SHAPES)
    batch, n_classes = own_shape if shape is None else shape
    (gamma_pos, gamma_neg), margin, eps = one_of(GAMMAS), one_of(MARGINS), one_of(EPS)
    logits = _values(values, (batch, n_classes), margin, eps, random).to(dtype)
    targets = (torch.rand(batch, n_classes, generator=random) < one_of((0.1, 0.5))).to(one_of(TARGETS))
    layout = one_of(("dense", "dense", "part of a row", "transposed"))
    if layout == "part of a row":
        logits, targets = (torch.cat([value, value], 1)[:, :n_classes] for value in (logits, targets))
    elif layout == "transposed":
        logits = logits.t().contiguous().t()
    upstream = torch.randn(logits.shape if reduction == "none" else (), generator=random)
    options = {"gamma_pos": gamma_pos, "gamma_neg": gamma_neg, "margin": margin, "eps": eps, "reduction": reduction}
    label = f"{seed}: {values} {str(dtype)[6:]} {batch}x{n_classes} {targets.dtype} {layout} {options}"
    return Problem(label, (logits, targets, upstream), options)


def _values(kind: str, shape: tuple[int, int], margin: float, eps: float, random: torch.Generator) -> Tensor:
    normal = torch.randn(shape, generator=random)
    if kind == "normal":
        return normal * 2
    if kind == "trained":
        return normal * 2 - 5
    if kind == "wide":
        return normal * 40
    if kind == "cut-offs":  # close to where a slope begins or ends, and the places where float32 rounds p to 0 or 1
        chances = torch.tensor([1 - 1e-4, 0.5, *(value for value in (margin, eps, eps - margin) if value > 0)])
        places = torch.cat([chances.double().logit(), -chances.double().logit()]).float()
        return places[torch.randint(len(places), shape, generator=random)] + normal * 1e-3
    infinite = [math.inf, -math.inf, math.nan] if kind == "undefined" else []
    places = torch.tensor([0.0, -0.0, 18.4, -18.5, 88.8, -104.5, 100.0, -100.0, 6e4, -6e4, 1e-8, *infinite])
    return places[torch.randint(len(places), shape, generator=random)]


def call(problem: Problem, **options: Any) -> Tensor:
    """The loss alone."""
    logits, targets, _ = problem.arguments
    return ops.asymmetric_loss(logits, targets, **{**problem.options, **options})


def run(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """Loss, then the gradient of the logits."""
    logits, targets, upstream = problem.arguments
    leaf = logits.detach().requires_grad_()
    loss = ops.asymmetric_loss(leaf, targets, **{**problem.options, **options})
    return loss.detach(), *torch.autograd.grad(loss, leaf, upstream)


def _expected(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What ``run`` returns, by autograd of the reference in another precision."""
    logits, targets, upstream = problem.arguments
    leaf = logits.detach().to(dtype).requires_grad_()
    loss = reference.asymmetric_loss(leaf, targets, **problem.options)
    return loss.detach(), *torch.autograd.grad(loss, leaf, upstream.to(loss.dtype))


def complaint(problem: Problem, found: tuple[Tensor, ...]) -> str:
    """Dtypes, and errors against float64 autograd of at most twice those of the reference in the dtype of logits.

    Four units in the last place of the largest result are allowed on top: the exponential and the logarithm of a kernel
    err by one or two each, and a small problem may find torch's without any error.
    """
    logits = problem.arguments[0]
    exact, own = _expected(problem, torch.float64), _expected(problem, logits.dtype)
    for name, value, mine, want in zip(("loss", "gradient"), found, own, exact, strict=True):
        if value.dtype != mine.dtype:
            return f"{problem.label}: {name} is {value.dtype} instead of {mine.dtype}"
        largest = float(want[want.isfinite()].abs().max()) if want.isfinite().any() else 0.0
        if wrong := excess(value, mine, want, 4 * largest if value.dtype == torch.float32 else 0.0):
            return f"{problem.label}: {name}: {wrong}"
    return ""
