"""Pseudo labels and confusion scores in Triton: one program a row of logits.

    S_i = (1 + n_i / sum n) * exp(x_i - max x) / sum exp(x - max x)      n: row p of the statistics, p the arg-max

Three walks over the row in blocks (the second and third from L1/L2): maximum and arg-max; sum of exponentials;
selection. A score is >= 0, so the integer (bits of the score, inverted class) orders by score, then lower class. The
running list holds the best keys of the list's width in any order; a block pays one reduction for each key it
contributes. Lists longer than MAX_LIST are filled by further walks, each bounded by the last key of the one before.
Sums have a fixed order: results are bitwise repeatable.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_BLOCK = 1024  # classes a step
MAX_LIST = 32  # keys a walk
CHUNK = 64  # entries of the statistics that are passed over at once if a block holds none of them
NUM_WARPS = 8


@triton.jit
def _boost(scores, c, start, begin, end, share, classes, counts, BLOCK: tl.constexpr, CHUNK: tl.constexpr):
    """Multiply the scores of the classes in [start, start + BLOCK) that the statistics name, CHUNK entries a look."""
    for entry in range(begin, end, CHUNK):
        at = entry + tl.arange(0, CHUNK)
        named = tl.load(classes + at, mask=at < end, other=-1)
        here = (named >= start) & (named < start + BLOCK)
        if tl.max(here.to(tl.int32), axis=0) > 0:
            for one in range(entry, tl.minimum(entry + CHUNK, end)):
                boost = 1.0 + tl.load(counts + one) * share
                scores = tl.where(c == tl.load(classes + one), scores * boost, scores)
    return scores


@triton.jit
def _pairs_kernel(
    logits,  # [B, C], classes contiguous
    offsets,  # [C + 1] int64; unused without HAS_COUNTS
    classes,  # [nnz] int64
    counts,  # [nnz] float32
    pseudo,  # [B] int64
    index,  # [B, k] int64
    score,  # [B, k] float32
    n_classes,
    row_stride,
    k,
    HAS_COUNTS: tl.constexpr,
    BLOCK: tl.constexpr,
    LIST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    row = logits + b * row_stride
    lane = tl.arange(0, BLOCK).to(tl.int64)
    none = -float("inf")

    best = tl.full((BLOCK,), none, dtype=tl.float32)
    where = lane
    has_nan = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(0, n_classes, BLOCK):
        x = tl.load(row + start + lane, mask=start + lane < n_classes, other=none).to(tl.float32)
        has_nan = has_nan | (x != x).to(tl.int32)
        where = tl.where(x > best, start + lane, where)
        best = tl.where(x > best, x, best)
    top = tl.max(best, axis=0)
    p = tl.min(tl.where(best == top, where, n_classes), axis=0)
    # NaN, +infinity or nothing but -infinity: no softmax. The other classes then tie, at a score of NaN.
    any_nan = tl.max(has_nan, axis=0) > 0
    p = tl.where(any_nan, n_classes - 1, p).to(tl.int64)
    undefined = any_nan | (top == float("inf")) | (top == none)
    shift = tl.where(undefined, 0.0, top)

    sums = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, n_classes, BLOCK):
        x = tl.load(row + start + lane, mask=start + lane < n_classes, other=none).to(tl.float32)
        sums += tl.exp(x - shift)
    inverse = 1.0 / tl.sum(sums, axis=0)
    begin = tl.zeros((), dtype=tl.int64)
    end = begin
    share = 0.0  # of one count
    if HAS_COUNTS:
        begin = tl.load(offsets + p)
        end = tl.load(offsets + p + 1)
        total = 0.0
        for entry in range(begin, end, CHUNK):
            at = entry + tl.arange(0, CHUNK)
            total += tl.sum(tl.load(counts + at, mask=at < end, other=0.0), axis=0)
        share = 1.0 / tl.maximum(total, 1.1754943508222875e-38)

    limit = (tl.zeros((), dtype=tl.int64) + 0x7FFFFFFF) << 32  # above every key
    slot = tl.arange(0, LIST)
    for first in range(0, k, LIST):
        keys = tl.full((LIST,), -1, dtype=tl.int64)
        least = tl.min(keys, axis=0)
        for start in range(0, n_classes, BLOCK):
            c = start + lane
            x = tl.load(row + c, mask=c < n_classes, other=none).to(tl.float32)
            s = tl.exp(x - shift) * inverse
            if HAS_COUNTS:
                s = _boost(s, c, start, begin, end, share, classes, counts, BLOCK, CHUNK)
            s = tl.where(undefined, 0.0, s)
            key = (s.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0xFFFFFFFF - c)
            key = tl.where((c < n_classes) & (c != p) & (key < limit), key, -1)
            largest = tl.max(key, axis=0)
            while largest > least:
                # Keys differ, except for -1: replace one of the smallest entries.
                place = tl.min(tl.where(keys == least, slot, LIST), axis=0)
                keys = tl.where(slot == place, largest, keys)
                key = tl.where(key == largest, -1, key)
                largest = tl.max(key, axis=0)
                least = tl.min(keys, axis=0)
        for j in range(first, tl.minimum(first + LIST, k)):
            limit = tl.max(keys, axis=0)
            keys = tl.where(keys == limit, -1, keys)
            value = (limit >> 32).to(tl.int32).to(tl.float32, bitcast=True)
            tl.store(index + b * k + j, 0xFFFFFFFF - (limit & 0xFFFFFFFF))
            tl.store(score + b * k + j, tl.where(undefined, float("nan"), value))
    tl.store(pseudo + b, p)


def confusion_pairs(
    logits: Tensor, k: int, offsets: Tensor | None, classes: Tensor | None, counts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch; arguments as in the op's schema."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    batch, n_classes = logits.shape
    k = min(k, n_classes - 1)
    pseudo = logits.new_empty((batch,), dtype=torch.int64)
    index = logits.new_empty((batch, k), dtype=torch.int64)
    score = logits.new_empty((batch, k), dtype=torch.float32)
    if batch == 0:
        return pseudo, index, score
    _pairs_kernel[(batch,)](
        logits,
        pseudo if offsets is None else offsets,
        pseudo if classes is None else classes,
        score if counts is None else counts,
        pseudo,
        index,
        score,
        n_classes,
        logits.stride(0),
        k,
        HAS_COUNTS=counts is not None,
        BLOCK=min(MAX_BLOCK, triton.next_power_of_2(n_classes)),
        LIST=min(MAX_LIST, triton.next_power_of_2(k)),
        CHUNK=CHUNK,
        num_warps=NUM_WARPS,
    )
    return pseudo, index, score
