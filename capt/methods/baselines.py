"""Methods to beat: what anybody would try first on frozen CLIP features."""

from __future__ import annotations

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

    def forward(self, features: Tensor) -> Tensor:
        """Adapted unit-norm features of float [B, d] features."""
        features = F.normalize(features, dim=-1)
        return F.normalize(features + self.linear(features), dim=-1)


def zero_shot_logits(raw_features: Tensor, text_features: Tensor, logit_scale: Tensor | float) -> Tensor:
    """``scale * normalize(v) @ T.T``: the base model; float [B, d], [C, d] -> [B, C]."""
    return logit_scale * F.normalize(raw_features, dim=-1) @ text_features.T


def adapter_loss(
    adapter: LinearAdapter, raw_features: Tensor, text_features: Tensor, labels: Tensor, scale: Tensor | float
) -> Tensor:
    """Cross-entropy of the adapted features; scalar."""
    return torch.nn.functional.cross_entropy(scale * adapter(raw_features) @ text_features.T, labels)
