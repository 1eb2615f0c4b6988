"""What one would write without the op, differentiated by autograd. Each rival takes (logits, targets), float targets.

The constants are CPRFL's: no focus on positives, exponent 4 for negatives, margin 0.05, eps 1e-8, mean.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

MARGIN, EPS = 0.05, 1e-8


def textbook(logits: Tensor, targets: Tensor) -> Tensor:
    """The definition term by term, focal factor under no_grad, as implementations of the loss are usually written."""
    p = logits.float().sigmoid()
    q = (1 - p + MARGIN).clamp(max=1)
    loss = targets * p.clamp(min=EPS).log() + (1 - targets) * q.clamp(min=EPS).log()
    with torch.no_grad():
        chance = p * targets + q * (1 - targets)
        focus = torch.pow(1 - chance, 4 * (1 - targets))
    return -(loss * focus).mean()


def lean(logits: Tensor, targets: Tensor) -> Tensor:
    """As few passes as eager code needs: products instead of a power, one logarithm of the chance of the target."""
    x = logits.float()
    positive = targets.bool()
    p = x.sigmoid()
    chance = torch.where(positive, p, (1 + MARGIN - p).clamp_(max=1))
    with torch.no_grad():
        focus = (1 - chance).square_().square_().masked_fill_(positive, 1)
    return -(chance.clamp(min=EPS).log() * focus).mean()


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Positives by torch's fused cross-entropy; exact only where no positive is cut off."""
    x = logits.float()
    p = x.sigmoid()
    negative = (1 + MARGIN - p).clamp(max=1)
    with torch.no_grad():
        focus = (1 - negative).square_().square_()
    positive = F.softplus(-x)
    return torch.where(targets.bool(), positive, -negative.log() * focus).mean()


@functools.cache
def compiled() -> Callable[[Tensor, Tensor], Tensor]:
    """``lean`` by torch.compile: its forward and its backward are one kernel each."""
    return torch.compile(lean, fullgraph=True, dynamic=False)


RIVALS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "textbook": textbook,
    "lean": lean,
    "entropy": entropy,
    "compiled": lambda logits, targets: compiled()(logits, targets),
}
