"""Exact top-k inner products in Triton: the bank is split between programs, a second kernel merges their lists.

A candidate is one integer, (ordered bits of its score, inverted row): larger means a higher score, then a lower row;
no two candidates are equal. A program keeps the best LIST keys of each of its queries, unsorted; a block of candidates
pays one reduction for each key it contributes, and none if nothing exceeds the smallest key of any list.

    scan    whole bank: BLOCK_Q queries x BLOCK_N rows a step through tl.dot, every n_splits-th block of rows
            ranges: one query and pair a program, RANGE_N rows a step, only rows of its ranges are read
    merge   one list a program: the best keys of all splits, in order, and the bound of the next walk

Lists longer than MAX_LIST are filled by ceil(k / MAX_LIST) walks over the bank; a walk takes only keys below the last
one of the walk before. Workspace: 8 * LIST bytes for every list of every split, at most MAX_LISTS lists, or one for
each query (query and pair) if those are more. Nothing waits for the GPU. Sums are float32 and in a fixed order: results
are bitwise repeatable and do not depend on the number of splits.

Counts are not compiled in. Of the layouts one is: contiguous features, everything a multiple of 16, for wide loads;
any other bank (column-major, odd widths) takes a kernel that reads element by element.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_Q = 16
BLOCK_N = 64
BLOCK_D = 64
STRIDED_D = 32  # features a step where each needs an address of its own
RANGE_N = 32  # rows a step of the scan of ranges
BLOCK_M = 256  # keys a step of the merge
MIN_LIST = 8  # keys of a list: powers of 2 from here on
MAX_LIST = 128
MAX_LISTS = 8448  # lists of all splits together: four programs a multiprocessor of a large GPU
MIN_BLOCKS = 4  # steps of a split
NUM_WARPS = 8
RANGE_WARPS = 4
RANGE_REGISTERS = 128  # left alone, ptxas spills rather than use more than 64
#: Below the key of every score that may be returned: the key of -infinity with an impossible row.
NONE = tl.constexpr(-(0x7F800000 << 32))
COUNTS = ["n_query", "n_rows", "n_splits"]
RANGE_COUNTS = ["n_pairs", "n_ranges", "n_rows", "n_splits"]
LAYOUT = ["queries", "rows", "dim", "row_stride", "row_step"]


@triton.jit
def _keys(score, row, valid):
    """int64 keys of float32 scores; NONE for NaN, -infinity and whatever is not valid."""
    score = tl.where(score == 0.0, 0.0, score)  # -0.0 ties with 0.0
    bits = score.to(tl.int32, bitcast=True).to(tl.int64)
    ordered = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return tl.where(valid & (score > -float("inf")), (ordered << 32) | (0xFFFFFFFF - row), NONE)


@triton.jit(do_not_specialize=COUNTS)
def _scan_kernel(
    queries,  # [Q, d], contiguous
    rows,  # [N, d]
    row_ids,  # [N] int64; unused without EXCLUDE
    exclude,  # [Q] int64
    limits,  # [Q] int64: only keys below; unused without LIMITED
    lists,  # [Q, n_splits, LIST] int64
    n_query,
    n_rows,
    dim,
    row_stride,
    row_step,
    n_splits,
    EXCLUDE: tl.constexpr,
    LIMITED: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    split = tl.program_id(1)
    q = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    slot = tl.arange(0, LIST)
    keys = tl.full((BLOCK_Q, LIST), NONE, dtype=tl.int64)
    least = tl.min(keys, axis=1)
    unwanted = tl.load(exclude + q, mask=q < n_query, other=-1) if EXCLUDE else q
    limit = tl.load(limits + q, mask=q < n_query, other=NONE) if LIMITED else q
    wide = tl.full((), BLOCK_N, dtype=tl.int64)
    for block in range(split, (n_rows - 1) // BLOCK_N + 1, n_splits):  # blocks, not rows: those could pass 2^31
        row = block * wide + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_Q, BLOCK_N), dtype=tl.float32)
        for first in range(0, dim, BLOCK_D):
            d = first + tl.arange(0, BLOCK_D).to(tl.int64)
            left = tl.load(
                queries + q[:, None] * dim + d[None, :],
                mask=(q < n_query)[:, None] & (d < dim)[None, :],
                other=0.0,
            )
            right = tl.load(
                rows + row[None, :] * row_stride + d[:, None] * row_step,
                mask=(row < n_rows)[None, :] & (d < dim)[:, None],
                other=0.0,
            )
            if UPCAST:  # the interpreter has no 16-bit arithmetic to trust
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision="ieee")
        valid = (q < n_query)[:, None] & (row < n_rows)[None, :]
        if EXCLUDE:
            ids = tl.load(row_ids + row, mask=row < n_rows, other=-1)
            valid = valid & ((ids[None, :] != unwanted[:, None]) | (unwanted < 0)[:, None])
        key = _keys(total, row[None, :], valid)
        if LIMITED:
            key = tl.where(key < limit[:, None], key, NONE)
        largest = tl.max(key, axis=1)
        while tl.max((largest > least).to(tl.int32), axis=0) > 0:
            # One of the smallest entries of each list gives way to the largest candidate of its query.
            place = tl.min(tl.where(keys == least[:, None], slot[None, :], LIST), axis=1)
            taken = (slot[None, :] == place[:, None]) & (largest > least)[:, None]
            keys = tl.where(taken, largest[:, None], keys)
            key = tl.where(key == largest[:, None], NONE, key)
            largest = tl.max(key, axis=1)
            least = tl.min(keys, axis=1)
    target = lists + (q[:, None] * n_splits + split) * LIST + slot[None, :]
    tl.store(target, keys, mask=(q < n_query)[:, None])


@triton.jit(do_not_specialize=RANGE_COUNTS)
def _scan_ranges_kernel(
    queries,  # [Q, d], contiguous
    rows,  # [N, d]
    ranges,  # [Q * P, S, 2] int64
    row_ids,  # [N] int64; unused without EXCLUDE
    exclude,  # [Q] int64
    limits,  # [Q * P] int64; unused without LIMITED
    lists,  # [Q * P, n_splits, LIST] int64
    n_pairs,
    n_ranges,
    n_rows,
    dim,
    row_stride,
    row_step,
    n_splits,
    EXCLUDE: tl.constexpr,
    LIMITED: tl.constexpr,
    LIST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    q = segment // n_pairs
    slot = tl.arange(0, LIST)
    keys = tl.full((LIST,), NONE, dtype=tl.int64)
    least = tl.min(keys, axis=0)
    bounds = ranges + segment * n_ranges * 2
    for s in range(0, n_ranges):
        begin = tl.maximum(tl.load(bounds + 2 * s), 0)
        end = tl.minimum(tl.load(bounds + 2 * s + 1), n_rows)
        for start in range(begin + split * BLOCK_N, end, n_splits * BLOCK_N):
            row = start + tl.arange(0, BLOCK_N).to(tl.int64)
            valid = row < end
            for earlier in range(0, s):  # rows of an earlier range have been seen
                low = tl.load(bounds + 2 * earlier)
                high = tl.load(bounds + 2 * earlier + 1)
                valid = valid & ((row < low) | (row >= high))
            if EXCLUDE:
                unwanted = tl.load(exclude + q)
                ids = tl.load(row_ids + row, mask=valid, other=-1)
                valid = valid & ((ids != unwanted) | (unwanted < 0))
            product = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
            for first in range(0, dim, BLOCK_D):
                d = first + tl.arange(0, BLOCK_D).to(tl.int64)
                left = tl.load(queries + q * dim + d, mask=d < dim, other=0.0)
                right = tl.load(
                    rows + row[:, None] * row_stride + d[None, :] * row_step,
                    mask=valid[:, None] & (d < dim)[None, :],
                    other=0.0,
                )
                product += left.to(tl.float32)[None, :] * right.to(tl.float32)
            key = _keys(tl.sum(product, axis=1), row, valid)
            if LIMITED:
                key = tl.where(key < tl.load(limits + segment), key, NONE)
            largest = tl.max(key, axis=0)
            while largest > least:
                place = tl.min(tl.where(keys == least, slot, LIST), axis=0)
                keys = tl.where(slot == place, largest, keys)
                key = tl.where(key == largest, NONE, key)
                largest = tl.max(key, axis=0)
                least = tl.min(keys, axis=0)
    tl.store(lists + (segment * n_splits + split) * LIST + slot, keys)


# For every other layout.
_scan_strided_kernel = triton.jit(_scan_kernel.fn, do_not_specialize=COUNTS + LAYOUT)
_scan_ranges_strided_kernel = triton.jit(_scan_ranges_kernel.fn, do_not_specialize=RANGE_COUNTS + LAYOUT)


@triton.jit(do_not_specialize=["n_keys", "k", "first", "count"])
def _merge_kernel(
    lists,  # [n_lists, n_keys] int64
    limits,  # [n_lists] int64, written
    score,  # [n_lists, k] float32
    index,  # [n_lists, k] int64
    n_keys,
    k,
    first,
    count,
    LIST: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    one = tl.program_id(0).to(tl.int64)
    slot = tl.arange(0, LIST)
    keys = tl.full((LIST,), NONE, dtype=tl.int64)
    least = tl.min(keys, axis=0)
    for start in range(0, n_keys, BLOCK_M):
        at = start + tl.arange(0, BLOCK_M)
        key = tl.load(lists + one * n_keys + at, mask=at < n_keys, other=NONE)
        largest = tl.max(key, axis=0)
        while largest > least:
            place = tl.min(tl.where(keys == least, slot, LIST), axis=0)
            keys = tl.where(slot == place, largest, keys)
            key = tl.where(key == largest, NONE, key)
            largest = tl.max(key, axis=0)
            least = tl.min(keys, axis=0)
    limit = tl.max(keys, axis=0)
    for j in range(first, first + count):
        limit = tl.max(keys, axis=0)
        keys = tl.where(keys == limit, NONE, keys)
        ordered = limit >> 32
        bits = tl.where(ordered < 0, (-ordered) | -0x80000000, ordered)
        found = limit > NONE
        value = tl.where(found, bits.to(tl.int32).to(tl.float32, bitcast=True), -float("inf"))
        tl.store(score + one * k + j, value)
        tl.store(index + one * k + j, tl.where(found, 0xFFFFFFFF - (limit & 0xFFFFFFFF), -1))
    tl.store(limits + one, limit)


def _splits(n_groups: int, lists_a_group: int, n_blocks: int) -> int:
    """Programs that share the candidates of a group of lists: as many as MAX_LISTS allows, MIN_BLOCKS steps each."""
    return max(1, min(MAX_LISTS // max(1, n_groups * lists_a_group), n_blocks // MIN_BLOCKS))


def _is_wide(queries: Tensor, rows: Tensor) -> bool:
    """Contiguous features, lines and addresses at multiples of 16."""
    sizes = (rows.stride(0), rows.shape[1], rows.data_ptr(), queries.data_ptr())
    return rows.stride(1) == 1 and all(size % 16 == 0 for size in sizes)


def _width(k: int) -> int:
    return min(MAX_LIST, max(MIN_LIST, triton.next_power_of_2(k)))


def _outputs(queries: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    scores = queries.new_full(shape, float("-inf"), dtype=torch.float32)
    return scores, queries.new_full(shape, -1, dtype=torch.int64)


def bank_topk(
    queries: Tensor, rows: Tensor, k: int, row_ids: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch over the whole bank; arguments as in the op's schema."""
    n_query, dim = queries.shape
    n_rows = rows.shape[0]
    score, index = _outputs(queries, (n_query, k))
    if n_query == 0 or n_rows == 0:
        return score, index
    width = _width(k)
    queries = queries.contiguous()
    groups = triton.cdiv(n_query, BLOCK_Q)
    n_splits = _splits(groups, BLOCK_Q, triton.cdiv(n_rows, BLOCK_N))
    lists = queries.new_empty((n_query, n_splits, width), dtype=torch.int64)
    limits = queries.new_empty((n_query,), dtype=torch.int64)
    scan: Any
    scan, block_d = (_scan_kernel, BLOCK_D) if _is_wide(queries, rows) else (_scan_strided_kernel, STRIDED_D)
    for first in range(0, min(k, n_rows), width):
        scan[(groups, n_splits)](
            queries,
            rows,
            limits if row_ids is None else row_ids,
            limits if exclude is None else exclude,
            limits,
            lists,
            n_query,
            n_rows,
            dim,
            *rows.stride(),
            n_splits,
            EXCLUDE=exclude is not None,
            LIMITED=first > 0,
            LIST=width,
            BLOCK_Q=BLOCK_Q,
            BLOCK_N=BLOCK_N,
            BLOCK_D=block_d,
            UPCAST=not queries.is_cuda,
            num_warps=NUM_WARPS,
        )
        _merge(lists, limits, score, index, k, first)
    return score, index


