"""Cases of bank_topk: the whole bank with many and with few queries, and by class pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.comparison import Case, Comparison
from benchmarks.rivals import bank_topk as rivals
from capt import ops

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: rows, channels, queries, k, belongs to the quick run
WHOLE = [
    (100_000, 512, 16, 10, True),
    (100_000, 512, 64, 100, True),
    (100_000, 768, 64, 10, False),
    (100_000, 768, 16, 100, False),
    (100_000, 512, 256, 10, False),
    (100_000, 768, 256, 100, False),
    (1_000_000, 512, 16, 10, False),
    (1_000_000, 512, 64, 100, False),
    (1_000_000, 768, 256, 10, False),
]
FEW = [(200_000, 512, 1, 10, True), (200_000, 512, 4, 10, False), (200_000, 512, 8, 10, True)]
#: rows, channels, queries, pairs a query, k: each query asks for one row in a hundred
BY_PAIR = [(200_000, 512, 8, 3, 10, True), (1_000_000, 512, 1, 3, 10, False), (1_000_000, 512, 8, 3, 10, False)]
SELECTED = 100
#: GPU: more rows and queries, as in the design goals
GPU_WHOLE = [(10_000, 512, 64, 10, True)]
GPU_WHOLE += [(1_000_000, 512, q, k, q in (64, 256)) for q in (1, 16, 64, 256, 1024) for k in (10, 100)]

BEST_FAISS_FLAT = ("faiss flat", "faiss flat, BLAS")
BEST_OF_FEW = ("faiss SQ-bf16", "faiss SQ-fp16", "mm + topk", "chunked mm + topk")


def cases(device: str = "cpu") -> Iterator[Case]:
    """Every row of the table; on a GPU without faiss, whose GPU indexes have their own package."""
    dtypes = ("bfloat16", "float16") if torch.device(device).type == "cuda" else ("bfloat16",)
    whole = GPU_WHOLE if torch.device(device).type == "cuda" else [*WHOLE, *FEW]
    for dtype in dtypes:
        for n_rows, dim, n_queries, k, quick in whole:
            shape = f"N {n_rows:.0e} d {dim} Q {n_queries} k {k}".replace("e+0", "e")
            build = _whole(n_rows, dim, n_queries, k, DTYPES[dtype], device)
            yield Case("bank_topk", shape, dtype, "forward", quick, build)
        for n_rows, dim, n_queries, n_pairs, k, quick in BY_PAIR:
            shape = f"N {n_rows:.0e} d {dim} Q {n_queries} k {k}, {n_pairs} pairs".replace("e+0", "e")
            build = _by_pair(n_rows, dim, n_queries, n_pairs, k, DTYPES[dtype], device)
            yield Case("bank_topk", shape, dtype, "forward", quick, build)


def _random(count: int, dim: int, dtype: torch.dtype, device: str) -> Tensor:
    """Normal deviates, made in pieces: a bank of a million rows never exists in float32."""
    out = torch.empty(count, dim, dtype=dtype, device=device)
    for piece in out.split(50_000):
        piece.copy_(torch.randn(piece.shape, device=device))
    return out


def _whole(
    n_rows: int, dim: int, n_queries: int, k: int, dtype: torch.dtype, device: str
) -> Callable[[str | None], Comparison]:
    def build(backend: str | None) -> Comparison:
        queries, rows = _random(n_queries, dim, dtype, device), _random(n_rows, dim, dtype, device)
        functions: dict[str, Callable[[], Any]] = {
            "ours": lambda: ops.bank_topk(queries, rows, k=k, backend=backend),
            "mm + topk": lambda: rivals.product(queries, rows, k),
            "chunked mm + topk": lambda: rivals.chunked(queries, rows, k),
        }
        few = n_queries <= 8
        if device == "cpu":
            functions |= (rivals.faiss_quantized if few else rivals.faiss_flat)(queries, rows, k)
        plan = ops.explain(
            "bank_topk", n_queries=n_queries, n_rows=n_rows, dim=dim, k=k, dtype=dtype, device=device, backend=backend
        )
        goals: dict[tuple[str, ...], float] = {("mm + topk",): 1.5 if k >= 100 else 1.2, BEST_FAISS_FLAT: 2.2}
        if few:
            goals = {BEST_OF_FEW: 1.3}
        return Comparison(
            functions,
            lambda: _disagreement(queries, rows, functions),
            plan.bytes,
            plan.flops,
            "read" if n_queries <= 32 else "gemm",
            goals if device == "cpu" else {("mm + topk",): _gpu_goal(n_rows, n_queries)},
        )

    return build


def _gpu_goal(n_rows: int, n_queries: int) -> float:
    """Least gain on a GPU: a small bank is launches, few queries are one read of it, many are the product."""
    if n_rows <= 10_000:
        return 4.0
    if n_queries <= 16:
        return 1.3
    return 1.6 if n_queries < 128 else 2.0 if n_queries <= 512 else 1.8


def _by_pair(
    n_rows: int, dim: int, n_queries: int, n_pairs: int, k: int, dtype: torch.dtype, device: str
) -> Callable[[str | None], Comparison]:
    """A bank sorted by class pair. A confusion pair is two neighbouring groups of rows, once in each direction."""

    def build(backend: str | None) -> Comparison:
        queries, rows = _random(n_queries, dim, dtype, device), _random(n_rows, dim, dtype, device)
        n_groups = SELECTED * n_pairs * 2
        group = torch.arange(n_rows) * n_groups // n_rows
        start = torch.searchsorted(group, torch.arange(n_groups + 1))
        pairs = torch.stack([torch.randperm(n_groups)[: 2 * n_pairs].reshape(n_pairs, 2) for _ in range(n_queries)])
        ranges = torch.stack([start[pairs], start[pairs + 1]], dim=-1)  # [Q, P, 2, 2]
        bounds = [[[(a, b) for a, b in pair] for pair in query] for query in ranges.tolist()]
        candidates = int((ranges[..., 1] - ranges[..., 0]).sum())
        group, pairs, ranges = group.int().to(device), pairs.int().to(device), ranges.to(device)
        functions: dict[str, Callable[[], Any]] = {
            "ours": lambda: ops.bank_topk(queries, rows, k=k, ranges=ranges, backend=backend),
            "masked": lambda: rivals.masked(queries, rows, k, group, pairs),
            "sliced": lambda: rivals.sliced(queries, rows, k, bounds),
        }
        plan = ops.explain(
            "bank_topk", n_queries=n_queries * n_pairs, n_rows=n_rows, dim=dim, k=k, candidates=candidates, dtype=dtype,
            device=device, backend=backend,
        )  # fmt: skip
        return Comparison(
            functions,
            lambda: _disagreement(queries, rows, functions),
            plan.bytes,
            plan.flops,
            "read",
            # On a GPU: half of what reading only the selected rows could gain.
            {("masked",): 30.0 if device == "cpu" else 0.5 * SELECTED / n_pairs},
        )

    return build


def _disagreement(queries: Tensor, rows: Tensor, functions: dict[str, Callable[[], Any]]) -> str:
    """Exact scores of the rows that each function names: ours lose to no rival anywhere, rivals come close to ours."""
    ranked: dict[str, Tensor] = {}
    for name, function in functions.items():
        index = function()[1].to(rows.device).flatten(1)
        if (index < 0).any():
            return f"{name} found too few rows"
        exact = torch.stack([rows[own].float() @ query.float() for own, query in zip(index, queries, strict=True)])
        ranked[name] = exact
    ours = ranked.pop("ours")
    slack = 1e-4 * float(ours.abs().max())
    for name, theirs in ranked.items():
        if not bool((ours.sort(1).values >= theirs.sort(1).values - slack).all()):
            return f"{name} found better rows"
        if float(theirs.sum()) < 0.98 * float(ours.sum()):
            return f"{name} found far worse rows"
    return ""
