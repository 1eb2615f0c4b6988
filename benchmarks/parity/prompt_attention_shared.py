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
SPECIAL = ("", "", "", "", "nan key", "-inf key", "inf value", "tiny", "zero", "large")
#: Problems of several tiles in each direction, with long keys and, in 16 bits, heads of 64, 80 and 128.
LARGE_SEEDS = range(1000, 1040)
NAMES = ("commonality_query", "difference_query", "keys", "values")


def problem(seed: int) -> Problem:
    """Seeds from 1000 on are larger (``LARGE_SEEDS``); most of them want all gradients."""
    rng, make = random.Random(seed), torch.Generator().manual_seed(seed)
    large = seed >= 1000
    dtype = DTYPES[seed % 3]
    batch, n_heads = rng.choice((0, 1, 1, 2, 3) if not large else (1, 1, 2)), rng.choice((1, 1, 2, 3))
    width = rng.choice((1, 3, 8, 16, 20) if not large else (48, 64, 64, 80, 128, 128))
    length = rng.choice((1, 2, 5, 16, 17, 33) if not large else (64, 197, 300, 577, 1100))
    rows = [rng.choice((0, 1, 2, 6, 17, 20) if not large else (1, 31, 64, 100)) for _ in range(2)]
    dim, special = n_heads * width, rng.choice(SPECIAL)

    finite = special not in ("nan key", "inf value")
    if large and not finite and seed % 7 != 3:  # few without gradients
        finite, special = True, ""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=make)

    queries = [normal(batch, r, dim) if rng.random() < 0.4 else normal(r, dim) for r in rows]
    keys, values = normal(batch, length, dim), normal(batch, length, dim)
    if special == "-inf key":  # a key that no positive query attends to
        queries = [query.abs() for query in queries]
    factor = {"tiny": 1e-30 if dtype != torch.float16 else 1e-6, "zero": -0.0, "large": 20.0}.get(special)
    if factor is not None:
        queries[0] = queries[0] * factor
    if batch and special == "nan key":
        keys[-1, -1, 0] = float("nan")
    if batch and special == "-inf key":
        keys[-1, -1, 0] = -float("inf")
    if batch and special == "inf value":
        values[0, 0] = float("inf")
    needs = tuple(finite and ((large and seed % 5 < 4) or bool(seed >> bit & 1)) for bit in range(4))
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
        {
            "n_heads": n_heads,
            "scale": rng.choice((None, 0.3, -0.5)) if not large and special != "-inf key" else None,
            "needs": needs,
        },
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


def _terms(problem: Problem) -> dict[str, float]:
    """For each result the largest sum of the magnitudes of its terms, in float64: what roundings are relative to."""
    *queries, keys, values = (value.double() for value in problem.arguments[:4])
    n_heads, scale = problem.options["n_heads"], problem.options["scale"]
    width = keys.shape[2] // n_heads
    scale = width**-0.5 if scale is None else scale
    batch = keys.shape[0]
    # The rounding of a float32 score passes into the probabilities.
    ratio = torch.finfo(torch.float32).eps / torch.finfo(problem.arguments[2].dtype).eps

    def by_head(value: Tensor) -> Tensor:
        return value.double().expand(batch, *value.shape[-2:]).unflatten(-1, (n_heads, width)).transpose(1, 2)

    k, v = by_head(keys), by_head(values)
    terms = dict.fromkeys(("out_commonality", "out_difference", "lse_commonality", "lse_difference", *NAMES), 0.0)
    for i, name in enumerate(("commonality", "difference")):
        q, grad = by_head(queries[i]), by_head(problem.arguments[4 + i])
        up, grad_lse = grad.abs(), problem.arguments[6 + i].double()[..., None]
        size = width * abs(scale) * _largest(queries[i]) * _largest(keys)
        spread = max(1.0, ratio * size)
        p = (scale * q @ k.mT).softmax(-1)
        along = up @ v.abs().mT
        exact = grad @ v.mT - (grad * (p @ v)).sum(-1, keepdim=True) + grad_lse
        # Slopes and results are rounded to storage; sums before that are float32.
        stored = exact.abs() + (up * (p @ v).abs()).sum(-1, keepdim=True)
        slope = p * (stored + ratio * (along + (p * along).sum(-1, keepdim=True) + grad_lse.abs()))
        to_query = slope @ k.abs()
        terms[f"out_{name}"] = spread * _largest(p @ v.abs())
        terms[f"lse_{name}"] = size
        shared = problem.arguments[i].dim() == 2
        terms[f"{name}_query"] = spread * abs(scale) * _largest(to_query.sum(0) if shared else to_query)
        # The terms of both streams, which may cancel.
        terms["keys"] += spread * abs(scale) * _largest(slope.mT @ q.abs())
        terms["values"] += spread * _largest(p.mT @ up)
    return terms


def complaint(problem: Problem, found: tuple[Tensor, ...]) -> str:
    """What is wrong with ``found``: shapes, dtypes, errors above twice those of the reference."""
    own = run(problem, backend="reference")
    oracle = run(_double(problem), backend="reference")
    terms = _terms(problem)
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
