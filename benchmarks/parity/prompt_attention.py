"""Seeded problems of prompt_attention: gathered prompt rows, both streams, every combination of gradients.

``arguments`` are query, commonality, difference, then the upstream gradients of the two results. ``options`` are the
keywords of the op, and ``needs``: which of query, commonality, difference, log_prior want a gradient.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity import Problem, excess, gradients
from capt import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECIAL = ("", "", "", "nan row", "nan query", "inf row", "inf prior", "tiny", "zero", "large")
#: Wide rows, many images that share a table row.
LARGE_SEEDS = range(1000, 1040)


def problem(seed: int) -> Problem:
    """Seeds from 1000 on are larger (``LARGE_SEEDS``)."""
    rng, make = random.Random(seed), torch.Generator().manual_seed(seed)
    large = seed >= 1000
    dtype = DTYPES[seed % 3]
    batch = rng.choice((0, 1, 2, 3, 5) if not large else (40, 130, 300))
    dim = rng.choice((1, 2, 7, 8, 16, 17, 24) if not large else (64, 100, 512, 512, 768))
    k, sizes = (
        rng.choice((0, 1, 2, 3, 4) if not large else (1, 3, 5, 5)),
        (rng.choice((0, 1, 2, 5)), rng.choice((1, 2, 3, 5))),
    )
    n = (rng.choice((0, 1, 2, 6)), rng.choice((1, 2, 7))) if not large else (rng.choice((1, 9)), 200)
    special = rng.choice(SPECIAL)

    finite = special not in ("nan row", "nan query", "inf row")
    if large and not finite and seed % 7 != 3:  # few without gradients
        finite, special = True, ""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make)

    query, upstream = normal(batch, dim), [normal(batch, dim).to(dtype) for _ in range(2)]
    tables = [normal(n[i], sizes[i], dim) for i in range(2)]
    index = [torch.randint(-1, n[i], (batch, k), generator=make) for i in range(2)]
    prior = None if rng.random() < 0.3 else normal(batch, k)
    factor = {"tiny": 1e-30 if dtype != torch.float16 else 1e-6, "zero": -0.0, "large": 60.0}.get(special)
    if factor is not None:
        query = query * factor
    if special in ("nan row", "inf row") and n[1] > 1:  # row 0 stands in for absent pairs in the reference
        tables[1][-1] = float(special[:3])
    if special == "nan query" and batch:
        query[0] = float("nan")
    if special == "inf prior" and prior is not None:
        prior[torch.rand(prior.shape, generator=make) < 0.6] = float("-inf")
    needs = tuple(finite and ((large and seed % 5 < 4) or bool(seed >> bit & 1)) for bit in range(4))
    if prior is None:
        needs = (*needs[:3], False)
    arguments = [query.to(dtype), *(table.to(dtype) for table in tables), *upstream]
    if rng.random() < 0.2:  # rows and channels apart
        arguments = [torch.stack([value, value], dim=-1)[..., 0] for value in arguments]
    return Problem(
        f"seed {seed}: B{batch} d{dim} k{k} n{n} s{sizes} {str(dtype)[6:]} {special} needs {needs}",
        tuple(arguments),
        {
            "commonality_index": index[0],
            "difference_index": index[1],
            "log_prior": prior,
            "scale": rng.choice((None, 0.3, -1.0)) if not large else None,
            "needs": needs,
        },
    )


def call(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """The op on a problem, forward only."""
    given = {name: value for name, value in problem.options.items() if name != "needs"}
    return ops.prompt_attention(*problem.arguments[:3], **{**given, **options})


def run(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """The two results, then the wanted gradients."""
    given = dict(problem.options)
    needs = given.pop("needs")
    query, *tables, up_com, up_diff = problem.arguments
    prior = given.pop("log_prior")
    leaves = [None if value is None else value.detach() for value in (query, *tables, prior)]
    wanted = [leaf.requires_grad_() for leaf, need in zip(leaves, needs, strict=True) if need and leaf is not None]
    outs = ops.prompt_attention(leaves[0], leaves[1], leaves[2], log_prior=leaves[3], **given, **options)
    return (*(out.detach() for out in outs), *gradients(outs, (up_com, up_diff), wanted))


def _double(problem: Problem) -> Problem:
    """The same problem in float64."""
    options = dict(problem.options)
    if options["log_prior"] is not None:
        options["log_prior"] = options["log_prior"].double()
    return Problem(problem.label, tuple(value.double() for value in problem.arguments), options)


def _largest(value: Tensor) -> float:
    finite = value.double().abs()[value.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def complaint(problem: Problem, found: tuple[Tensor, ...]) -> str:
    """What is wrong with ``found``: shapes, dtypes, errors above twice those of the reference."""
    own = run(problem, backend="reference")
    oracle = run(_double(problem), backend="reference")
    query, com, diff, *upstream = problem.arguments
    scale = problem.options["scale"]
    scale = abs(query.shape[1] ** -0.5 if scale is None else scale)
    rows = [table.flatten(0, 1).double().abs() for table in (com, diff)]
    # Largest |upstream| . |row|: what the gradient of a score is made of.
    along = [
        _largest(up.double().abs() @ row.T) if row.numel() else 0.0 for up, row in zip(upstream, rows, strict=True)
    ]
    terms = {
        "query": scale * max(a * _largest(row) for a, row in zip(along, rows, strict=True)),
        "commonality": _largest(upstream[0]) + scale * along[0] * _largest(query),
        "difference": _largest(upstream[1]) + scale * along[1] * _largest(query),
        "log_prior": max(along),
    }
    names = ["h_commonality", "h_difference"]
    names += [name for name, need in zip(terms, problem.options["needs"], strict=True) if need]
    if len(found) != len(names):
        return f"{problem.label}: {len(found)} results instead of {len(names)}"
    for name, mine, theirs, exact in zip(names, found, own, oracle, strict=True):
        limit = terms.get(name, _largest(com if name == "h_commonality" else diff))
        wrong = excess(mine, theirs, exact, limit)
        if mine.dtype != theirs.dtype:
            wrong = f"dtype {mine.dtype} instead of {theirs.dtype}"
        if wrong:
            return f"{problem.label}: {name}: {wrong}"
    return ""
