"""Prompt attention over keys that all prompts of an image share, in Triton.

One program per block of rows (those of both kinds stacked), image and head, with an online softmax in base 2: the
scale and log2(e) are folded into the scores. Backward: ``_delta_kernel`` (row sums of grad * out), ``_keys_kernel``
(dK, dV of a block of keys, over all rows) and ``_query_kernel`` (dQ of a block of rows, over all keys and, for queries
that all images share, over all images). Without key and value gradients only the first and the last run.

Sums are float32 and have a fixed order; nothing is atomic: results are bitwise repeatable. float32 products are exact
ones, not TF32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: (pass, bytes of an element) -> widest head block: rows, keys, warps, stages. The first block that fits is taken.
CONFIGS: dict[tuple[str, int], dict[int, tuple[int, int, int, int]]] = {
    ("forward", 2): {64: (64, 64, 4, 3), 128: (64, 64, 4, 2), 256: (32, 32, 4, 1)},
    ("keys", 2): {64: (64, 64, 4, 2), 128: (32, 64, 8, 2), 256: (16, 32, 8, 1)},
    ("query", 2): {64: (64, 64, 4, 2), 128: (64, 32, 4, 2), 256: (32, 32, 8, 1)},
    ("forward", 4): {64: (32, 32, 8, 1), 128: (16, 32, 8, 1), 256: (16, 16, 4, 1)},
    ("keys", 4): {64: (32, 32, 4, 1), 128: (16, 16, 4, 1), 256: (16, 16, 8, 1)},
    ("query", 4): {64: (32, 32, 4, 1), 128: (32, 32, 8, 1), 256: (16, 16, 8, 1)},
}
#: Rows and channels of one step of the row sums.
DELTA_ROWS, DELTA_WIDTH = 32, 64


def blocks(kind: str, itemsize: int, head_dim: int) -> dict[str, int]:
    """The configuration of a pass; heads wider than every listed block take the last one's tiles."""
    head_block = max(16, triton.next_power_of_2(head_dim))
    options = CONFIGS[kind, itemsize]
    rows, keys, warps, stages = options[min((width for width in options if width >= head_block), default=256)]
    return {"BLOCK_M": rows, "BLOCK_N": keys, "BLOCK_C": head_block, "num_warps": warps, "num_stages": stages}


@triton.jit
def _place(blocks, heads):
    """(block, head, image) of a program. All on one axis: the others are limited to 65535."""
    which = tl.program_id(0)
    return which % blocks, which // blocks % heads, which // blocks // heads


@triton.jit
def _stacked(first, second, row, c, rows_0, rows_1, head_dim, stride, width):
    """Rows of two tensors [., rows, width] on top of each other; zeros outside. first, second: this image and head."""
    channels = (c < head_dim)[None, :]
    upper = (row < rows_0)[:, None] & channels
    lower = ((row >= rows_0) & (row < rows_0 + rows_1))[:, None] & channels
    place = row.to(tl.int64)[:, None] * width + c[None, :]
    value = tl.load(first + place, mask=upper, other=0.0)
    return value + tl.load(second + place - stride, mask=lower, other=0.0)


@triton.jit
def _stacked_numbers(first, second, row, rows_0, rows_1):
    """The same for one float32 number per row."""
    value = tl.load(first + row, mask=row < rows_0, other=0.0)
    return value + tl.load(second + row - rows_0, mask=(row >= rows_0) & (row < rows_0 + rows_1), other=0.0)


