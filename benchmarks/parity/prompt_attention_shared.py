"""Seeded problems of prompt_attention_shared: stacked class prompts over the tokens of an image, both streams.

``arguments`` are the two queries, keys, values, then the upstream gradients of the four results.
``options`` are the keywords of the op, and ``needs``: which of the four inputs want a gradient.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from benchmarks.parity import Problem, excess, gradients
from capt import ops

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECIAL = ("", "", "", "", "nan key", "inf value", "tiny", "zero", "large")
NAMES = ("commonality_query", "difference_query", "keys", "values")


def problem(seed: int) -> Problem:
    """Seeds from 1000 on are larger: several tiles in each direction, heads of 64 and 80, long keys."""
    rng, make = random.Random(seed), torch.Generator().manual_seed(seed)
    large = seed >= 1000
    dtype = DTYPES[seed % 3]
    batch, n_heads = rng.choice((0, 1, 1, 2, 3)), rng.choice((1, 1, 2, 3))
    width = rng.choice((1, 3, 8, 16, 20) if not large else (32, 48, 64, 64, 80, 128))
    length = rng.choice((1, 2, 5, 16, 17, 33) if not large else (64, 197, 300, 577, 1100))
    rows = [rng.choice((0, 1, 2, 6, 17, 20) if not large else (1, 31, 64, 100)) for _ in range(2)]
    dim, special = n_heads * width, rng.choice(SPECIAL)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make)

    queries = [normal(batch, r, dim) if rng.random() < 0.4 else normal(r, dim) for r in rows]
    keys, values = normal(batch, length, dim), normal(batch, length, dim)
    factor = {"tiny": 1e-30 if dtype != torch.float16 else 1e-6, "zero": -0.0, "large": 20.0}.get(special)
    if factor is not None:
        queries[0] = queries[0] * factor
    if batch and special == "nan key":
        keys[-1, -1, 0] = float("nan")
    if batch and special == "inf value":
        values[0, 0] = float("inf")
    finite = special not in ("nan key", "inf value")
    needs = tuple(finite and bool(seed >> bit & 1) for bit in range(4))
    upstream = [normal(batch, r, dim).to(dtype) for r in rows]
    upstream += [normal(batch, n_heads, r) * (0.0 if rng.random() < 0.3 else 1.0) for r in rows]
    inputs = [value.to(dtype) for value in (*queries, keys, values)]
    if rng.random() < 0.2:  # tokens and channels apart
        inputs = [torch.stack([value, value], dim=-1)[..., 0] for value in inputs]
    elif rng.random() < 0.2:  # slices of wider tensors
        inputs = [torch.cat([value, value], dim=-1)[..., dim:] for value in inputs]
    return Problem(
        f"seed {seed}: B{batch} R{rows} L{length} heads {n_heads}x{width} {str(dtype)[6:]} {special} needs {needs}",
        (*inputs, *upstream),
        {"n_heads": n_heads, "scale": rng.choice((None, 0.3, -0.5)) if not large else None, "needs": needs},
    )


def call(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """The op on a problem, forward only."""
    given = {name: value for name, value in problem.options.items() if name != "needs"}
    return ops.prompt_attention_shared(*problem.arguments[:4], **{**given, **options})


def run(problem: Problem, **options: Any) -> tuple[Tensor, ...]:
    """The four results, then the wanted gradients."""
    given = dict(problem.options)
    needs = given.pop("needs")
    leaves = [value.detach() for value in problem.arguments[:4]]
    wanted = [leaf.requires_grad_() for leaf, need in zip(leaves, needs, strict=True) if need]
    outs = ops.prompt_attention_shared(*leaves, **given, **options)
    return (*(out.detach() for out in outs), *gradients(outs, problem.arguments[4:], wanted))


def _double(problem: Problem) -> Problem:
    """The same problem in float64."""
    return Problem(problem.label, tuple(value.double() for value in problem.arguments), problem.options)


def _largest(value: Tensor) -> float:
    finite = value.double().abs()[value.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def complaint(problem: Problem, found: tuple[Tensor, ...]) -> str:
    """What is wrong with ``found``: shapes, dtypes, errors above twice those of the reference."""
    own = run(problem, backend="reference")
    oracle = run(_double(problem), backend="reference")
    *queries, keys, values = (value.double() for value in problem.arguments[:4])
    upstream = problem.arguments[4:]
    n_heads, scale = problem.options["n_heads"], problem.options["scale"]
    width = keys.shape[2] // n_heads
    scale = abs(width**-0.5 if scale is None else scale)
    # Largest |q| . |k| and |upstream| . |v| of a head: what scores and their gradients are made of.
    v = values.unflatten(-1, (n_heads, width)).abs()
    along = [
        _largest(torch.einsum("brhc,blhc->bhrl", up.double().abs().unflatten(-1, (n_heads, width)), v)) + _largest(lse)
        for up, lse in zip(upstream[:2], upstream[2:], strict=True)
    ]
    products = [width * _largest(query) * _largest(keys) * scale for query in queries]
    terms = {
        "out_commonality": _largest(values),
        "out_difference": _largest(values),
        "lse_commonality": products[0],
        "lse_difference": products[1],
        "commonality_query": scale * along[0] * _largest(keys),
        "difference_query": scale * along[1] * _largest(keys),
        # The terms of both streams, which may cancel.
        "keys": scale * sum(a * _largest(query) for a, query in zip(along, queries, strict=True)),
        # The rounding of a float32 log-sum-exp passes into the probabilities.
        "values": max(map(_largest, upstream[:2])) * max(1.0, *map(_largest, oracle[2:4])),
    }
    names = [*list(terms)[:4], *(name for name, need in zip(NAMES, problem.options["needs"], strict=True) if need)]
    if len(found) != len(names):
        return f"{problem.label}: {len(found)} results instead of {len(names)}"
    for name, mine, theirs, exact in zip(names, found, own, oracle, strict=True):
        wrong = excess(mine, theirs, exact, terms[name])
        if mine.dtype != theirs.dtype:
            wrong = f"dtype {mine.dtype} instead of {theirs.dtype}"
        if wrong:
            return f"{problem.label}: {name}: {wrong}"
    return ""
