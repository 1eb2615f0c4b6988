"""Cases of pair_frontier: one chunk of scores against eager maxima of each group, with and without primitives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from benchmarks.comparison import Case, Comparison
from benchmarks.rivals.pair_frontier import RIVALS, with_term
from capt import ops

GOAL = 2.0
MOST_CHUNKS, MOST_SCORES = 16, 1 << 24  # that a case takes in turn; scores of all of them


@dataclass(frozen=True)
class Shape:
    """A chunk. primitives: (states, objects) of the term, none without it; weight: of the pairs' cosines, the rest of 1
    is the weight of each primitive. later: folded into the frontier of an earlier chunk of the same size."""

    batch: int
    n_pairs: int
    n_groups: int = 2
    primitives: tuple[int, int] | None = None
    weight: float = 1.0
    later: bool = False


CGQA, MIT = (413, 674), (115, 245)
SHAPES = {
    "B64 K8192 G2": Shape(64, 8192),
    "B64 K8192 G2, later": Shape(64, 8192, later=True),
    "B64 K8192 G51": Shape(64, 8192, 51),
    "B64 K8192 G51, later": Shape(64, 8192, 51, later=True),
    "B64 K1962 G2, primitives": Shape(64, 1962, 2, MIT, 0.1),
    "B64 K8192 G2, primitives": Shape(64, 8192, 2, CGQA, 0.3),
    "B64 K8192 G2, primitives, later": Shape(64, 8192, 2, CGQA, 0.3, later=True),
    "B64 K8192 G51, primitives": Shape(64, 8192, 51, CGQA, 0.3),
    "B512 K22451 G2, primitives": Shape(512, 22_451, 2, CGQA, 0.3),
    "B16 K278362 G2": Shape(16, 278_362),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SLOW = ("B512 K22451 G2, primitives", "B16 K278362 G2")


def cases(device: str = "cpu") -> Iterator[Case]:
    """Every shape in float32; the first two in bfloat16, too."""
    for number, shape in enumerate(SHAPES):
        for dtype in DTYPES:
            if dtype == "float32" or number < 2:
                yield Case(
                    "pair_frontier",
                    shape,
                    dtype,
                    "forward",
                    shape not in SLOW,
                    lambda backend, shape=shape, dtype=dtype: comparison(shape, dtype, device, backend),
                )


def comparison(name: str, dtype: str, device: str = "cpu", backend: str | None = None) -> Comparison:
    """``ours`` and the eager forms on the same chunks; what depends on the groups alone is prepared here.

    Every call takes another chunk: repeated scores would teach the processor which comparisons succeed.
    """
    shape = SHAPES[name]
    # Cosines of images and texts spread by about 0.04; the released scale is 100.
    chunks = [
        ((torch.randn(shape.batch, shape.n_pairs, device=device) * 4 + 25) * shape.weight).to(DTYPES[dtype])
        for _ in range(max(2, min(MOST_CHUNKS, MOST_SCORES // (shape.batch * shape.n_pairs))))
    ]
    group = torch.randint(shape.n_groups, (shape.n_pairs,), device=device)
    group[:: shape.n_pairs // 5] = -1
    primitives: dict[str, Tensor] = {}
    if shape.primitives is not None:
        for kind, count in zip(("state", "object"), shape.primitives, strict=True):
            logits = torch.randn(shape.batch, count, device=device) * 4
            primitives[kind] = (1 - shape.weight) * logits.softmax(1)
        every = torch.randperm(shape.primitives[0] * shape.primitives[1], device=device)[: shape.n_pairs].sort().values
        primitives["pairs"] = torch.stack([every // shape.primitives[1], every % shape.primitives[1]], 1)

    def fold(chunk: Tensor, start: int, previous: ops.PairFrontier | None = None) -> ops.PairFrontier:
        return ops.pair_frontier(
            chunk, group=group, n_groups=shape.n_groups, start=start, previous=previous, backend=backend, **primitives
        )

    previous = fold(chunks[-1], 0) if shape.later else None
    start = shape.n_pairs if shape.later else 0
    candidates = (group >= 0).nonzero().flatten()
    order = candidates[group[candidates].argsort(stable=True)]
    sizes = group[candidates].bincount(minlength=shape.n_groups).tolist()
    prepared = {
        "masked": group != torch.arange(shape.n_groups, device=device)[:, None],
        "by_group": (order, sizes),
        "scatter": (candidates, group[candidates], shape.n_groups),
    }
    columns = primitives["pairs"].t().contiguous().unbind() if primitives else None

    def rival(name: str, chunk: Tensor) -> tuple[Tensor, Tensor]:
        if columns is not None:
            chunk = with_term(chunk, primitives["state"], primitives["object"], columns)
        score, pair = RIVALS[name](chunk, prepared[name])
        if previous is None:
            return score, pair
        older = previous.score >= score
        return torch.where(older, previous.score, score), torch.where(older, previous.pair, pair + start)

    calls: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {"ours": lambda chunk: fold(chunk, start, previous)}
    calls |= {name: partial(rival, name) for name in RIVALS}

    def in_turn(call: Callable[[Tensor], object]) -> Callable[[], object]:
        turns = cycle(chunks)
        return lambda: call(next(turns))

    def verify() -> str:
        found = calls["ours"](chunks[0])
        for name, call in calls.items():
            score, pair = call(chunks[0])
            if not torch.allclose(score, found[0], rtol=1e-6, atol=0):
                return f"{name}: other scores"
            # Of equal scores a rival may take any; a fused product and sum may even change their order.
            if float((pair != found[1]).float().mean()) > (0.5 if dtype == "bfloat16" else 0.01):
                return f"{name}: other pairs"
        return ""

    n_states, n_objects = shape.primitives or (0, 0)
    plan = ops.explain(
        "pair_frontier", batch=shape.batch, n_pairs=shape.n_pairs, n_groups=shape.n_groups, n_states=n_states,
        n_objects=n_objects, dtype=DTYPES[dtype], device=device, backend=backend,
    )  # fmt: skip
    functions = {name: in_turn(call) for name, call in calls.items()}
    return Comparison(functions, verify, plan.bytes, plan.flops, "read", {tuple(RIVALS): GOAL})
