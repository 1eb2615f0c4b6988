"""Disentangler: an image vector of the states alone, or of the objects alone."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class Disentangler(nn.Module):
    """``dropout(ReLU(BatchNorm(W v + b)))``, [B, d] to [B, d].

    A training batch of a single image has no statistics: it is normalised with the running ones.

    Source: MSCI's published code (dropout 0.5).
    """

    def __init__(self, dim: int, *, dropout: float = 0.5) -> None:
        super().__init__()
        self.dropout = dropout
        self.linear, self.norm = nn.Linear(dim, dim), nn.BatchNorm1d(dim)

    def forward(self, features: Tensor) -> Tensor:
        """Un-normalised image features [B, d] to those of one kind of primitive."""
        projected, norm = self.linear(features), self.norm
        own_statistics = self.training and len(features) > 1
        if own_statistics:
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.add_(1)
        normed = F.batch_norm(
            projected, norm.running_mean, norm.running_var, norm.weight, norm.bias, own_statistics,
            norm.momentum or 0.0, norm.eps,
        )  # fmt: skip
        return F.dropout(F.relu(normed), self.dropout, self.training)