def bank_topk_ranges(
    queries: Tensor, rows: Tensor, ranges: Tensor, k: int, row_ids: Tensor | None, exclude: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Launch over row ranges; arguments as in the op's schema. Bounds outside the bank are cut."""
    n_query, n_pairs, n_ranges, _ = ranges.shape
    n_rows, dim = rows.shape
    score, index = _outputs(queries, (n_query, n_pairs, k))
    n_lists = n_query * n_pairs
    if n_lists == 0 or n_rows == 0 or n_ranges == 0:
        return score, index
    width = _width(k)
    queries = queries.contiguous()
    n_splits = _splits(n_lists, 1, min(64, triton.cdiv(n_rows, RANGE_N)))
    lists = queries.new_empty((n_lists, n_splits, width), dtype=torch.int64)
    limits = queries.new_empty((n_lists,), dtype=torch.int64)
    ranges = ranges.contiguous()
    wide = _is_wide(queries, rows)
    scan: Any
    scan, block_d = (_scan_ranges_kernel, BLOCK_D) if wide else (_scan_ranges_strided_kernel, STRIDED_D)
    for first in range(0, min(k, n_rows), width):
        scan[(n_lists, n_splits)](
            queries,
            rows,
            ranges,
            limits if row_ids is None else row_ids,
            limits if exclude is None else exclude,
            limits,
            lists,
            n_pairs,
            n_ranges,
            n_rows,
            dim,
            *rows.stride(),
            n_splits,
            EXCLUDE=exclude is not None,
            LIMITED=first > 0,
            LIST=width,
            BLOCK_N=RANGE_N,
            BLOCK_D=block_d,
            num_warps=RANGE_WARPS,
            maxnreg=RANGE_REGISTERS,
        )
        _merge(lists, limits, score, index, k, first)
    return score, index


def _merge(lists: Tensor, limits: Tensor, score: Tensor, index: Tensor, k: int, first: int) -> None:
    """Places first, first + 1, ... of every list, and the key that bounds the next walk."""
    n_lists, n_splits, width = lists.shape
    _merge_kernel[(n_lists,)](
        lists,
        limits,
        score,
        index,
        n_splits * width,
        k,
        first,
        min(width, k - first),
        LIST=width,
        BLOCK_M=BLOCK_M,
        num_warps=NUM_WARPS,
    )
