"""Seeded problems of grid_adapter: odd sizes, layouts, every alpha, values from subnormal to infinite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity import Problem, excess
from capt import ops, reference

# batch, grid, channels, prefix, suffix: around the vector widths, single rows and columns, nothing at all
SIZES = [
    (1, (1, 1), 1, 0, 0),
    (2, (1, 5), 16, 1, 0),
    (2, (5, 1), 15, 0, 2),
    (3, (3, 4), 33, 2, 1),
    (2, (7, 7), 64, 1, 0),
    (1, (9, 10), 130, 1, 3),
    (0, (2, 2), 8, 1, 0),
    (4, (2, 3), 31, 0, 0),
    (1, (4, 4), 257, 5, 0),
]
#: Several blocks in every direction, whole vectors, and more images than a grid axis other than the first may hold.
LARGE_SIZES = [
    (2, (14, 14), 768, 1, 4),
    (1, (24, 23), 1024, 1, 0),
    (3, (16, 16), 515, 0, 0),
    (2, (1, 300), 130, 7, 1),
    (65_540, (1, 2), 3, 0, 0),
]
LARGE_SEEDS = range(1000, 1040)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("contiguous", "channel slice", "batch stride", "channels apart", "expanded")
VALUES = ("normal", "integers", "special", "subnormal", "zero weight")


def problem(seed: int, *, sizes: Sequence[Any] | None = None) -> Problem:
    """Tokens [B, L, D], weight [D, 3, 3] and the upstream gradient, with alpha, grid and prefix as options.

    sizes replaces the list that the seed chooses from.
    """
    random = torch.Generator().manual_seed(seed)

    def pick(options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=random))]

    batch, grid, dim, n_prefix, n_suffix = pick(sizes or (LARGE_SIZES if seed in LARGE_SEEDS else SIZES))
    dtype, layout, values = DTYPES[seed % 3], pick(LAYOUTS), pick(VALUES)
    length = n_prefix + grid[0] * grid[1] + n_suffix
    tiny = 1e-6 if dtype == torch.float16 else 1e-40

    def numbers(*shape: int) -> Tensor:
        if values == "integers":
            return torch.randint(-4, 5, shape, generator=random).float()
        return torch.randn(*shape, generator=random) * (tiny if values == "subnormal" else 1.0)

    tokens, upstream = _laid_out(numbers, layout, batch, length, dim, dtype), numbers(batch, length, dim).to(dtype)
    if values == "special" and tokens.numel():
        # Outside the grid a value must come back as it is; inside it reaches its neighbours and nothing else.
        for value in (float("inf"), float("nan"), -0.0):
            index = int(torch.randint(length, (), generator=random))
            tokens = tokens.clone()
            tokens[-1, index, int(torch.randint(dim, (), generator=random))] = value
    weight = torch.zeros(dim, 3, 3) if values == "zero weight" else numbers(dim, 3, 3)
    if values == "subnormal":
        weight = (weight / tiny).round()  # products of subnormal numbers are then exact in any order
    alpha = pick(["number", "scalar", "image", "negative"])
    options: dict[str, Any] = {
        "alpha": {"number": 0.5, "scalar": torch.tensor(0.5), "negative": -2.0}.get(
            alpha, torch.randint(-2, 3, (batch,), generator=random).float() / 2
        ),
        "grid": grid,
        "n_prefix": n_prefix,
    }
    return Problem(f"{batch}x{length}x{dim} {layout} {values} {alpha}", (tokens, weight, upstream), options)


def _laid_out(numbers: Any, layout: str, batch: int, length: int, dim: int, dtype: torch.dtype) -> Tensor:
    """A tensor [batch, length, dim] with the strides that the layout names."""
    if layout == "channel slice":
        return numbers(batch, length, dim + 7).to(dtype)[..., 3 : dim + 3]
    if layout == "batch stride":
        return numbers(2 * batch, length, dim).to(dtype)[::2]
    if layout == "channels apart":
        return numbers(batch, dim, length).to(dtype).transpose(1, 2)
    if layout == "expanded" and batch:
        return numbers(1, length, dim).to(dtype).expand(batch, -1, -1)
    return numbers(batch, length, dim).to(dtype)


def call(problem: Problem, **options: Any) -> Tensor:
    """The op on a problem, forward only."""
    tokens, weight, _ = problem.arguments
    return ops.grid_adapter(tokens, weight, **{**problem.options, **options})


def run(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """Output, then the gradients of tokens, weight and, if it is a tensor, alpha."""
    tokens, weight, upstream = problem.arguments
    alpha = problem.options["alpha"]
    leaves = [value.detach().requires_grad_() for value in (tokens, weight, alpha) if isinstance(value, Tensor)]
    changed = {**problem.options, **options}
    if isinstance(alpha, Tensor):
        changed["alpha"] = leaves[2]
    out = ops.grid_adapter(leaves[0], leaves[1], **changed)
    return (out.detach(), *torch.autograd.grad(out, leaves, upstream))


def _expected(problem: Problem, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What ``run`` returns, by the reference in another precision."""
    options = dict(problem.options)
    values = [*problem.arguments, options["alpha"]]
    tokens, weight, upstream, alpha = (v.detach().to(dtype) if isinstance(v, Tensor) else v for v in values)
    leaves = [value.requires_grad_() for value in (tokens, weight, alpha) if isinstance(value, Tensor)]
    out = reference.grid_adapter(tokens, weight, alpha, options["grid"], options["n_prefix"])
    return (out.detach(), *torch.autograd.grad(out, leaves, upstream))


def _finite(value: Tensor) -> Tensor:
    return value.double().nan_to_num(0.0, 0.0, 0.0)


def complaint(problem: Problem, found: tuple[Tensor, ...]) -> str:
    """Shapes, dtypes, and errors against float64 of at most twice those of the reference in the dtype of the tokens."""
    tokens, weight, upstream = problem.arguments
    exact = _expected(problem, torch.float64)
    own = _expected(problem, tokens.dtype)
    alpha = problem.options["alpha"]
    given = [tokens, tokens, weight] + ([alpha] if isinstance(alpha, Tensor) else [])
    if len(found) != len(exact):
        return f"{len(found)} results instead of {len(exact)}"
    for name, value, mine, want, like in zip(
        ("output", "gradient of tokens", "gradient of weight", "gradient of alpha"), found, own, exact, given,
        strict=False,
    ):  # fmt: skip
        if value.dtype != like.dtype:
            return f"{name}: {value.dtype} instead of {like.dtype}"
        sources = (upstream,) if name == "gradient of tokens" else (tokens, upstream)
        largest = max((float(_finite(source).abs().max()) for source in sources if source.numel()), default=0.0)
        if name == "gradient of alpha":  # a sum over a whole image: its terms are products, and cancel
            largest *= float(_finite(upstream).norm() * _finite(weight).norm()) / max(1, weight.shape[0]) ** 0.5
        if wrong := excess(value, mine, want, largest):
            return f"{name}: {wrong}"
    return ""
