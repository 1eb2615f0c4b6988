"""Asymmetric loss and its slope in Triton: a program visits BLOCK entries once and adds their losses up."""

from __future__ import annotations

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024
NUM_WARPS = 4
LARGEST_POWER = 8  # by multiplications

LEAST = tl.constexpr(1.1754944e-38)  # normal float32


@triton.jit
def _power(base, EXPONENT: tl.constexpr, WHOLE: tl.constexpr):
    """base ** EXPONENT for a base of at least 0, with 0 ** 0 = 1."""
    value = base * 0.0 + 1.0
    if WHOLE:
        for _ in tl.static_range(EXPONENT):
            value = value * base
    else:
        value = tl.where(base > 0.0, tl.exp(EXPONENT * tl.log(tl.maximum(base, LEAST))), 0.0)
    return value


@triton.jit
def _loss_kernel(
    logits,  # [size]
    targets,  # [size], anything but 0 is positive
    slope,  # [size] float32
    loss,  # [size] float32; unused without KEEP
    partial,  # [programs] float32
    size,
    positive_low,  # logits: no slope of a positive below
    negative_low,  # nothing of a negative below
    negative_high,  # no slope of a negative above
    log_eps,
    margin,
    scale,
    GAMMA_POS: tl.constexpr,
    WHOLE_POS: tl.constexpr,
    GAMMA_NEG: tl.constexpr,
    WHOLE_NEG: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    at = program * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
    positive = tl.load(targets + at, mask=inside, other=0) != 0
    e = tl.exp(-tl.abs(x))
    total = 1.0 + e
    r = 1.0 / total
    s = e * r
    rest = (e - (total - 1.0)) * r  # of log(1 + e), which the rounding of the sum loses
    p = tl.where(x >= 0.0, r, s)
    q = tl.where(x >= 0.0, s, r)
    kept = tl.full((BLOCK,), 1.0, dtype=tl.float32)
    if HAS_MARGIN:
        argument = q + margin
        kept = q / argument
        log = tl.log(tl.where(positive, total, tl.maximum(argument, LEAST)))
        value = tl.where(positive, tl.where(x > 0.0, 0.0, x) - (log + rest), tl.where(log > 0.0, 0.0, log))
    else:
        signed = tl.where(positive, x, -x)
        value = tl.where(signed > 0.0, 0.0, signed) - (tl.log(total) + rest)
    value = tl.where(value < log_eps, log_eps, value)
    over = p - margin
    over = tl.where(over < 0.0, 0.0, over)
    focus = tl.where(positive, _power(q, GAMMA_POS, WHOLE_POS), _power(over, GAMMA_NEG, WHOLE_NEG))
    below = (positive == 0) & (x < negative_low)
    dead = tl.where(positive, x < positive_low, below | (x > negative_high))
    tl.store(slope + at, tl.where(dead, 0.0, focus * tl.where(positive, -q, p * kept)) * scale, mask=inside)
    value = tl.where(x != x, x, tl.where(below, 0.0, -focus * value))
    if KEEP:
        tl.store(loss + at, value, mask=inside)
    tl.store(partial + program, tl.sum(tl.where(inside, value, 0.0), axis=0))


def _rounded_up(value: float) -> float:
    """The smallest float32 that is not below ``value``."""
    near = np.float32(value)
    return float(near if near >= value else np.nextafter(near, np.float32(np.inf)))


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p) if p > 0 else -math.inf


def asymmetric_loss(
    logits: Tensor,
    targets: Tensor,
    gamma_pos: float,
    gamma_neg: float,
    margin: float,
    eps: float,
    reduction: int,
) -> tuple[Tensor, Tensor]:
    """Launch; arguments as in the op's schema."""
    logits, targets = logits.contiguous(), targets.contiguous()
    targets = targets.view(torch.uint8) if targets.dtype == torch.bool else targets
    size = logits.numel()
    slope = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    loss = torch.empty_like(slope) if reduction == 0 else slope
    programs = triton.cdiv(size, BLOCK)
    partial = torch.empty(programs, dtype=torch.float32, device=logits.device)
    scale = (1 / size if size else math.inf) if reduction == 1 else 1.0
    if size:
        whole = [gamma.is_integer() and gamma <= LARGEST_POWER for gamma in (gamma_pos, gamma_neg)]
        needed = eps - margin  # the least q of a negative
        _loss_kernel[(programs,)](
            logits,
            targets,
            slope,
            loss,
            partial,
            size,
            _rounded_up(_logit(eps)),
            _rounded_up(_logit(margin)),
            -_rounded_up(_logit(needed)),
            math.log(eps) if eps > 0 else -math.inf,
            margin,
            scale,
            GAMMA_POS=int(gamma_pos) if whole[0] else gamma_pos,
            WHOLE_POS=whole[0],
            GAMMA_NEG=int(gamma_neg) if whole[1] else gamma_neg,
            WHOLE_NEG=whole[1],
            HAS_MARGIN=margin > 0,
            KEEP=reduction == 0,
            BLOCK=BLOCK,
            num_warps=NUM_WARPS,
        )
    return (loss if reduction == 0 else (partial.sum(dtype=torch.float64) * scale).float()), slope
