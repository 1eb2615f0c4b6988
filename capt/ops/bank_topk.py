"""Exact top-k inner products between queries and bank rows.

Reading order: public function, plan (which backend and why), argument checks, registration of the torch ops.
The native ops ``capt::bank_topk`` and ``capt::bank_topk_ranges`` are defined in csrc/torch/bank_topk.cpp; the Triton
ones have the same schemas in the namespace ``capt_triton``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from capt import reference
from capt.errors import CaptError
from capt.ops._checks import (
    check_count,
    check_float,
    check_index_range,
    check_integer,
    check_same_device,
    check_tensor,
)
from capt.ops._plan import HAS_TRITON, NATIVE, Dispatch, Plan, slow_half

OP = "bank_topk"


DISPATCH = Dispatch(
    OP,
    {
        "cpu": "one pass over the bank without a score matrix (docs/kernels/bank_topk.md)",
        "cuda": "compiled CUDA kernels are present",
        "triton": "no compiled CUDA kernels in this build, Triton is installed",
    },
)


def bank_topk(
    queries: Tensor,
    rows: Tensor,
    *,
    k: int,
    ranges: Tensor | None = None,
    row_ids: Tensor | None = None,
    exclude: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The k rows with the largest inner product, over the whole bank or over row ranges of each query.

    queries [Q, d] and rows [N, d]: floating, same dtype. ranges int64 [Q, P, S, 2]: for query q and pair p the
    candidates are the union of the S ranges ``start <= row < stop`` (empty when start >= stop). row_ids int64 [N] with
    exclude int64 [Q]: rows whose id equals the query's excluded id are left out (-1: none).

    Returns scores float32 and row numbers int64, [Q, k] or [Q, P, k] with ranges, descending. Scores are accumulated
    in float32 (float64 for float64 inputs, then rounded); equal scores go to the lower row. Lists shorter than k end
    in -inf / -1; rows whose score is NaN or -inf are never returned. No gradient.

    Source: the retrieval step of CAPT's sample confusion miner; exclusion and ranges are ours. Raises CaptError.
    """
    k = check_count(OP, "k", k)
    _check_arguments(queries, rows, ranges, row_ids, exclude)
    queries, rows = queries.detach(), rows.detach()
    chosen, _ = DISPATCH.choose(queries.device.type, queries.dtype, backend, {"cpu": slow_half(queries.dtype)})
    if chosen == "reference":
        return reference.bank_topk(queries, rows, k, ranges, row_ids, exclude)
    ops = torch.ops.capt_triton if chosen == "triton" else torch.ops.capt
    if row_ids is not None and exclude is not None:
        row_ids, exclude = row_ids.contiguous(), exclude.contiguous()
    found: tuple[Tensor, Tensor]
    if ranges is None:
        found = ops.bank_topk(queries, rows, k, row_ids, exclude)
    else:
        found = ops.bank_topk_ranges(queries, rows, ranges.contiguous(), k, row_ids, exclude)
    return found


def plan(
    *,
    n_queries: int = 1,
    n_rows: int = 0,
    dim: int = 0,
    k: int = 1,
    candidates: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backend: str | None = None,
) -> Plan:
    """The backend a call of this size would take, why, and its compulsory traffic and arithmetic.

    candidates: with ranges, rows asked for by all lists together; each is read once for its own list.
    """
    place = torch.device(device).type
    against = {"cpu": slow_half(dtype)}
    chosen, reason = DISPATCH.choose(place, dtype, backend, against)
    products = n_queries * n_rows if candidates is None else candidates
    read = n_rows if candidates is None else candidates
    traffic = (n_queries + read) * dim * dtype.itemsize + n_queries * k * 12
    return Plan(OP, chosen, reason, traffic, 2 * products * dim, DISPATCH.rejected(place, dtype, against))


