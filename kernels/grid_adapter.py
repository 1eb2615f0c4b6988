"""Diff-Manner Adapter in Triton: depth-wise 3x3 stencil in token layout.

    out[b, p, c]     = x[b, p, c] + a_b * sum_t w[c, t] * x[b, p + t, c]
    partial[b, t, c] = sum_p g[b, p, c] * x[b, p + t, c]

Forward program: (BLOCK_P tokens, BLOCK_C channels) of one image; the nine neighbours come from L1/L2 after the first
read. Partial-sum program: one image, one kernel row (3 taps), BLOCK_C channels; it walks the grid in steps of BLOCK_P,
so the sum's order is fixed and results are bitwise repeatable. Loads are widened to float32 before any arithmetic.
Programs are numbered along one axis, channels first, images last: the other axes end at 65,535.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_P = 16
BLOCK_C = 64
NUM_WARPS = 4


@triton.jit
def _adapter_kernel(
    tokens,  # [B, L, D], channels contiguous
    weight,  # [D, 3, 3] float32
    alpha,  # [B] or [1] float32; unused without HAS_ALPHA
    out,  # [B, L, D] contiguous
    length,
    dim,
    height,
    width,
    n_prefix,
    batch_stride,
    token_stride,
    alpha_stride,
    scale,
    TRANSPOSE: tl.constexpr,
    HAS_ALPHA: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    n_channel_blocks, n_token_blocks = tl.cdiv(dim, BLOCK_C), tl.cdiv(length, BLOCK_P)
    c = program % n_channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    program //= n_channel_blocks
    token = program % n_token_blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    b = (program // n_token_blocks).to(tl.int64)
    channels = c < dim
    inside = (token < length)[:, None] & channels[None, :]
    cell = token - n_prefix
    y = cell // width
    x = cell - y * width
    on_grid = (cell >= 0) & (cell < height * width)
    has_left, has_right = x > 0, x + 1 < width
    place = tokens + b * batch_stride + (token[:, None].to(tl.int64) * token_stride + c[None, :])
    taps = weight + c * 9
    centre = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for i in tl.static_range(3):
        row = y + (i - 1)
        row_valid = on_grid & (row >= 0) & (row < height)
        for j in tl.static_range(3):
            valid = row_valid
            if j == 0:
                valid = row_valid & has_left
            if j == 2:
                valid = row_valid & has_right
            offset = ((i - 1) * width + (j - 1)) * token_stride
            neighbour = tl.load(place + offset, mask=inside & valid[:, None], other=0.0)
            w = tl.load(taps + (8 - (i * 3 + j) if TRANSPOSE else i * 3 + j), mask=channels, other=0.0)
            total += w[None, :] * neighbour.to(tl.float32)
    a = scale
    if HAS_ALPHA:
        a = scale * tl.load(alpha + b * alpha_stride)
    # Tokens outside the grid are copied as they are: 0 * total would turn an infinite value into NaN.
    mixed = tl.where(on_grid[:, None], centre + a * total, centre)
    target = out + b * length * dim + token[:, None].to(tl.int64) * dim + c[None, :]
    tl.store(target, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _correlate_kernel(
    tokens,  # [B, L, D], channels contiguous
    grad,  # [B, L, D], channels contiguous
    partial,  # [B, 9, D] float32
    dim,
    height,
    width,
    n_prefix,
    batch_stride,
    token_stride,
    grad_batch_stride,
    grad_token_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    program = tl.program_id(0)
    n_channel_blocks = tl.cdiv(dim, BLOCK_C)
    c = program % n_channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i = program // n_channel_blocks % 3
    b = (program // n_channel_blocks // 3).to(tl.int64)
    left = tl.zeros((BLOCK_C,), dtype=tl.float32)
    middle = tl.zeros((BLOCK_C,), dtype=tl.float32)
    right = tl.zeros((BLOCK_C,), dtype=tl.float32)
    image = tokens + b * batch_stride + n_prefix * token_stride
    grads = grad + b * grad_batch_stride + n_prefix * grad_token_stride
    for start in range(0, height * width, BLOCK_P):
        cell = start + tl.arange(0, BLOCK_P)
        y = cell // width
        x = cell - y * width
        row = y + (i - 1)
        channels = (c < dim)[None, :]
        here = (cell < height * width)[:, None] & channels
        g = tl.load(grads + cell[:, None].to(tl.int64) * grad_token_stride + c[None, :], mask=here, other=0.0)
        g = g.to(tl.float32)
        valid = (cell < height * width) & (row >= 0) & (row < height)
        source = image + (cell[:, None].to(tl.int64) + (i - 1) * width) * token_stride + c[None, :]
        v = tl.load(source - token_stride, mask=(valid & (x > 0))[:, None] & channels, other=0.0)
        left += tl.sum(g * v.to(tl.float32), axis=0)
        v = tl.load(source, mask=valid[:, None] & channels, other=0.0)
        middle += tl.sum(g * v.to(tl.float32), axis=0)
        v = tl.load(source + token_stride, mask=(valid & (x + 1 < width))[:, None] & channels, other=0.0)
        right += tl.sum(g * v.to(tl.float32), axis=0)
    target = partial + (b * 9 + i * 3) * dim + c
    tl.store(target, left, mask=c < dim)
    tl.store(target + dim, middle, mask=c < dim)
    tl.store(target + 2 * dim, right, mask=c < dim)


def _channels_contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if tensor.shape[2] > 1 and tensor.stride(2) != 1 else tensor


def grid_adapter(
    tokens: Tensor,
    weight: Tensor,
    alpha: Tensor | None,
    scale: float,
    height: int,
    width: int,
    n_prefix: int,
    transpose: bool,
) -> Tensor:
    """Launch the forward (or, mirrored, the input gradient); arguments as in the op's schema."""
    tokens = _channels_contiguous(tokens)
    batch, length, dim = tokens.shape
    out = tokens.new_empty(tokens.shape)
    if out.numel() == 0:
        return out
    _adapter_kernel[(triton.cdiv(dim, BLOCK_C) * triton.cdiv(length, BLOCK_P) * batch,)](
        tokens,
        weight,
        weight if alpha is None else alpha,
        out,
        length,
        dim,
        height,
        width,
        n_prefix,
        tokens.stride(0),
        tokens.stride(1),
        int(alpha is not None and alpha.numel() == batch),
        scale,
        TRANSPOSE=transpose,
        HAS_ALPHA=alpha is not None,
        BLOCK_P=BLOCK_P,
        BLOCK_C=BLOCK_C,
        num_warps=NUM_WARPS,
    )
    return out


def grid_adapter_correlate(tokens: Tensor, grad: Tensor, height: int, width: int, n_prefix: int) -> Tensor:
    """Launch the per-image weight gradient [B, 9, D] float32."""
    tokens, grad = _channels_contiguous(tokens), _channels_contiguous(grad)
    batch, _, dim = tokens.shape
    partial = tokens.new_empty((batch, 9, dim), dtype=torch.float32)
    if partial.numel() == 0:
        return partial
    _correlate_kernel[(triton.cdiv(dim, BLOCK_C) * 3 * batch,)](
        tokens,
        grad,
        partial,
        dim,
        height,
        width,
        n_prefix,
        tokens.stride(0),
        tokens.stride(1),
        grad.stride(0),
        grad.stride(1),
        BLOCK_P=BLOCK_P,
        BLOCK_C=BLOCK_C,
        num_warps=NUM_WARPS,
    )
    return partial
