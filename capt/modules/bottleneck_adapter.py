"""Bottleneck adapter: a narrow two-layer branch beside a frozen part of a tower."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class BottleneckAdapter(nn.Module):
    """``A(x) = scale * (W_up dropout(ReLU(W_down x + b_down)) + b_up)``, zero at the start.

    Reads the un-normalised residual stream and is added to it, so a tower with fresh adapters is the frozen tower.

    Source: MSCI's published code (width 64, scale 0.1, dropout 0.1, two adapters a block).
    """

    def __init__(self, dim: int, width: int = 64, *, scale: float = 0.1, dropout: float = 0.1) -> None:
        """``dim``: width of the tokens; ``width``: of the bottleneck."""
        super().__init__()
        self.scale, self.dropout = scale, dropout
        self.down, self.up = nn.Linear(dim, width), nn.Linear(width, dim)
        with torch.no_grad():
            for zero in (self.down.bias, self.up.weight, self.up.bias):
                zero.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """What is to be added to x [..., dim], in the type of x; computed in that of the weights."""
        hidden = F.dropout(F.relu(self.down(x.to(self.down.weight.dtype))), self.dropout, self.training)
        raised: Tensor = self.up(hidden)
        return (self.scale * raised).to(x.dtype)