def _check_arguments(
    queries: Tensor, rows: Tensor, ranges: Tensor | None, row_ids: Tensor | None, exclude: Tensor | None
) -> None:
    check_tensor(OP, "queries", queries, ("Q", "d"))
    check_tensor(OP, "rows", rows, ("N", queries.shape[1]))
    check_float(OP, queries=queries, rows=rows)
    if queries.dtype != rows.dtype:
        raise CaptError(f"{OP}: rows must have the dtype of queries, {queries.dtype}, found {rows.dtype}")
    if rows.shape[0] >= 1 << 32:
        raise CaptError(f"{OP}: rows has {rows.shape[0]} entries, at most {(1 << 32) - 1} are supported")
    if (row_ids is None) != (exclude is None):
        only = "exclude" if row_ids is None else "row_ids"
        raise CaptError(f"{OP}: row_ids and exclude belong together, found only {only}")
    if row_ids is not None and exclude is not None:
        check_tensor(OP, "row_ids", row_ids, (rows.shape[0],))
        check_tensor(OP, "exclude", exclude, (queries.shape[0],))
    if ranges is not None:
        check_tensor(OP, "ranges", ranges, (queries.shape[0], "P", "S", 2))
        check_integer(OP, ranges=ranges)
        if ranges.device.type == "cpu":
            empty = (ranges[..., 0] >= ranges[..., 1])[..., None]
            check_index_range(OP, "the bounds of ranges", ranges.masked_fill(empty, 0), 0, rows.shape[0] + 1)
    check_integer(OP, row_ids=row_ids, exclude=exclude)
    check_same_device(OP, queries=queries, rows=rows, ranges=ranges, row_ids=row_ids, exclude=exclude)


# ---- registration ------------------------------------------------------------------------------------------------


def _fake_whole(
    queries: Tensor, rows: Tensor, k: int, row_ids: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    torch._check(queries.dim() == 2 and rows.dim() == 2, lambda: "capt::bank_topk: queries [Q, d] and rows [N, d]")
    torch._check(queries.dtype == rows.dtype, lambda: "capt::bank_topk: queries and rows differ in dtype")
    shape = (queries.shape[0], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def _fake_ranges(
    queries: Tensor, rows: Tensor, ranges: Tensor, k: int, row_ids: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    torch._check(ranges.dim() == 4, lambda: "capt::bank_topk_ranges: ranges must be [Q, P, S, 2]")
    torch._check(queries.dtype == rows.dtype, lambda: "capt::bank_topk_ranges: queries and rows differ in dtype")
    shape = (ranges.shape[0], ranges.shape[1], k)
    return queries.new_empty(shape, dtype=torch.float32), queries.new_empty(shape, dtype=torch.int64)


def _complete(namespace: str) -> None:
    """Fake kernels of a namespace; the ops have no gradient."""
    torch.library.register_fake(f"{namespace}::bank_topk", _fake_whole)
    torch.library.register_fake(f"{namespace}::bank_topk_ranges", _fake_ranges)


def _triton_whole(
    queries: Tensor, rows: Tensor, k: int, row_ids: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    from capt.kernels import bank_topk as kernels

    found: tuple[Tensor, Tensor] = kernels.bank_topk(queries, rows, k, row_ids, exclude)
    return found


def _triton_ranges(
    queries: Tensor, rows: Tensor, ranges: Tensor, k: int, row_ids: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    from capt.kernels import bank_topk as kernels

    found: tuple[Tensor, Tensor] = kernels.bank_topk_ranges(queries, rows, ranges, k, row_ids, exclude)
    return found


def _define_triton() -> None:
    """capt_triton::bank_topk*: the schemas of csrc/torch/bank_topk.cpp, run by Triton."""
    torch.library.define(
        "capt_triton::bank_topk",
        "(Tensor queries, Tensor rows, int k, Tensor? row_ids, Tensor? exclude) -> (Tensor scores, Tensor index)",
    )
    torch.library.define(
        "capt_triton::bank_topk_ranges",
        "(Tensor queries, Tensor rows, Tensor ranges, int k, Tensor? row_ids, Tensor? exclude) -> "
        "(Tensor scores, Tensor index)",
    )
    torch.library.impl("capt_triton::bank_topk", "cuda", _triton_whole)
    torch.library.impl("capt_triton::bank_topk_ranges", "cuda", _triton_ranges)
    _complete("capt_triton")


if NATIVE.loaded:
    _complete("capt")
if HAS_TRITON:
    _define_triton()
