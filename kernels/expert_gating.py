"""Mixture of experts in Triton: router, experts, weighted sum, and their gradients.

    probs = softmax(x gate^T)    weights = top_k of probs, renormalised
    y[n]  = sum_e weights[n, e] (w_out[e] dropout(QuickGELU(w_in[e] x[n] + b_in[e])) + b_out[e])

Every expert is a dense product over tiles of tokens; tiles in which no token uses the expert are left out. The sum over
experts stays in registers, in ascending order. The plain products of the backward pass are torch's. Operands are
widened to float32 before any arithmetic, tensor-core products excepted, which accumulate in float32. No atomics:
results are bitwise repeatable.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Tiles of the products by (bytes of an element, few tokens).
CONFIGS: dict[tuple[int, bool], dict[str, int]] = {
    (2, True): {"BLOCK_N": 16, "BLOCK_C": 64, "BLOCK_K": 128, "num_warps": 4, "num_stages": 4},
    (2, False): {"BLOCK_N": 128, "BLOCK_C": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3},
    (4, True): {"BLOCK_N": 16, "BLOCK_C": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
    (4, False): {"BLOCK_N": 64, "BLOCK_C": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3},
}
FEW_TOKENS = 64
ROUTER_VALUES = 4096  # tokens x experts x columns a program of the router holds
HIDDEN_CONFIG = {"BLOCK_N": 8, "BLOCK_H": 128, "num_warps": 4}  # element-wise part of the backward pass


@triton.jit
def _router_kernel(
    x,  # [N, D]
    gate,  # [E, D]
    weights,  # [N, E] float32
    probs,  # [N, E] float32
    tokens,
    dim,
    experts,
    top_k,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    exists = (e < experts)[None, :]
    logits = tl.full((BLOCK_N, BLOCK_E), 0, tl.float32)
    for start in range(0, dim, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        inside = (d < dim)[None, :]
        rows = tl.load(x + n[:, None].to(tl.int64) * dim + d[None, :], mask=(n < tokens)[:, None] & inside, other=0.0)
        columns = tl.load(gate + e[:, None].to(tl.int64) * dim + d[None, :], mask=(e < experts)[:, None] & inside,
                          other=0.0)  # fmt: skip
        logits += tl.sum(rows.to(tl.float32)[:, None, :] * columns.to(tl.float32)[None, :, :], axis=2)
    logits = tl.where(exists, logits, float("-inf"))
    mass = tl.where(exists, tl.exp(logits - tl.max(logits, axis=1)[:, None]), 0.0)
    prob = mass / tl.sum(mass, axis=1)[:, None]
    taken = tl.full((BLOCK_N, BLOCK_E), 0, tl.int32)
    for _ in range(top_k):
        left = tl.where((taken == 0) & exists, prob, -1.0)
        best = tl.max(left, axis=1)
        lowest = tl.min(tl.where(left == best[:, None], e[None, :], BLOCK_E), axis=1)
        taken = tl.where(e[None, :] == lowest[:, None], 1, taken)
    kept = prob * taken.to(tl.float32)  # a product: NaN stays NaN
    weight = kept / tl.sum(kept, axis=1)[:, None]
    place = n[:, None].to(tl.int64) * experts + e[None, :]
    valid = (n < tokens)[:, None] & exists
    tl.store(probs + place, prob, mask=valid)
    tl.store(weights + place, weight, mask=valid)


@triton.jit
def _router_backward_kernel(
    grad_weights,  # [N, E] float32, as the next four
    grad_probs,
    weights,
    probs,
    grad_logits,
    gate,  # [E, D]
    grad_x,  # [N, D]; unused without NEED_X
    tokens,
    dim,
    experts,
    NEED_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.arange(0, BLOCK_E)
    valid = (n < tokens)[:, None] & (e < experts)[None, :]
    place = n[:, None].to(tl.int64) * experts + e[None, :]
    weight = tl.load(weights + place, mask=valid, other=0.0)
    prob = tl.load(probs + place, mask=valid, other=0.0)
    grad_weight = tl.load(grad_weights + place, mask=valid, other=0.0)
    kept = weight != 0.0
    mass = tl.sum(tl.where(kept, prob, 0.0), axis=1)[:, None]
    mean = tl.sum(tl.where(kept, grad_weight * weight, 0.0), axis=1)[:, None]
    grad = tl.load(grad_probs + place, mask=valid, other=0.0) + tl.where(kept, (grad_weight - mean) / mass, 0.0)
    logit = prob * (grad - tl.sum(tl.where(valid, grad * prob, 0.0), axis=1)[:, None])
    tl.store(grad_logits + place, logit, mask=valid)
    if NEED_X:
        logit = tl.where(valid, logit, 0.0)
        for start in range(0, dim, BLOCK_D):
            d = start + tl.arange(0, BLOCK_D)
            columns = tl.load(gate + e[:, None].to(tl.int64) * dim + d[None, :],
                              mask=(e < experts)[:, None] & (d < dim)[None, :], other=0.0)  # fmt: skip
            total = tl.sum(logit[:, :, None] * columns.to(tl.float32)[None, :, :], axis=1)
            tl.store(grad_x + n[:, None].to(tl.int64) * dim + d[None, :], total.to(grad_x.dtype.element_ty),
                     mask=(n < tokens)[:, None] & (d < dim)[None, :])  # fmt: skip


@triton.jit
def _mix32(word):
    word = (word ^ (word >> 16)) * 0x7FEB352D
    word = (word ^ (word >> 15)) * 0x846CA68B
    return word ^ (word >> 16)


@triton.jit
def _survives(low, high, threshold, n, e, h):
    """Whether hidden unit h [H] of expert e survives for token n [N]; see capt.reference.dropout_mask."""
    token = n.to(tl.uint32)
    expert = e.to(tl.uint32)
    first = _mix32(_mix32(high.to(tl.uint32) ^ token) ^ expert)
    second = _mix32(_mix32(low.to(tl.uint32) ^ token) + expert)
    word = _mix32(_mix32(first[:, None] ^ h.to(tl.uint32)[None, :]) ^ second[:, None])
    return word >= threshold.to(tl.uint32)


@triton.jit
def _sigmoid(value):
    return 1.0 / (1.0 + tl.exp(-1.702 * value))


@triton.jit
def _product(rows, matrix, n, c, limit_n, limit_c, depth, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
             BLOCK_K: tl.constexpr):  # fmt: skip
    """rows[n] . matrix[c] over the depth, in float32."""
    total = tl.full((BLOCK_N, BLOCK_C), 0, tl.float32)
    for start in range(0, depth, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        left = tl.load(rows + n[:, None].to(tl.int64) * depth + k[None, :],
                       mask=(n < limit_n)[:, None] & (k < depth)[None, :], other=0.0)  # fmt: skip
        right = tl.load(matrix + c[None, :].to(tl.int64) * depth + k[:, None],
                        mask=(c < limit_c)[None, :] & (k < depth)[:, None], other=0.0)  # fmt: skip
        total = tl.dot(left, right, total, input_precision="ieee")
    return total


@triton.jit(do_not_specialize=["low", "high", "threshold"])
def _hidden_kernel(
    x,  # [N, D]
    weights,  # [N, E] float32
    w_in,  # [E, H, D]
    b_in,  # [E, H]
    hidden,  # [E, N, H]
    tokens,
    dim,
    width,
    experts,
    low,
    high,
    threshold,
    scale,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    e = tl.program_id(2).to(tl.int64)
    weight = tl.load(weights + n.to(tl.int64) * experts + e, mask=n < tokens, other=0.0)
    if tl.max((weight != 0.0).to(tl.int32), axis=0) > 0:
        total = _product(x, w_in + e * width * dim, n, h, tokens, width, dim, BLOCK_N, BLOCK_C, BLOCK_K)
        total += tl.load(b_in + e * width + h, mask=h < width, other=0.0).to(tl.float32)[None, :]
        active = total * _sigmoid(total)
        if HAS_DROPOUT:
            active = tl.where(_survives(low, high, threshold, n, e, h), active * scale, 0.0)
        place = (e * tokens + n[:, None]) * width + h[None, :]
        tl.store(hidden + place, active.to(hidden.dtype.element_ty), mask=(n < tokens)[:, None] & (h < width)[None, :])


@triton.jit
def _output_kernel(
    hidden,  # [E, N, H]
    weights,  # [N, E] float32
    w_out,  # [E, D, H]
    b_out,  # [E, D]
    y,  # [N, D]
    tokens,
    dim,
    width,
    experts,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.full((BLOCK_N, BLOCK_C), 0, tl.float32)
    for i in range(experts):
        e = tl.full((), i, tl.int64)
        weight = tl.load(weights + n.to(tl.int64) * experts + e, mask=n < tokens, other=0.0)
        if tl.max((weight != 0.0).to(tl.int32), axis=0) > 0:
            total = _product(hidden + e * tokens * width, w_out + e * dim * width, n, d, tokens, dim, width, BLOCK_N,
                             BLOCK_C, BLOCK_K)  # fmt: skip
            total += tl.load(b_out + e * dim + d, mask=d < dim, other=0.0).to(tl.float32)[None, :]
            sums += tl.where((weight != 0.0)[:, None], weight[:, None] * total, 0.0)
    place = n[:, None].to(tl.int64) * dim + d[None, :]
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=(n < tokens)[:, None] & (d < dim)[None, :])


@triton.jit(do_not_specialize=["low", "high", "threshold"])
def _hidden_backward_kernel(
    z,  # [N, E, H] pre-activation without bias; becomes its gradient
    g,  # [E, N, H] gradient of an expert's hidden activation; becomes weight times that activation
    weights,  # [N, E] float32
    b_in,  # [E, H]
    b_out,  # [E, D]
    grad_y,  # [N, D]
    grad_weights,  # [N, E] float32
    tokens,
    dim,
    width,
    experts,
    low,
    high,
    threshold,
    scale,
    HAS_DROPOUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    e = tl.program_id(1).to(tl.int64)
    exists = (n < tokens)[:, None]
    place = n.to(tl.int64) * experts + e
    weight = tl.load(weights + place, mask=n < tokens, other=0.0)
    used = (weight != 0.0)[:, None]
    inner = tl.full((BLOCK_N,), 0, tl.float32)
    for start in range(0, width, BLOCK_H):
        h = start + tl.arange(0, BLOCK_H)
        valid = exists & (h < width)[None, :]
        to_z = z + place[:, None] * width + h[None, :]
        to_g = g + (e * tokens + n[:, None]) * width + h[None, :]
        value = tl.load(to_z, mask=valid, other=0.0).to(tl.float32)
        value += tl.load(b_in + e * width + h, mask=h < width, other=0.0).to(tl.float32)[None, :]
        grad = tl.load(to_g, mask=valid, other=0.0).to(tl.float32)
        s = _sigmoid(value)
        active = value * s
        slope = s + 1.702 * active * (1.0 - s)
        if HAS_DROPOUT:
            alive = _survives(low, high, threshold, n, e, h)
            active = tl.where(alive, active * scale, 0.0)
            slope *= tl.where(alive, scale, 0.0)
        inner += tl.sum(tl.where(valid & used, active * grad, 0.0), axis=1)
        tl.store(to_z, tl.where(used, weight[:, None] * grad * slope, 0.0).to(z.dtype.element_ty), mask=valid)
        tl.store(to_g, tl.where(used, weight[:, None] * active, 0.0).to(g.dtype.element_ty), mask=valid)
    for start in range(0, dim, BLOCK_H):
        d = start + tl.arange(0, BLOCK_H)
        grad = tl.load(grad_y + n[:, None].to(tl.int64) * dim + d[None, :], mask=exists & (d < dim)[None, :], other=0.0)
        bias = tl.load(b_out + e * dim + d, mask=d < dim, other=0.0)
        inner += tl.sum(grad.to(tl.float32) * bias.to(tl.float32)[None, :], axis=1)
    tl.store(grad_weights + place, tl.where(weight != 0.0, inner, 0.0), mask=n < tokens)


def router_blocks(experts: int) -> dict[str, int]:
    """Tile of the router kernels: all experts, then columns, then tokens, as many as ``ROUTER_VALUES`` allow."""
    block_e = triton.next_power_of_2(experts)
    block_d = max(1, min(64, ROUTER_VALUES // block_e))
    return {"BLOCK_N": max(1, ROUTER_VALUES // (block_e * block_d)), "BLOCK_E": block_e, "BLOCK_D": block_d}


def _config(x: Tensor) -> dict[str, int]:
    return CONFIGS[x.element_size(), len(x) <= FEW_TOKENS]


def _mix32_of(word: int) -> int:
    word = (word ^ word >> 16) * 0x7FEB352D & 0xFFFFFFFF
    word = (word ^ word >> 15) * 0x846CA68B & 0xFFFFFFFF
    return word ^ word >> 16


def _dropout(dropout: float, seed: int) -> dict[str, Any]:
    """Dropout arguments of a kernel; words as signed numbers, so that their type does not depend on the value."""
    low = _mix32_of(seed & 0xFFFFFFFF)
    words = {"low": low, "high": _mix32_of(low ^ (seed >> 32 & 0xFFFFFFFF)), "threshold": int(dropout * 2.0**32)}
    signed = {name: word - (word >> 31 << 32) for name, word in words.items()}
    return {**signed, "scale": 1.0 / (1.0 - dropout), "HAS_DROPOUT": dropout > 0.0}


def expert_router(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(weights [N, E], probs [N, E], load [E]) float32; arguments as in the op's schema."""
    x, gate = x.contiguous(), gate.contiguous()
    (tokens, dim), experts = x.shape, len(gate)
    weights, probs = (x.new_empty((tokens, experts), dtype=torch.float32) for _ in range(2))
    if tokens == 0:
        return weights, probs, weights.new_zeros(experts)
    blocks = router_blocks(experts)
    grid = (triton.cdiv(tokens, blocks["BLOCK_N"]),)
    _router_kernel[grid](x, gate, weights, probs, tokens, dim, experts, top_k, **blocks)
    return weights, probs, (weights > 0).float().mean(0)


