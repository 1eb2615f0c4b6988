"""Prompt attention over gathered rows in Triton; the variant with shared keys is in prompt_attention_shared.py.

One program per image and kind. The scores of its rows go where the weights belong, are normalised there, and
the rows are read again (from the caches) for the weighted sum, so their number has no limit. Table gradients: one
program per table row adds its uses in ascending order, which a stable sort of the indices makes neighbours.

Sums are float32 and have a fixed order; nothing is atomic: results are bitwise repeatable. Loads are widened before any
arithmetic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from capt.kernels.prompt_attention_shared import prompt_attention_shared, prompt_attention_shared_backward

__all__ = [
    "prompt_attention",
    "prompt_attention_backward",
    "prompt_attention_shared",
    "prompt_attention_shared_backward",
]

#: Rows and channels of one step.
BLOCK_R, BLOCK_D = 16, 128
NUM_WARPS = 2


@triton.jit
def _table_rows(index, b, r, pairs, prompts, n_rows):
    """Rows of the table that rows r of image b stand for, and which of them exist."""
    inside = r < pairs * prompts
    t = tl.load(index + b * pairs + r // prompts, mask=inside, other=-1)
    present = inside & (t >= 0) & (t < n_rows)
    return tl.where(present, t, 0) * prompts + r % prompts, present


@triton.jit
def _products(
    vector, table, index, b, start, pairs, prompts, n_rows, dim, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """vector . row for the rows start... of image b, and which of them exist."""
    row, present = _table_rows(index, b, start + tl.arange(0, BLOCK_R), pairs, prompts, n_rows)
    total = tl.zeros((BLOCK_R,), dtype=tl.float32)
    for first in range(0, dim, BLOCK_D):
        c = first + tl.arange(0, BLOCK_D)
        left = tl.load(vector + b * dim + c, mask=c < dim, other=0.0).to(tl.float32)
        right = tl.load(table + row[:, None] * dim + c[None, :], mask=present[:, None] & (c < dim)[None, :], other=0.0)
        total += tl.sum(right.to(tl.float32) * left[None, :], axis=1)
    return total, present


@triton.jit
def _weighted(factor, table, index, b, c, pairs, prompts, n_rows, dim, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Sum of factor * row over the rows of image b, channels c."""
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, pairs * prompts, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        row, present = _table_rows(index, b, r, pairs, prompts, n_rows)
        f = tl.load(factor + b * pairs * prompts + r, mask=r < pairs * prompts, other=0.0)
        v = tl.load(table + row[:, None] * dim + c[None, :], mask=present[:, None] & (c < dim)[None, :], other=0.0)
        total += tl.sum(tl.where(present[:, None], f[:, None] * v.to(tl.float32), 0.0), axis=0)
    return total


