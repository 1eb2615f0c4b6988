"""Sample evidence: what the few training images of each class look like, as a correction of image features."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.errors import CaptError


class SampleEvidence(nn.Module):
    """Pull an image feature towards the texts of the classes whose training images it resembles.

    The score of class c is ``<mu_c - mu, v - mu>`` with the class means mu_c of unit-norm training features and their
    mean mu. ``T^+`` turns scores into the smallest change of v that adds them to the similarities ``v T^T``, so the
    result is an image feature like any other. Nothing is trained; without remembered images the change is zero.

    Attributes:
        means: float32 [C, d], class means; zero rows for classes without images.

    Source: ours, after nearest-class-mean classification and feature caches for CLIP.
    """

    means: Tensor

    def __init__(self, n_classes: int, dim: int, strength: float = 3.0) -> None:
        """``strength`` multiplies the scores; 0 switches the evidence off."""
        super().__init__()
        self.strength = strength
        self.register_buffer("means", torch.zeros(n_classes, dim))

    @torch.no_grad()
    def remember(self, features: Tensor, labels: Tensor) -> None:
        """Store the class means of training features float [N, d] (normalised here) with labels int64 [N]."""
        n_classes, dim = self.means.shape
        if features.shape != (len(labels), dim):
            raise CaptError(f"evidence: features must be [{len(labels)}, {dim}], found {list(features.shape)}")
        sums = torch.zeros_like(self.means).index_add_(0, labels, F.normalize(features.to(self.means), dim=-1))
        self.means = sums / torch.bincount(labels, minlength=n_classes).clamp_min(1).unsqueeze(1)

    @torch.no_grad()
    def change_map(self, text_features: Tensor, rows: Tensor) -> tuple[Tensor, Tensor] | None:
        """The correction as a linear map, for candidate classes some of which are remembered.

        Args:
            text_features: float [n, d], texts of the remembered candidates.
            rows: int64 [n], their rows in ``means``.

        Returns:
            (matrix [d, d], offset [d]): the change of features v [B, d] is ``v @ matrix + offset``; None where
            fewer than two candidates have training images.
        """
        seen = self.means[rows].norm(dim=1) > 0
        if self.strength == 0 or int(seen.sum()) < 2:
            return None
        means = self.means[rows[seen]]
        centre = means.mean(0)
        # Singular values below 1 % of the largest belong to nearly equal texts; inverting them would amplify noise.
        inverse = torch.linalg.pinv(text_features[seen].float(), rtol=1e-2)
        matrix = self.strength * (means - centre).T @ inverse.T
        return matrix, -centre @ matrix

    def extra_repr(self) -> str:
        return f"classes={len(self.means)}, strength={self.strength}"
