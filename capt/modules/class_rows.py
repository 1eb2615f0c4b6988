"""A linear classifier whose rows start from class texts."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClassRows(nn.Module):
    """``scale * v @ W.T + b`` for unit-norm features v: at first zero-shot CLIP, then whatever training makes of it.

    Attributes:
        weight: W, [C, d]; free, not unit-norm.
        bias: b, [C].

    Source: linear probe of CLIP features; start from texts: ours.
    """

    #: Logit of every class on an average image before training: few labels apply to an image.
    START = -4.0

    def __init__(self, rows: Tensor, scale: float) -> None:
        """``rows``: float [C, d], class texts or zeros; ``scale``: factor of the cosines."""
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(rows.detach().float().clone())
        self.bias = nn.Parameter(torch.full_like(self.weight[:, 0], self.START))

    @torch.no_grad()
    def centre(self, mean_feature: Tensor) -> None:
        """Choose b so that this feature float [d], such as the mean of all images, has the logits :attr:`START`."""
        self.bias.copy_(self.START - self.scale * self.weight @ mean_feature.to(self.weight))

    def forward(self, features: Tensor) -> Tensor:
        """Logits float32 [B, C] of unit-norm features [B, d]."""
        with torch.autocast(features.device.type, enabled=False):
            return self.scale * features.float() @ self.weight.T + self.bias