def expert_router_backward(
    grad_weights: Tensor, grad_probs: Tensor, weights: Tensor, probs: Tensor, x: Tensor, gate: Tensor, need_x: bool,
    need_gate: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients of x and gate; size 0 where not needed."""
    (tokens, dim), experts = x.shape, len(gate)
    grad_x = x.new_empty((tokens, dim) if need_x else (0,))
    grad_logits = probs.new_empty((tokens, experts))
    if tokens:
        blocks = router_blocks(experts)
        grid = (triton.cdiv(tokens, blocks["BLOCK_N"]),)
        rows = (value.contiguous() for value in (grad_weights, grad_probs, weights, probs))
        _router_backward_kernel[grid](
            *rows, grad_logits, gate.contiguous(), grad_x, tokens, dim, experts, NEED_X=need_x, **blocks
        )
    if not need_gate:
        return grad_x, gate.new_empty(0)
    return grad_x, (grad_logits.t() @ x.float()).to(gate.dtype)


def expert_mix(
    x: Tensor, weights: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, dropout: float, seed: int
) -> Tensor:
    """y [N, D]; arguments as in the op's schema. The hidden activations [E, N, H] are kept meanwhile."""
    x, weights, w_in, b_in, w_out, b_out = (v.contiguous() for v in (x, weights, w_in, b_in, w_out, b_out))
    (tokens, dim), (experts, width, _) = x.shape, w_in.shape
    y = torch.empty_like(x)
    if tokens == 0:
        return y
    hidden = x.new_empty((experts, tokens, width))
    config = _config(x)
    rows, columns = triton.cdiv(tokens, config["BLOCK_N"]), config["BLOCK_C"]
    sizes = (tokens, dim, width, experts)
    _hidden_kernel[(rows, triton.cdiv(width, columns), experts)](
        x, weights, w_in, b_in, hidden, *sizes, **_dropout(dropout, seed), **config
    )
    _output_kernel[(rows, triton.cdiv(dim, columns))](hidden, weights, w_out, b_out, y, *sizes, **config)
    return y


def expert_mix_backward(
    x: Tensor, weights: Tensor, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, dropout: float, seed: int,
    grad_y: Tensor, need_x: bool, need_weights: bool, need_w_in: bool, need_b_in: bool, need_w_out: bool,
    need_b_out: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the six tensors; size 0 where not needed. The hidden activation is computed again."""
    x, weights, w_in, b_in, w_out, b_out = (v.contiguous() for v in (x, weights, w_in, b_in, w_out, b_out))
    grad_y = grad_y.contiguous()
    (tokens, dim), (experts, width, _) = x.shape, w_in.shape
    grad_x, grad_weights, grad_w_in, grad_b_in, grad_w_out, grad_b_out = (x.new_empty(0) for _ in range(6))
    if need_b_out:
        grad_b_out = (weights.t() @ grad_y.float()).to(b_out.dtype)
    if need_x or need_weights or need_w_in or need_b_in or need_w_out:
        flat = w_in.view(experts * width, dim)
        z, g = x @ flat.t(), grad_y @ w_out  # [N, E * H], [E, N, H]
        grad_weights = torch.empty_like(weights)
        if tokens:
            grid = (triton.cdiv(tokens, HIDDEN_CONFIG["BLOCK_N"]), experts)
            _hidden_backward_kernel[grid](
                z, g, weights, b_in, b_out, grad_y, grad_weights, tokens, dim, width, experts,
                **_dropout(dropout, seed), **HIDDEN_CONFIG,
            )  # fmt: skip
        if need_x:
            grad_x = z @ flat
        if need_w_in:
            grad_w_in = (z.t() @ x).view_as(w_in)
        if need_b_in:
            grad_b_in = z.sum(0).view_as(b_in)
        if need_w_out:
            grad_w_out = grad_y.t() @ g
    if not need_weights:
        grad_weights = weights.new_empty(0)
    return grad_x, grad_weights, grad_w_in, grad_b_in, grad_w_out, grad_b_out
