"""Methods to beat: what anybody would try first on frozen CLIP features."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearAdapter(nn.Module):
    """Residual linear map on frozen image features: ``f = normalize(v + W v)``, W zero at the start.

    Trained with cross-entropy against the class texts; the strongest simple rival of CAPT. Source: ours.
    """

    def __init__(self, dim: int) -> None:
        """``dim``: joint width d."""
        super().__init__()
        self.linear = nn.Linear(dim, dim, bias=False)
        nn.init.zeros_(self.linear.weight)

    @classmethod
    def like(cls, tensors: Mapping[str, Tensor]) -> LinearAdapter:
        """An adapter of the size that stored tensors have."""
        return cls(tensors["linear.weight"].shape[0])

    def forward(self, features: Tensor) -> Tensor:
        """Adapted unit-norm features of float [B, d] features."""
        features = F.normalize(features, dim=-1)
        return F.normalize(features + self.linear(features), dim=-1)


class BottleneckAdapter(nn.Module):
    """Residual two-layer map on frozen image features: ``f = normalize(v + U relu(W v))``, U zero at the start.

    The control for CAPT's size: made as large as CAPT and trained with the same budget. Source: ours, after
    CLIP-Adapter.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        """``dim``: joint width d; ``hidden``: width between the layers."""
        super().__init__()
        self.enter = nn.Linear(dim, hidden)
        self.leave = nn.Linear(hidden, dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    @classmethod
    def with_parameters(cls, dim: int, count: int) -> BottleneckAdapter:
        """The adapter whose number of parameters is nearest to ``count``."""
        return cls(dim, max(1, round((count - dim) / (2 * dim + 1))))

    @classmethod
    def like(cls, tensors: Mapping[str, Tensor]) -> BottleneckAdapter:
        """An adapter of the size that stored tensors have."""
        hidden, dim = tensors["enter.weight"].shape
        return cls(dim, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """Adapted unit-norm features of float [B, d] features."""
        features = F.normalize(features, dim=-1)
        return F.normalize(features + self.leave(F.relu(self.enter(features))), dim=-1)


def zero_shot_logits(raw_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
    """``scale * normalize(v) @ T.T``: the base model; float [B, d], [C, d] -> [B, C]."""
    return logit_scale * F.normalize(raw_features, dim=-1) @ text_features.T


def adapter_loss(
    adapter: LinearAdapter | BottleneckAdapter,
    raw_features: Tensor,
    text_features: Tensor,
    labels: Tensor,
    scale: Tensor | float,
) -> Tensor:
    """Cross-entropy of the adapted features; scalar."""
    return torch.nn.functional.cross_entropy(scale * adapter(raw_features) @ text_features.T, labels)
