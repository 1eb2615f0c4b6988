"""Cases of attention_readout: the encoders of the center-bias study, one bias and fifty, against eager forms."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.comparison import Case, Comparison, without_failing
from benchmarks.rivals.attention_readout import RIVALS, Result
from capt import ops, reference


class Shape(NamedTuple):
    """Images, side of the token grid, class tokens in front of it, heads, head dim, whether the query is learned."""

    batch: int
    side: int
    prefix: int
    n_heads: int
    head_dim: int
    learned: bool
    quick: bool


SHAPES = {
    "ViT-B/16": Shape(32, 14, 1, 12, 64, False, True),
    "ViT-L/14 336": Shape(8, 24, 1, 16, 64, False, False),
    "SigLIP-B/16": Shape(32, 14, 0, 12, 64, True, False),
    "small": Shape(64, 7, 0, 8, 64, False, True),
}
#: sweep: one constant times the distance from the centre, as the study varies it: keys at one distance share biases.
#: free: 50 unrelated biases, no two keys alike. one: no bias.
BIASES = ("sweep", "free", "one")
N_BIASES = 50
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
#: Rivals that do not use the op's own idea of adding keys with equal biases up; and all of them.
PLAIN = ("masked", "product", "by_group", "sdpa")
GOALS = {"sweep": {PLAIN: 3.0, tuple(RIVALS): 1.0}, "free": {tuple(RIVALS): 3.0}, "one": {tuple(RIVALS): 1.0}}


def cases(device: str = "cpu") -> Iterator[Case]:
    """Every shape and kind of bias in float32, the first shape in bfloat16, too."""
    for shape in SHAPES:
        for bias in BIASES:
            for dtype in DTYPES:
                if dtype == "float32" or shape == "ViT-B/16":
                    yield _case(shape, bias, dtype, device)


def _case(shape: str, bias: str, dtype: str, device: str) -> Case:
    def build(backend: str | None) -> Comparison:
        return compare(shape, bias, dtype, device, backend)

    quick = SHAPES[shape].quick and dtype == "float32"
    return Case("attention_readout", f"{shape}, {bias}", dtype, "forward", quick, build)


def compare(name: str, kind: str, dtype: str, device: str, backend: str | None) -> Comparison:
    """Groups: class token if there is one, centre, border. Rivals get float32, in which they are fastest on a CPU."""
    shape = SHAPES[name]
    groups, radius = geometry(shape.side, shape.prefix)
    n_groups, length = 2 + shape.prefix, len(groups)
    bias = {
        "sweep": torch.linspace(0, 4, N_BIASES)[:, None, None] * radius,
        "free": torch.randn(N_BIASES, 1, length),
        "one": torch.zeros(1, 1, length),
    }[kind].to(device)
    groups = groups.to(device)
    query = torch.randn(*(() if shape.learned else (shape.batch,)), shape.n_heads, shape.head_dim)
    inputs = [query, *(torch.randn(shape.batch, length, shape.n_heads, shape.head_dim) for _ in range(2))]
    inputs = [value.to(device, DTYPES[dtype]) for value in inputs]
    wide = [value.float() for value in inputs]
    scale = shape.head_dim**-0.5

    def own() -> Result:
        given = None if kind == "one" else bias
        return ops.attention_readout(*inputs, groups=groups, n_groups=n_groups, bias=given, backend=backend)

    def of(rival: Callable[..., Result]) -> Callable[[], Result]:
        return lambda: rival(*wide, groups, n_groups, bias, scale)

    functions: dict[str, Callable[[], Result]] = {"ours": own}
    functions |= {rival: of(function) for rival, function in RIVALS.items()}
    functions = without_failing(functions)

    def verify() -> str:
        few = slice(0, 2)  # images; float64 for all of them takes seconds
        doubles = [value.double() for value in inputs]
        doubles = [value if value.dim() == 2 else value[few] for value in doubles]
        wanted = reference.attention_readout(*doubles, groups, n_groups, bias.double(), scale)
        for rival, function in functions.items():
            for found, want in zip(function(), wanted, strict=True):
                error = float((found[:, few].double() - want).abs().max())
                if not error <= 1e-5 * float(want.abs().max()):
                    return f"{rival}: error {error:.3g}"
        return ""

    plan = ops.explain(
        "attention_readout", batch=shape.batch, length=length, n_heads=shape.n_heads, head_dim=shape.head_dim,
        n_groups=n_groups, n_biases=len(bias), dtype=DTYPES[dtype], device=device, backend=backend,
    )  # fmt: skip
    return Comparison(functions, verify, plan.bytes, plan.flops, "copy", GOALS[kind])


def geometry(side: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Group (class token, centre, border) and distance from the centre, at most 1, of every token."""
    place = (torch.arange(side) + 0.5) / side * 2 - 1
    y, x = torch.meshgrid(place, place, indexing="ij")
    radius = ((x.square() + y.square()) / 2).sqrt().flatten()
    groups = (torch.maximum(x.abs(), y.abs()).flatten() > 0.5).long() + prefix
    return torch.cat([torch.zeros(prefix).long(), groups]), torch.cat([torch.zeros(prefix), radius])
