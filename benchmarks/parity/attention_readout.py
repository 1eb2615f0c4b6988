"""Problems of attention_readout: empty groups, forbidden keys, huge logits, equal biases, odd sizes, strides."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.parity import Problem, excess, gradients
from capt import ops, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: normal: any biases. levels: few different ones. forbidden: many keys, and a whole group under some biases. huge:
#: logits in the thousands. opposed: biases fall where scores rise, by more than one float32 factor can hold.
KINDS = ("normal", "levels", "forbidden", "huge", "opposed", "no bias")
LENGTHS = (1, 2, 5, 8, 15, 17, 33)
WIDTHS = (1, 3, 8, 16, 17, 24, 40, 64, 72)
VARIANTS = (1, 2, 3, 6, 7, 13)
#: batch, length, heads, head dim, groups, biases. The results of the last one do not fit a second-level cache.
LARGE_SIZES = ((2, 197, 3, 64, 3, 50), (1, 730, 2, 128, 16, 9), (3, 49, 4, 32, 2, 64), (4, 40, 6, 64, 16, 50))
LARGE_SEEDS = range(1000, 1036)


def problem(seed: int, *, sizes: tuple[int, int, int, int, int, int] | None = None) -> Problem:
    """Query, keys, values, bias (if any) and the upstream gradients; ``sizes`` replaces the seed's choice."""
    random = torch.Generator().manual_seed(seed)

    def one_of(values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=random))]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    kind, dtype = KINDS[seed % 6], DTYPES[seed // 6 % 3]
    small = (one_of((0, 1, 2)), one_of(LENGTHS), one_of((1, 2, 3)), one_of(WIDTHS), one_of((1, 2, 4)), one_of(VARIANTS))
    own_sizes = LARGE_SIZES[seed % 4] if seed in LARGE_SEEDS else small
    batch, length, n_heads, head_dim, n_groups, n_biases = own_sizes if sizes is None else sizes
    learned, per_image = one_of((True, False)), one_of((True, False))
    query = normal(*(() if learned else (batch,)), n_heads, head_dim) * (300 if kind == "huge" else 1)
    keys, values = (
        _strided(normal(batch, length, n_heads, head_dim).to(dtype), one_of(("dense", "heads first", "half of it")))
        for _ in range(2)
    )
    groups = torch.randint(n_groups, (batch, length) if per_image else (length,), generator=random)
    if n_groups > 1:
        groups[groups == int(torch.randint(n_groups, (), generator=random))] = 0  # an empty group, mostly
    options: dict[str, Any] = {"groups": groups, "n_groups": n_groups}
    if one_of((True, False)):
        options["scale"] = one_of((0.0, 0.3))
    arguments = [query.to(dtype), keys, values]
    if kind != "no bias":
        bias = normal(n_biases, one_of((1, n_heads)), length) * (50 if kind == "huge" else 2)
        if kind == "levels":
            bias = bias.round()
        elif kind == "forbidden":
            bias[torch.rand(bias.shape, generator=random) < 0.3] = -torch.inf
            if not per_image:
                bias[::2, :, groups == 0] = -torch.inf
        elif kind == "opposed":
            bias, arguments[1] = _opposed(bias, query, keys)
        arguments.append(bias.to(one_of((torch.float32, dtype))))
    variants = 1 if kind == "no bias" else n_biases
    shape = (variants, batch, n_heads, n_groups)
    upstream = {"upstream": (normal(*shape, head_dim), normal(*shape))}
    label = f"{seed}: {kind} {str(dtype)[6:]} {own_sizes} learned={learned} per_image={per_image}"
    return Problem(label, tuple(arguments), options | upstream)


def _opposed(bias: Tensor, query: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """Biases that fall by 150 over the keys, and keys whose scores rise by as much with the first image's query."""
    length = keys.shape[1]
    ramp = torch.linspace(0, 150, length)
    first = query if query.dim() == 2 else query[:1].sum(0)  # zeros for a batch of none
    unit = first / (first.square().sum(-1, keepdim=True) * max(keys.shape[3], 1) ** -0.5).clamp_min(1e-3)
    return bias - ramp, (keys.float() + ramp[:, None, None] * unit).to(keys.dtype)


def _strided(tensor: Tensor, layout: str) -> Tensor:
    if layout == "heads first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "half of it":
        return torch.cat([tensor, tensor], 2)[:, :, : tensor.shape[2]]
    return tensor


def _options(problem: Problem) -> tuple[dict[str, Any], tuple[Tensor, Tensor]]:
    given = dict(problem.options)
    upstream = given.pop("upstream")
    return given, upstream


def call(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """The op alone."""
    given, _ = _options(problem)
    query, keys, values, *bias = problem.arguments
    return tuple(ops.attention_readout(query, keys, values, bias=bias[0] if bias else None, **given, **options))


def run(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """mean, log_mass, then the gradients of query, keys, values and bias."""
    given, upstream = _options(problem)
    leaves = [value.detach().requires_grad_() for value in problem.arguments]
    bias = leaves[3] if len(leaves) > 3 else None
    found = ops.attention_readout(*leaves[:3], bias=bias, **given, **options)
    return *(value.detach() for value in found), *gradients(found, _alive(upstream, found.log_mass), leaves)


def _alive(upstream: tuple[Tensor, Tensor], log_mass: Tensor) -> tuple[Tensor, Tensor]:
    """No gradient into the -inf of an empty group."""
    return upstream[0], upstream[1].masked_fill(log_mass.detach() == -torch.inf, 0.0)


def _expected(problem: Problem, dtype: torch.dtype | None) -> tuple[Tensor, ...]:
    """What ``run`` returns, by autograd of the reference, in another precision unless it is None."""
    given, upstream = _options(problem)
    leaves = [(v if dtype is None else v.to(dtype)).detach().requires_grad_() for v in problem.arguments]
    scale = given.get("scale", problem.arguments[1].shape[3] ** -0.5)
    bias = leaves[3] if len(leaves) > 3 else None
    found = reference.attention_readout(*leaves[:3], given["groups"], given["n_groups"], bias, scale)
    return *(value.detach() for value in found), *gradients(found, _alive(upstream, found[1]), leaves)


def _allowances(problem: Problem) -> list[float]:
    """How large the terms of each result are, times the largest logit: a logit is rounded before its exponential."""
    given, (grad_mean, grad_mass) = _options(problem)
    query, keys, values, *bias = (value.detach().double() for value in problem.arguments)
    if keys.numel() == 0:
        return [0.0] * 6
    scale = given.get("scale", keys.shape[3] ** -0.5)
    logit = (query.expand(len(keys), -1, -1)[:, None] * keys).sum(-1).abs().max() * abs(scale)
    if bias:
        logit = logit + bias[0].masked_fill(bias[0] == -torch.inf, 0.0).abs().max()
    loss = float(logit) + 4
    sums = grad_mean.shape[0] * given["n_groups"]
    along = float(grad_mean.abs().sum(-1).max()) * float(values.abs().max()) + float(grad_mass.abs().max())
    slope = loss * along * sums
    images = len(keys) if query.dim() == 2 else 1
    return [
        loss * float(values.abs().max()),
        loss,
        slope * abs(scale) * float(keys.abs().max()) * images,
        slope * abs(scale) * float(query.abs().max()),
        loss * float(grad_mean.abs().max()) * sums,
        slope * len(keys) * keys.shape[2],
    ]


def complaint(problem: Problem, found: tuple[Tensor, ...]) -> str:
    """Dtypes, and errors against float64 autograd of at most twice those of the reference in the problem's precision.

    One float32 rounding of the terms of each sum is allowed on top (``_allowances``).
    """
    exact, own = _expected(problem, torch.float64), _expected(problem, None)
    names = ("mean", "log_mass", "query", "keys", "values", "bias")
    for name, value, mine, want, terms in zip(names, found, own, exact, _allowances(problem), strict=False):
        if value.dtype != mine.dtype:
            return f"{problem.label}: {name} is {value.dtype} instead of {mine.dtype}"
        inputs = terms * torch.finfo(torch.float32).eps / torch.finfo(value.dtype).eps
        if wrong := excess(value, mine, want, inputs):
            return f"{problem.label}: {name}: {wrong}"
    return ""