@triton.jit
def _forward_kernel(
    query_0, query_1,  # [R, D], or [B, R, D] with an image stride
    keys, values,  # [B, L, D], channels contiguous
    out_0, out_1,  # [B, R, D]
    lse_0, lse_1,  # [B, H, R] float32
    blocks, rows_0, rows_1, shift, length, heads, head_dim, image_0, image_1,
    key_batch, key_token, value_batch, value_token, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block, h, image = _place(blocks, heads)
    b = image.to(tl.int64)
    width = heads * head_dim
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    channels = (c < head_dim)[None, :]
    column = h * head_dim
    q = _stacked(query_0 + b * image_0 + column, query_1 + b * image_1 + column, row, c, rows_0, rows_1, head_dim,
                 shift, width)  # fmt: skip
    most = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    out = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for start in range(0, length, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = (n < length)[:, None] & channels
        token = n.to(tl.int64)[:, None]
        k = tl.load(keys + b * key_batch + token * key_token + column + c[None, :], mask=inside, other=0.0)
        v = tl.load(values + b * value_batch + token * value_token + column + c[None, :], mask=inside, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        score = tl.where((n < length)[None, :], score, float("-inf"))
        found = tl.maximum(most, tl.max(score, axis=1))
        base = tl.where(found == float("-inf"), 0.0, found)
        p = tl.exp2(score - base[:, None])
        fade = tl.exp2(most - base)
        total = total * fade + tl.sum(p, axis=1)
        out = out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        most = found
    out = out / total[:, None]
    lse = tl.where(most == float("inf"), most, (most + tl.log2(total)) * LN2)
    place = row.to(tl.int64)[:, None] * width + c[None, :]
    upper = row < rows_0
    lower = (row >= rows_0) & (row < rows_0 + rows_1)
    rounded = out.to(out_0.dtype.element_ty)
    tl.store(out_0 + b * rows_0 * width + column + place, rounded, mask=upper[:, None] & channels)
    tl.store(out_1 + b * rows_1 * width + column + place - shift, rounded, mask=lower[:, None] & channels)
    tl.store(lse_0 + (b * heads + h) * rows_0 + row, lse, mask=upper)
    tl.store(lse_1 + (b * heads + h) * rows_1 + row - rows_0, lse, mask=lower)


@triton.jit
def _delta_kernel(
    out, grad,  # [B, R, D]
    grad_lse, delta,  # [B, H, R] float32
    blocks, rows, heads, head_dim, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block, h, image = _place(blocks, heads)
    b = image.to(tl.int64)
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    place = (b * rows + row) * heads * head_dim + h * head_dim
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first in range(0, head_dim, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = (row < rows)[:, None] & (c < head_dim)[None, :]
        o = tl.load(out + place[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
        g = tl.load(grad + place[:, None] + c[None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(o * g, axis=1)
    number = (b * heads + h) * rows + row
    total -= tl.load(grad_lse + number, mask=row < rows, other=0.0)
    tl.store(delta + number, total, mask=row < rows)


@triton.jit
def _keys_kernel(
    query_0, query_1, keys, values,  # as in the forward
    grad_0, grad_1,  # [B, R, D]
    lse_0, lse_1, delta_0, delta_1,  # [B, H, R] float32
    grad_keys, grad_values,  # [B, L, D]
    blocks, rows_0, rows_1, shift, length, heads, head_dim, image_0, image_1,
    key_batch, key_token, value_batch, value_token, scale,
    NEED_KEYS: tl.constexpr, NEED_VALUES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block, h, image = _place(blocks, heads)
    b = image.to(tl.int64)
    width = heads * head_dim
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    c = tl.arange(0, BLOCK_C)
    column = h * head_dim
    inside = (n < length)[:, None] & (c < head_dim)[None, :]
    token = n.to(tl.int64)[:, None]
    k = tl.load(keys + b * key_batch + token * key_token + column + c[None, :], mask=inside, other=0.0)
    v = tl.load(values + b * value_batch + token * value_token + column + c[None, :], mask=inside, other=0.0)
    dk = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    of_0 = (b * heads + h) * rows_0
    of_1 = (b * heads + h) * rows_1
    for start in range(0, rows_0 + rows_1, BLOCK_M):
        row = start + tl.arange(0, BLOCK_M)
        q = _stacked(query_0 + b * image_0 + column, query_1 + b * image_1 + column, row, c, rows_0, rows_1, head_dim,
                     shift, width)  # fmt: skip
        g = _stacked(grad_0 + b * rows_0 * width + column, grad_1 + b * rows_1 * width + column, row, c, rows_0,
                     rows_1, head_dim, shift, width)  # fmt: skip
        lse = _stacked_numbers(lse_0 + of_0, lse_1 + of_1, row, rows_0, rows_1)
        delta = _stacked_numbers(delta_0 + of_0, delta_1 + of_1, row, rows_0, rows_1)
        score = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        p = tl.where((row < rows_0 + rows_1)[None, :], tl.exp2(score - (lse * LOG2E)[None, :]), 0.0)
        if NEED_VALUES:
            dv += tl.dot(p.to(g.dtype), g, input_precision="ieee")
        if NEED_KEYS:
            slope = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - delta[None, :])
            slope = tl.where((row < rows_0 + rows_1)[None, :], slope, 0.0)  # not 0 * infinity
            dk += tl.dot(slope.to(q.dtype), q, input_precision="ieee")
    place = (b * length + n)[:, None] * width + column + c[None, :]
    if NEED_KEYS:
        tl.store(grad_keys + place, (dk * scale).to(grad_keys.dtype.element_ty), mask=inside)
    if NEED_VALUES:
        tl.store(grad_values + place, dv.to(grad_values.dtype.element_ty), mask=inside)


@triton.jit
def _query_kernel(
    query, keys, values, grad, lse, delta,  # of one kind
    grad_query,  # shape of query
    blocks, batch, rows, length, heads, head_dim, key_batch, key_token, value_batch, value_token, scale,
    PER_IMAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    block, h, image = _place(blocks, heads)  # image: 0 for queries that all images share
    image = image.to(tl.int64)
    width = heads * head_dim
    row = block * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    column = h * head_dim
    here = (row < rows)[:, None] & (c < head_dim)[None, :]
    place = row.to(tl.int64)[:, None] * width + column + c[None, :]
    q = tl.load(query + image * rows * width + place, mask=here, other=0.0)
    dq = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for i in range(0, 1 if PER_IMAGE else batch):
        b = image + i
        g = tl.load(grad + b * rows * width + place, mask=here, other=0.0)
        number = (b * heads + h) * rows + row
        log_sum = tl.load(lse + number, mask=row < rows, other=0.0) * LOG2E
        mean = tl.load(delta + number, mask=row < rows, other=0.0)
        for start in range(0, length, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            inside = (n < length)[:, None] & (c < head_dim)[None, :]
            token = n.to(tl.int64)[:, None]
            k = tl.load(keys + b * key_batch + token * key_token + column + c[None, :], mask=inside, other=0.0)
            v = tl.load(values + b * value_batch + token * value_token + column + c[None, :], mask=inside, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
            p = tl.exp2(score - log_sum[:, None])
            slope = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - mean[:, None])
            slope = tl.where((n < length)[None, :], slope, 0.0)
            dq += tl.dot(slope.to(k.dtype), k, input_precision="ieee")
    tl.store(grad_query + image * rows * width + place, (dq * scale).to(grad_query.dtype.element_ty), mask=here)


def _channels_contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if tensor.shape[2] > 1 and tensor.stride(2) != 1 else tensor


def _image_stride(query: Tensor) -> int:
    return query.stride(0) if query.dim() == 3 else 0


def prompt_attention_shared(
    commonality_query: Tensor, difference_query: Tensor, keys: Tensor, values: Tensor, n_heads: int, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the forward; arguments as in the op's schema."""
    queries = commonality_query.contiguous(), difference_query.contiguous()
    keys, values = _channels_contiguous(keys), _channels_contiguous(values)
    batch, length, width = keys.shape
    rows = [query.shape[-2] for query in queries]
    outs = [keys.new_empty(batch, r, width) for r in rows]
    lses = [keys.new_empty((batch, n_heads, r), dtype=torch.float32) for r in rows]
    if batch and sum(rows):
        options = blocks("forward", keys.itemsize, width // n_heads)
        count = triton.cdiv(sum(rows), options["BLOCK_M"])
        _forward_kernel[(count * n_heads * batch,)](
            *queries, keys, values, *outs, *lses, count, *rows, rows[0] * width, length, n_heads, width // n_heads,
            *map(_image_stride, queries), keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), scale,
            **options,
        )  # fmt: skip
    return outs[0], outs[1], lses[0], lses[1]


def prompt_attention_shared_backward(
    grad_com: Tensor,
    grad_diff: Tensor,
    grad_lse_com: Tensor,
    grad_lse_diff: Tensor,
    commonality_query: Tensor,
    difference_query: Tensor,
    keys: Tensor,
    values: Tensor,
    out_com: Tensor,
    out_diff: Tensor,
    lse_com: Tensor,
    lse_diff: Tensor,
    n_heads: int,
    scale: float,
    need_query: bool,
    need_keys: bool,
    need_values: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch the backward; gradients that are not needed are empty."""
    queries = commonality_query.contiguous(), difference_query.contiguous()
    keys, values = _channels_contiguous(keys), _channels_contiguous(values)
    grads, lses = (grad_com.contiguous(), grad_diff.contiguous()), (lse_com.contiguous(), lse_diff.contiguous())
    batch, length, width = keys.shape
    head_dim = width // n_heads
    rows = [query.shape[-2] for query in queries]
    grad_queries = [torch.zeros_like(query) if need_query else keys.new_empty(0) for query in queries]
    grad_keys = keys.new_zeros(keys.shape) if need_keys else keys.new_empty(0)
    grad_values = keys.new_zeros(values.shape) if need_values else keys.new_empty(0)
    if batch == 0:
        return grad_queries[0], grad_queries[1], grad_keys, grad_values
    strides = (keys.stride(0), keys.stride(1), values.stride(0), values.stride(1))
    deltas = []
    for grad, out, grad_lse, r in zip(grads, (out_com, out_diff), (grad_lse_com, grad_lse_diff), rows, strict=True):
        deltas.append(grad_lse.new_empty(batch, n_heads, r))
        if r:
            count = triton.cdiv(r, DELTA_ROWS)
            _delta_kernel[(count * n_heads * batch,)](
                out.contiguous(), grad, grad_lse.contiguous(), deltas[-1], count, r, n_heads, head_dim,
                BLOCK_M=DELTA_ROWS, BLOCK_C=DELTA_WIDTH, num_warps=4,
            )  # fmt: skip
    if (need_keys or need_values) and sum(rows):
        options: dict[str, Any] = blocks("keys", keys.itemsize, head_dim)
        count = triton.cdiv(length, options["BLOCK_N"])
        _keys_kernel[(count * n_heads * batch,)](
            *queries, keys, values, *grads, *lses, *deltas, grad_keys, grad_values,
            count, *rows, rows[0] * width, length, n_heads, head_dim, *map(_image_stride, queries), *strides, scale,
            NEED_KEYS=need_keys, NEED_VALUES=need_values, **options,
        )  # fmt: skip
    if need_query:
        options = blocks("query", keys.itemsize, head_dim)
        for query, grad, lse, delta, out, r in zip(queries, grads, lses, deltas, grad_queries, rows, strict=True):
            if r == 0:
                continue
            count = triton.cdiv(r, options["BLOCK_M"])
            _query_kernel[(count * n_heads * (batch if query.dim() == 3 else 1),)](
                query, keys, values, grad, lse, delta, out, count, batch, r, length, n_heads, head_dim, *strides, scale,
                PER_IMAGE=query.dim() == 3, **options,
            )  # fmt: skip
    return grad_queries[0], grad_queries[1], grad_keys, grad_values
