"""Self-adaptive aggregation: the token maps of several layers become one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class LayerAggregator(nn.Module):
    """``dropout(ReLU(LayerNorm(W concat(F_1, ..., F_N) + b)))``: [B, L, sum of widths] to [B, L, d], never negative.

    Source: MSCI, self-adaptive aggregation of the first N or last M layers.
    """

    def __init__(self, width: int, dim: int, *, dropout: float = 0.1) -> None:
        """``width``: of the concatenated maps."""
        super().__init__()
        self.dropout = dropout
        self.linear, self.norm = nn.Linear(width, dim), nn.LayerNorm(dim)

    def forward(self, maps: Tensor) -> Tensor:
        """Concatenated maps [B, L, width] to one map [B, L, d]."""
        return F.dropout(F.relu(self.norm(self.linear(maps))), self.dropout, self.training)
