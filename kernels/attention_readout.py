"""Group-wise attention of one query in Triton: a program takes one image, head and group, and a block of biases.

Keys are sorted by group beforehand, so that a program walks its own keys only and every key and value is read once for
a block of biases. Softmax online, in base 2. Sums are float32 and have a fixed order; nothing is atomic: results are
bitwise repeatable. float32 products are exact ones, not TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

#: Widest head block -> keys a step, warps; wider heads take the last one.
CONFIGS: dict[int, tuple[int, int]] = {32: (32, 4), 64: (32, 8), 128: (32, 8), 256: (16, 8)}
MAX_BIASES = 64  # of a program


def blocks(head_dim: int, n_biases: int) -> dict[str, int]:
    """The configuration of a launch. A matrix product wants at least 16 rows; one bias alone is a plain sum."""
    width = max(16, triton.next_power_of_2(head_dim))
    keys, warps = CONFIGS[min((known for known in CONFIGS if known >= width), default=max(CONFIGS))]
    rows = 1 if n_biases == 1 else min(MAX_BIASES, max(16, triton.next_power_of_2(n_biases)))
    return {"BLOCK_M": rows, "BLOCK_L": keys, "BLOCK_C": width, "num_warps": warps}


@triton.jit
def _readout_kernel(
    query,  # [B, H, dh], or [H, dh] with an image stride of 0; channels contiguous
    keys, values,  # [B, L, H, dh], channels contiguous
    order,  # [B, L] int64, keys sorted by group, or [L] with an image stride of 0
    bounds,  # [B, G + 1] int64, where each group begins in order
    bias,  # [M, H or 1, L] float32; unused without HAS_BIAS
    mean,  # [M, B, H, G, dh] float32
    log_mass,  # [M, B, H, G] float32
    batch, length, heads, head_dim, n_groups, n_biases,
    query_batch, query_head, key_batch, key_token, key_head, value_batch, value_token, value_head,
    order_batch, bounds_batch, bias_variant, bias_head, scale,
    HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0)
    g = which % n_groups
    h = which // n_groups % heads
    b = (which // n_groups // heads).to(tl.int64)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.arange(0, BLOCK_C)
    channels = c < head_dim
    q = tl.load(query + b * query_batch + h * query_head + c, mask=channels, other=0.0).to(tl.float32)
    begin = tl.load(bounds + b * bounds_batch + g)
    end = tl.load(bounds + b * bounds_batch + g + 1)
    most = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for start in range(begin, end, BLOCK_L):
        place = start + tl.arange(0, BLOCK_L)
        there = place < end
        token = tl.load(order + b * order_batch + place, mask=there, other=0)
        inside = there[:, None] & channels[None, :]
        k = tl.load(keys + b * key_batch + h * key_head + token[:, None] * key_token + c[None, :], mask=inside,
                    other=0.0).to(tl.float32)  # fmt: skip
        v = tl.load(values + b * value_batch + h * value_head + token[:, None] * value_token + c[None, :], mask=inside,
                    other=0.0).to(tl.float32)  # fmt: skip
        score = tl.broadcast_to((tl.sum(k * q[None, :], axis=1) * scale)[None, :], (BLOCK_M, BLOCK_L))
        if HAS_BIAS:
            row = bias + m.to(tl.int64)[:, None] * bias_variant + h * bias_head
            score += tl.load(row + token[None, :], mask=(m < n_biases)[:, None] & there[None, :], other=0.0)
        score = tl.where(there[None, :], score * LOG2E, float("-inf"))
        found = tl.maximum(most, tl.max(score, axis=1))
        base = tl.where(found == float("-inf"), 0.0, found)
        p = tl.exp2(score - base[:, None])
        fade = tl.exp2(most - base)
        total = total * fade + tl.sum(p, axis=1)
        if BLOCK_M == 1:
            sums = sums * fade[:, None] + tl.sum(tl.trans(p) * v, axis=0)[None, :]
        else:
            sums = sums * fade[:, None] + tl.dot(p, v, input_precision="ieee")
        most = found
    empty = most == float("-inf")
    result = tl.where(empty[:, None], 0.0, sums / tl.where(empty, 1.0, total)[:, None])
    mass = tl.where((empty | (most == float("inf"))), most, (most + tl.log2(total)) * LN2)
    place = ((m.to(tl.int64) * batch + b) * heads + h) * n_groups + g
    tl.store(mean + place[:, None] * head_dim + c[None, :], result, mask=(m < n_biases)[:, None] & channels[None, :])
    tl.store(log_mass + place, mass, mask=m < n_biases)


def _channels_contiguous(tensor: Tensor) -> Tensor:
    return tensor.contiguous() if tensor.shape[-1] > 1 and tensor.stride(-1) != 1 else tensor


def attention_readout(
    query: Tensor, keys: Tensor, values: Tensor, groups: Tensor, n_groups: int, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Launch; arguments as in the op's schema."""
    query, keys, values = (_channels_contiguous(value) for value in (query, keys, values))
    batch, length, heads, head_dim = keys.shape
    variants = 1 if bias is None else bias.shape[0]
    shape = (variants, batch, heads, n_groups)
    mean = keys.new_empty((*shape, head_dim), dtype=torch.float32)
    log_mass = keys.new_empty(shape, dtype=torch.float32)
    if log_mass.numel() == 0:
        return mean, log_mass
    sorted_groups, order = groups.sort(dim=-1, stable=True)
    edges = torch.arange(n_groups + 1, device=groups.device)
    bounds = torch.searchsorted(sorted_groups, edges.expand(*groups.shape[:-1], -1).contiguous())
    given = log_mass if bias is None else bias.contiguous()
    one_head = bias is None or bias.shape[1] == 1
    options = blocks(head_dim, variants)
    _readout_kernel[(batch * heads * n_groups, triton.cdiv(variants, options["BLOCK_M"]))](
        query, keys, values, order, bounds, given, mean, log_mass,
        batch, length, heads, head_dim, n_groups, variants,
        query.stride(0) if query.dim() == 3 else 0, query.stride(-2), *keys.stride()[:3], *values.stride()[:3],
        length if groups.dim() == 2 else 0, n_groups + 1 if groups.dim() == 2 else 0,
        0 if bias is None else bias.shape[1] * length, 0 if one_head else length, scale,
        HAS_BIAS=bias is not None, **options,
    )  # fmt: skip
    return mean, log_mass