@triton.jit
def _gathered_kind(
    query, table, index, log_prior, out, weight, pairs, prompts, n_rows, dim, scale,
    HAS_PRIOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = pairs * prompts
    most = float("-inf")
    for start in range(0, n, BLOCK_R):
        product, present = _products(
            query, table, index, b, start, pairs, prompts, n_rows, dim, BLOCK_R, BLOCK_D
        )  # fmt: skip
        r = start + tl.arange(0, BLOCK_R)
        score = product * scale
        if HAS_PRIOR:
            score += tl.load(log_prior + b * pairs + r // prompts, mask=r < n, other=0.0)
        score = tl.where(present, score, float("-inf"))
        tl.store(weight + b * n + r, score, mask=r < n)
        most = tl.maximum(most, tl.max(tl.where(score == score, score, float("-inf")), axis=0))
    tl.debug_barrier()
    total = 0.0
    for start in range(0, n, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        score = tl.load(weight + b * n + r, mask=r < n, other=float("-inf"))
        total += tl.sum(tl.where(r < n, tl.exp(score - most), 0.0), axis=0)
    tl.debug_barrier()
    for start in range(0, n, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        score = tl.load(weight + b * n + r, mask=r < n, other=float("-inf"))
        share = tl.where(most > float("-inf"), tl.exp(score - most) / total, 0.0)
        tl.store(weight + b * n + r, share, mask=r < n)
    tl.debug_barrier()
    for first in range(0, dim, BLOCK_D):
        c = first + tl.arange(0, BLOCK_D)
        h = _weighted(weight, table, index, b, c, pairs, prompts, n_rows, dim, BLOCK_R, BLOCK_D)
        tl.store(out + b * dim + c, h.to(out.dtype.element_ty), mask=c < dim)


@triton.jit
def _gathered_kernel(
    query,  # [B, d]
    table_0, table_1,  # [n, s, d]
    index_0, index_1,  # [B, k]
    log_prior,  # [B, k] float32; unused without HAS_PRIOR
    out_0, out_1,  # [B, d]
    weight_0, weight_1,  # [B, k, s] float32
    pairs, prompts_0, prompts_1, n_rows_0, n_rows_1, dim, scale,
    HAS_PRIOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        _gathered_kind(query, table_0, index_0, log_prior, out_0, weight_0, pairs, prompts_0, n_rows_0, dim, scale,
                       HAS_PRIOR, BLOCK_R, BLOCK_D)  # fmt: skip
    else:
        _gathered_kind(query, table_1, index_1, log_prior, out_1, weight_1, pairs, prompts_1, n_rows_1, dim, scale,
                       HAS_PRIOR, BLOCK_R, BLOCK_D)  # fmt: skip


@triton.jit
def _slopes(
    grad, table, index, weight, slope, pairs, prompts, n_rows, dim, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):
    """slope: gradients of the scores of one kind."""
    b = tl.program_id(0).to(tl.int64)
    n = pairs * prompts
    mean = 0.0
    for start in range(0, n, BLOCK_R):
        product, present = _products(grad, table, index, b, start, pairs, prompts, n_rows, dim, BLOCK_R, BLOCK_D)
        r = start + tl.arange(0, BLOCK_R)
        w = tl.load(weight + b * n + r, mask=r < n, other=0.0)
        mean += tl.sum(w * product, axis=0)
        tl.store(slope + b * n + r, product, mask=r < n)
    tl.debug_barrier()
    for start in range(0, n, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        _, present = _table_rows(index, b, r, pairs, prompts, n_rows)
        w = tl.load(weight + b * n + r, mask=r < n, other=0.0)
        product = tl.load(slope + b * n + r, mask=r < n, other=0.0)
        tl.store(slope + b * n + r, tl.where(present, w * (product - mean), 0.0), mask=r < n)
    tl.debug_barrier()


@triton.jit
def _gathered_backward_kernel(
    grad_0, grad_1,  # [B, d]
    table_0, table_1, index_0, index_1, weight_0, weight_1,  # as in the forward
    slope_0, slope_1,  # [B, k, s] float32, written
    grad_query,  # [B, d]
    grad_prior,  # [B, k] float32
    pairs, prompts_0, prompts_1, n_rows_0, n_rows_1, dim, scale,
    NEED_QUERY: tl.constexpr, NEED_PRIOR: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    _slopes(grad_0, table_0, index_0, weight_0, slope_0, pairs, prompts_0, n_rows_0, dim, BLOCK_R, BLOCK_D)
    _slopes(grad_1, table_1, index_1, weight_1, slope_1, pairs, prompts_1, n_rows_1, dim, BLOCK_R, BLOCK_D)
    if NEED_QUERY:
        for first in range(0, dim, BLOCK_D):
            c = first + tl.arange(0, BLOCK_D)
            total = _weighted(slope_0, table_0, index_0, b, c, pairs, prompts_0, n_rows_0, dim, BLOCK_R, BLOCK_D)
            total += _weighted(slope_1, table_1, index_1, b, c, pairs, prompts_1, n_rows_1, dim, BLOCK_R, BLOCK_D)
            tl.store(grad_query + b * dim + c, (total * scale).to(grad_query.dtype.element_ty), mask=c < dim)
    if NEED_PRIOR:
        for first in range(0, pairs, BLOCK_R):
            j = first + tl.arange(0, BLOCK_R)
            total = tl.zeros((BLOCK_R,), dtype=tl.float32)
            for i in range(0, prompts_0):
                total += tl.load(slope_0 + (b * pairs + j) * prompts_0 + i, mask=j < pairs, other=0.0)
            for i in range(0, prompts_1):
                total += tl.load(slope_1 + (b * pairs + j) * prompts_1 + i, mask=j < pairs, other=0.0)
            tl.store(grad_prior + b * pairs + j, total, mask=j < pairs)


@triton.jit
def _table_kernel(
    query, grad,  # [B, d]
    weight, slope,  # [B, k, s] float32
    first_use,  # [n + 1]: where the uses of a table row begin in order
    order,  # [B * k]
    out,  # [n, s, d]
    pairs, prompts, dim, scale, BLOCK_D: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1)
    for first in range(0, dim, BLOCK_D):
        c = first + tl.arange(0, BLOCK_D)
        total = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for e in range(tl.load(first_use + t), tl.load(first_use + t + 1)):
            use = tl.load(order + e)
            g = tl.load(grad + use // pairs * dim + c, mask=c < dim, other=0.0).to(tl.float32)
            q = tl.load(query + use // pairs * dim + c, mask=c < dim, other=0.0).to(tl.float32)
            w = tl.load(weight + use * prompts + i)
            total += w * g + tl.load(slope + use * prompts + i) * scale * q
        tl.store(out + (t * prompts + i) * dim + c, total.to(out.dtype.element_ty), mask=c < dim)


def prompt_attention(
    query: Tensor,
    commonality: Tensor,
    difference: Tensor,
    commonality_index: Tensor,
    difference_index: Tensor,
    log_prior: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the gathered forward; arguments as in the op's schema."""
    query, tables = query.contiguous(), (commonality.contiguous(), difference.contiguous())
    indices = (commonality_index.contiguous(), difference_index.contiguous())
    batch, dim = query.shape
    pairs = indices[0].shape[1]
    outs = [query.new_empty(batch, dim) for _ in tables]
    weights = [query.new_empty((batch, pairs, table.shape[1]), dtype=torch.float32) for table in tables]
    if batch:
        _gathered_kernel[(batch, 2)](
            query, *tables, *indices, query if log_prior is None else log_prior.float().contiguous(), *outs, *weights,
            pairs, tables[0].shape[1], tables[1].shape[1], tables[0].shape[0], tables[1].shape[0], dim, scale,
            HAS_PRIOR=log_prior is not None, BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
        )  # fmt: skip
    return outs[0], outs[1], weights[0], weights[1]


def prompt_attention_backward(
    grad_commonality: Tensor,
    grad_difference: Tensor,
    query: Tensor,
    commonality: Tensor,
    difference: Tensor,
    commonality_index: Tensor,
    difference_index: Tensor,
    log_prior: Tensor | None,
    scale: float,
    weight_commonality: Tensor,
    weight_difference: Tensor,
    need_query: bool,
    need_tables: bool,
    need_prior: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the gathered backward; gradients that are not needed are empty."""
    query, tables = query.contiguous(), (commonality.contiguous(), difference.contiguous())
    grads = (grad_commonality.contiguous(), grad_difference.contiguous())
    indices = (commonality_index.contiguous(), difference_index.contiguous())
    weights = (weight_commonality.contiguous(), weight_difference.contiguous())
    batch, dim = query.shape
    pairs = indices[0].shape[1]
    grad_query = torch.empty_like(query) if need_query else query.new_empty(0)
    grad_tables = [torch.empty_like(table) if need_tables else query.new_empty(0) for table in tables]
    grad_prior = query.new_empty((batch, pairs) if need_prior else (0,), dtype=torch.float32)
    slopes = [torch.empty_like(weight) for weight in weights]
    if batch:
        _gathered_backward_kernel[(batch,)](
            *grads, *tables, *indices, *weights, *slopes, grad_query, grad_prior,
            pairs, tables[0].shape[1], tables[1].shape[1], tables[0].shape[0], tables[1].shape[0], dim, scale,
            NEED_QUERY=need_query, NEED_PRIOR=need_prior, BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
        )  # fmt: skip
    if need_tables:
        for grad, index, weight, slope, out in zip(grads, indices, weights, slopes, grad_tables, strict=True):
            if out.numel() == 0:
                continue
            used, order = index.reshape(-1).sort(stable=True)
            first_use = torch.searchsorted(used, torch.arange(len(out) + 1, device=used.device))
            _table_kernel[(out.shape[0], out.shape[1])](
                query, grad, weight, slope, first_use, order, out, pairs, out.shape[1], dim, scale,
                BLOCK_D=BLOCK_D, num_warps=1,
            )  # fmt: skip
    if need_prior and log_prior is not None:
        grad_prior = grad_prior.to(log_prior.dtype)
    return grad_query, grad_tables[0], grad_tables[1], grad_prior
