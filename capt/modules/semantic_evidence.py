"""Semantic evidence: which side of a confusable pair the written differences speak for, as a change of logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from capt.ops import confusion_pairs

if TYPE_CHECKING:
    from capt.modules.pair_prompts import PairPrompts


class SemanticEvidence(nn.Module):
    """Compare an image with what sets each of its likely classes apart, pair by pair.

    For the leading class p and each of its k nearest rivals i the margin is
    ``scale * (mean v . D_p|i - mean v . D_i|p)``, where D_p|i are the texts on what p has and i has not. Half of it is
    taken from the rival, half (its mean over the rivals) given to p. Pairs without written texts have no margin.
    Nothing is trained, so it serves classes without training images; where there are some they say more (tuning table
    in docs/results.md).

    Source: ours; the texts are those of CAPT's difference prompts, which the method itself only attends to.
    """

    def __init__(self, strength: float = 1.0, k: int = 3) -> None:
        """``strength`` multiplies the margins; 0 switches the evidence off. ``k``: rivals that are compared."""
        super().__init__()
        self.strength, self.k = strength, k

    def forward(self, features: Tensor, logits: Tensor, prompts: PairPrompts, scale: Tensor | float) -> Tensor:
        """Changed logits float [B, C].

        Args:
            features: float [B, d], unit norm, of the base model.
            logits: float [B, C], the present ones; they say which classes lead.
            prompts: written texts of the C classes.
            scale: factor of the cosines in ``logits``.
        """
        if not self.strength or not len(prompts) or logits.shape[1] < 2:
            return logits
        with torch.no_grad():
            pseudo, rivals, _ = confusion_pairs(logits.detach(), k=self.k)
        _, block = prompts.lookup(pseudo, rivals)
        own = prompts.difference[block.clamp_min(0)].mean(2)  # [B, k, d]
        other = prompts.difference[block.clamp_min(0) ^ 1].mean(2)  # the same pair from the rival's side
        margin = scale * torch.einsum("bd,bkd->bk", features, (own - other).to(features.dtype))
        half = 0.5 * self.strength * torch.where(block >= 0, margin, 0.0)
        changed = logits.scatter_add(1, rivals, -half.to(logits.dtype))
        return changed.scatter_add(1, pseudo.unsqueeze(1), half.mean(1, keepdim=True).to(logits.dtype))

    def extra_repr(self) -> str:
        return f"strength={self.strength}, k={self.k}"
