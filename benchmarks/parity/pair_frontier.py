"""Problems of pair_frontier: chunks in any order, ties across them, empty groups, values that never win, strides."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity import Problem
from capt import ops
from capt.reference_frontier import pair_frontier as reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 2, 3, 15, 16, 17, 31, 33, 64, 65, 127, 200, 257)
GROUPS = (1, 2, 2, 3, 7, 8, 15, 16, 17, 51, 63, 64)
KINDS = ("ties", "normal", "ascending", "zeros", "undefined", "integers")
#: Rows of many steps, and more of them than one task takes.
LARGE_SIZES = ((3, 8200), (70, 1100), (260, 333), (1, 20_011))
LARGE_SEEDS = range(1000, 1040)
LAYOUTS = ("dense", "part of a row", "transposed", "one row expanded")


def problem(seed: int, *, n_pairs: int | None = None, batch: int | None = None) -> Problem:
    """Scores of all pairs, and the order of the chunks; ``n_pairs`` and ``batch`` replace the seed's choice."""
    random = torch.Generator().manual_seed(seed)

    def one_of(values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=random))]

    kind, dtype, term = KINDS[seed % 6], DTYPES[seed // 6 % 3], bool(seed // 18 % 2)
    own_batch, own_pairs = one_of(LARGE_SIZES) if seed in LARGE_SEEDS else (seed // 36 % 5, one_of(SIZES))
    n_pairs, batch = own_pairs if n_pairs is None else n_pairs, own_batch if batch is None else batch
    n_groups, layout = one_of(GROUPS), one_of(LAYOUTS)
    scores = _strided(_values(kind, batch, n_pairs, random).to(dtype), layout)
    group = torch.randint(-1, n_groups, (n_pairs,), generator=random)
    group[group == int(torch.randint(n_groups, (), generator=random))] = -1  # an empty group
    cuts = sorted({0, n_pairs, *torch.randint(n_pairs + 1, (one_of((0, 1, 3)),), generator=random).tolist()})
    chunks = list(pairwise(cuts)) or [(0, 0)]
    order = one_of(("ascending", "descending", "any"))
    if order == "descending":
        chunks.reverse()
    elif order == "any":
        chunks = [chunks[i] for i in torch.randperm(len(chunks), generator=random).tolist()]
    options: dict[str, Any] = {"group": group, "n_groups": n_groups, "chunks": chunks, "start": one_of((0, 0, 278_362))}
    if term:
        n_states, n_objects = one_of((1, 4, 40)), one_of((1, 7, 33))
        for name, count in (("state", n_states), ("object", n_objects)):
            options[name] = _values(kind, batch, count, random).to(one_of((torch.float32, dtype)))
        sizes = torch.tensor([n_states, n_objects])
        options["pairs"] = (torch.rand(n_pairs, 2, generator=random) * sizes).long()
        if one_of((True, False)):
            options["pairs"] = options["pairs"].t().contiguous().t()
    label = f"{seed}: {kind} {str(dtype)[6:]} {batch}x{n_pairs} G={n_groups} term={term} {layout} chunks={chunks}"
    return Problem(label, (scores,), options, exact=True)


def _values(kind: str, batch: int, count: int, random: torch.Generator) -> Tensor:
    shape = (batch, count)
    if kind == "ties":
        return torch.randint(-1, 2, shape, generator=random).float()
    if kind == "integers":
        return torch.randint(-200, 200, shape, generator=random).float()
    if kind == "normal":
        return torch.randn(shape, generator=random) * 3
    if kind == "ascending":  # every score is the best so far
        return torch.arange(count).expand(batch, -1) / 7
    if kind == "zeros":  # of both signs, subnormals, and what a fused product would not round away
        values = torch.tensor([0.0, -0.0, -0.0, 1e-40, -1e-40, 1 + 2**-12, 1 - 2**-12, -1.0])
    else:
        values = torch.tensor([0.0, 1.0, -1.0, 3e38, float("-inf"), float("-inf"), float("inf"), float("nan")])
    return values[torch.randint(len(values), shape, generator=random)]


def _strided(scores: Tensor, layout: str) -> Tensor:
    n_pairs = scores.shape[1]
    if layout == "part of a row":
        return torch.cat([scores, scores], 1)[:, :n_pairs]
    if layout == "transposed":
        return scores.t().contiguous().t()
    if layout == "one row expanded" and len(scores):
        return scores[:1].expand(len(scores), -1)
    return scores


def run(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """(score, pair) after all chunks."""
    (scores,) = problem.arguments
    given = dict(problem.options)
    group, pairs, start = given.pop("group"), given.pop("pairs", None), given.pop("start")
    frontier = None
    for low, high in given.pop("chunks"):
        frontier = ops.pair_frontier(
            scores[:, low:high],
            group=group[low:high],
            start=start + low,
            pairs=None if pairs is None else pairs[low:high],
            previous=frontier,
            **given,
            **options,
        )
    assert frontier is not None
    return tuple(frontier)


call = run


def complaint(problem: Problem, found: tuple[Tensor, ...]) -> str:
    """Empty if the bits are those of the reference on all pairs at once."""
    (scores,) = problem.arguments
    given = problem.options
    primitive = [given.get(name) for name in ("state", "object", "pairs")]
    own = reference(scores, given["group"], given["start"], given["n_groups"], *primitive)
    if [(value.shape, value.dtype) for value in found] != [(value.shape, value.dtype) for value in own]:
        return f"{problem.label}: shapes or dtypes differ from the reference"
    score, pair = found
    if not torch.equal(pair, own[1]):
        return f"{problem.label}: pairs {pair.tolist()} instead of {own[1].tolist()}"
    if not torch.equal(score, own[0]) or not torch.equal(score.signbit(), own[0].signbit()):
        return f"{problem.label}: scores {score.tolist()} instead of {own[0].tolist()}"
    return ""
