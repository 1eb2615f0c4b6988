"""Best pair of every group in Triton: a program folds SPAN pairs of one row into the keys of its groups.

A key is (ordered bits of the score, inverted pair) as one integer, so that a larger key is a better score or, with
equal scores, a lower pair; a maximum of keys does not depend on the order of programs. A program holds the keys of its
row's groups in a table, compares a block of pairs with them, and sends the few that are larger to memory by an atomic
maximum. A table that is out of date costs such maxima, never a result. Products and sums are not fused, see the launch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024  # pairs a step
SPAN = 4096  # pairs a program
MAX_TABLE = 1024  # groups that are looked up in the table; more of them are read from memory
NUM_WARPS = 4
MAX_SLOTS = 1024  # keys a program of the first and the last kernel


@triton.jit
def _key(score, pair):
    """-0.0 is 0.0; for float32 scores and pairs below 2^31."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - pair)


@triton.jit
def _start_kernel(
    previous_score,  # [B * G]; unused without HAS_PREVIOUS
    previous_pair,  # [B * G] int64
    keys,  # [B * G] int64
    size,
    HAS_PREVIOUS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    score = tl.full((BLOCK,), -float("inf"), dtype=tl.float32)
    pair = tl.full((BLOCK,), -1, dtype=tl.int64)
    if HAS_PREVIOUS:
        score = tl.load(previous_score + at, mask=at < size).to(tl.float32)
        pair = tl.load(previous_pair + at, mask=at < size)
        pair = tl.where(score == score, pair, -1)
        score = tl.where(score == score, score, -float("inf"))
    tl.store(keys + at, _key(score, tl.where(pair < 0, 0x7FFFFFFF, pair)), mask=at < size)


@triton.jit
def _fold_kernel(
    scores,  # [B, K], pairs contiguous
    group,  # [K] int64
    state,  # [B, n_states] float32; unused without HAS_TERM
    object,  # [B, n_objects] float32
    pairs,  # [K, 2] int64
    keys,  # [B, G] int64
    n_pairs,
    n_groups,
    n_states,
    n_objects,
    row_stride,
    first_pair,
    HAS_TERM: tl.constexpr,
    IN_TABLE: tl.constexpr,
    TABLE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    slot = tl.arange(0, TABLE)
    row = keys + b * n_groups
    begin = tl.program_id(1).to(tl.int64) * SPAN
    best = tl.load(row + slot, mask=slot < n_groups, other=0)
    for step in range(0, SPAN, BLOCK):
        k = begin + step + lane
        inside = k < n_pairs
        g = tl.load(group + k, mask=inside, other=-1)
        x = tl.load(scores + b * row_stride + k, mask=inside, other=-float("inf")).to(tl.float32)
        if HAS_TERM:
            s = tl.load(pairs + 2 * k, mask=inside, other=0)
            o = tl.load(pairs + 2 * k + 1, mask=inside, other=0)
            s = tl.load(state + b * n_states + s, mask=inside, other=0.0)
            x = x + s * tl.load(object + b * n_objects + o, mask=inside, other=0.0)
        wanted = (g >= 0) & (x > -float("inf"))
        key = _key(x, first_pair + k)
        if IN_TABLE:
            known = tl.gather(best, tl.where(wanted, g, 0).to(tl.int32), 0)
        else:
            known = tl.load(row + g, mask=wanted, other=0, cache_modifier=".cg")
        larger = wanted & (key > known)
        if tl.max(larger.to(tl.int32), axis=0) > 0:
            tl.atomic_max(row + g, key, mask=larger, sem="relaxed")
            if IN_TABLE:
                tl.debug_barrier()
                best = tl.load(row + slot, mask=slot < n_groups, other=0, cache_modifier=".cg")


@triton.jit
def _finish_kernel(
    keys,  # [B * G] int64
    score,  # [B * G]
    pair,  # [B * G] int64
    size,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + at, mask=at < size, other=0)
    bits = (key >> 32).to(tl.int32)
    value = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)
    index = 0x7FFFFFFF - (key & 0xFFFFFFFF)
    tl.store(score + at, value, mask=at < size)
    tl.store(pair + at, tl.where(index == 0x7FFFFFFF, -1, index), mask=at < size)


def pair_frontier(
    scores: Tensor,
    group: Tensor,
    n_groups: int,
    start: int,
    state: Tensor | None,
    object: Tensor | None,
    pairs: Tensor | None,
    previous_score: Tensor | None,
    previous_pair: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch; arguments as in the op's schema."""
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    batch, n_pairs = scores.shape
    score = scores.new_empty((batch, n_groups), dtype=scores.dtype if state is None else torch.float32)
    pair = scores.new_empty((batch, n_groups), dtype=torch.int64)
    if batch == 0:
        return score, pair
    keys = torch.empty_like(pair)
    size = batch * n_groups
    block = min(MAX_SLOTS, triton.next_power_of_2(size))
    pieces = (triton.cdiv(size, block),)
    _start_kernel[pieces](
        score if previous_score is None else previous_score,
        pair if previous_pair is None else previous_pair,
        keys,
        size,
        HAS_PREVIOUS=previous_score is not None,
        BLOCK=block,
    )
    if n_pairs:
        _fold_kernel[(batch, triton.cdiv(n_pairs, SPAN))](
            scores,
            group,
            score if state is None else state,
            score if object is None else object,
            pair if pairs is None else pairs,
            keys,
            n_pairs,
            n_groups,
            0 if state is None else state.shape[1],
            0 if object is None else object.shape[1],
            scores.stride(0),
            start,
            HAS_TERM=pairs is not None,
            IN_TABLE=n_groups <= MAX_TABLE,
            TABLE=min(MAX_TABLE, max(2, triton.next_power_of_2(n_groups))),
            SPAN=SPAN,
            BLOCK=MAX_BLOCK,
            num_warps=NUM_WARPS,
            enable_fp_fusion=False,  # every backend rounds the product, then the sum
        )
    _finish_kernel[pieces](keys, score, pair, size, BLOCK=block)
    return score, pair
