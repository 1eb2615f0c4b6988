"""What one would write or install without the op: torch products with a top-k, and faiss where it is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

HAS_FAISS = importlib.util.find_spec("faiss") is not None
#: Rows of one step of the careful form: its scores stay in cache.
CHUNK = 8192

Found = tuple[Tensor, Tensor]


def product(queries: Tensor, rows: Tensor, k: int) -> Found:
    """The usual form: the whole score matrix, then its top-k."""
    score, index = (queries @ rows.T).topk(k, dim=1)
    return score, index


def chunked(queries: Tensor, rows: Tensor, k: int) -> Found:
    """The careful form: the score matrix in pieces, the best so far beside each."""
    score = queries.new_empty(len(queries), 0)
    index = torch.empty(len(queries), 0, dtype=torch.int64, device=rows.device)
    for start in range(0, len(rows), CHUNK):
        found, place = (queries @ rows[start : start + CHUNK].T).topk(min(k, len(rows) - start, CHUNK), dim=1)
        score, index = torch.cat([score, found], dim=1), torch.cat([index, place + start], dim=1)
        score, place = score.topk(min(k, score.shape[1]), dim=1)
        index = index.gather(1, place)
    return score, index


def masked(queries: Tensor, rows: Tensor, k: int, pair_of_row: Tensor, pairs: Tensor) -> Found:
    """By pair, the usual form: all scores once, then a mask and a top-k for each of the pairs [Q, P, 2]."""
    scores = queries @ rows.T
    found = []
    for p in range(pairs.shape[1]):
        wanted = (pair_of_row == pairs[:, p, :1]) | (pair_of_row == pairs[:, p, 1:])
        found.append(scores.masked_fill(~wanted, float("-inf")).topk(k, dim=1))
    return torch.stack([score for score, _ in found], 1), torch.stack([index for _, index in found], 1)


def sliced(queries: Tensor, rows: Tensor, k: int, ranges: list[list[list[tuple[int, int]]]]) -> Found:
    """By pair, the careful form: one product for every range, which is a view of the bank. Bounds as Python numbers."""
    scores, indices = [], []
    for query, lists in zip(queries, ranges, strict=True):
        for bounds in lists:
            found = torch.cat([rows[start:stop] @ query for start, stop in bounds])
            number = torch.cat([torch.arange(start, stop, device=rows.device) for start, stop in bounds])
            score, place = found.topk(k)
            scores.append(score)
            indices.append(number[place])
    shape = (len(queries), -1, k)
    return torch.stack(scores).reshape(shape), torch.stack(indices).reshape(shape)


def _module() -> Any:
    return importlib.import_module("faiss")


def faiss_flat(queries: Tensor, rows: Tensor, k: int) -> dict[str, Callable[[], Found]]:
    """IndexFlatIP over float32 copies: faiss' own choice of algorithm, and its BLAS path for any number of queries."""
    if not HAS_FAISS:
        return {}
    faiss = _module()
    faiss.omp_set_num_threads(torch.get_num_threads())
    index, asked = faiss.IndexFlatIP(rows.shape[1]), queries.float().numpy()
    index.add(rows.float().numpy())

    def search(threshold: int) -> Found:
        default = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = threshold
        try:
            score, row = index.search(asked, k)
        finally:
            faiss.cvar.distance_compute_blas_threshold = default
        return torch.from_numpy(score), torch.from_numpy(row)

    usual = faiss.cvar.distance_compute_blas_threshold
    return {"faiss flat": lambda: search(usual), "faiss flat, BLAS": lambda: search(1)}


def faiss_quantized(queries: Tensor, rows: Tensor, k: int) -> dict[str, Callable[[], Found]]:
    """Scalar-quantised indexes of 16 bits a channel: what faiss reads fastest at that precision."""
    if not HAS_FAISS:
        return {}
    faiss = _module()
    faiss.omp_set_num_threads(torch.get_num_threads())
    asked, stored = queries.float().numpy(), rows.float().numpy()

    def search(kind: int) -> Callable[[], Found]:
        index = faiss.IndexScalarQuantizer(rows.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        index.train(stored[:1000])
        index.add(stored)

        def run() -> Found:
            score, row = index.search(asked, k)
            return torch.from_numpy(score), torch.from_numpy(row)

        return run

    kinds = faiss.ScalarQuantizer
    return {"faiss SQ-bf16": search(kinds.QT_bf16), "faiss SQ-fp16": search(kinds.QT_fp16)}
