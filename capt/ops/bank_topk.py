"""Exact top-k inner products between queries and bank rows."""

from __future__ import annotations

from torch import Tensor

from capt import reference
from capt.ops._checks import (
    check,
    check_count,
    check_float,
    check_index_range,
    check_integer,
    check_same_device,
    check_tensor,
)
from capt.ops._plan import Plan, reference_only

OP = "bank_topk"


def plan(backend: str | None = None) -> Plan:
    """Backend of a call."""
    return reference_only(OP, backend)


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
    check_tensor(OP, "queries", queries, ("Q", "d"))
    check_tensor(OP, "rows", rows, ("N", queries.shape[1]))
    check_float(OP, queries=queries, rows=rows)
    check(
        queries.dtype == rows.dtype, f"{OP}: rows must have the dtype of queries, {queries.dtype}, found {rows.dtype}"
    )
    check_count(OP, "k", k)
    check(rows.shape[0] < 1 << 32, f"{OP}: rows has {rows.shape[0]} entries, at most {(1 << 32) - 1} are supported")
    check(
        (row_ids is None) == (exclude is None),
        f"{OP}: row_ids and exclude belong together, found only {'exclude' if row_ids is None else 'row_ids'}",
    )
    if row_ids is not None and exclude is not None:
        check_tensor(OP, "row_ids", row_ids, (rows.shape[0],))
        check_tensor(OP, "exclude", exclude, (queries.shape[0],))
    if ranges is not None:
        check_tensor(OP, "ranges", ranges, (queries.shape[0], "P", "S", 2))
        check_integer(OP, ranges=ranges)
        filled = ranges[ranges[..., 0] < ranges[..., 1]]
        check_index_range(OP, "the bounds of ranges", filled, 0, rows.shape[0] + 1)
    check_integer(OP, row_ids=row_ids, exclude=exclude)
    check_same_device(OP, queries=queries, rows=rows, ranges=ranges, row_ids=row_ids, exclude=exclude)
    plan(backend)
    return reference.bank_topk(queries, rows, k, ranges, row_ids, exclude)
