"""Semantic Confusion Miner (SEM): which classes an image is likely to be mixed up with, and what to say about them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from capt.bank import ConfusionStatistics
from capt.modules.pair_prompts import PairPrompts, class_prompts
from capt.ops import confusion_pairs, prompt_attention


@dataclass(frozen=True)
class SemanticConfusion:
    """What SEM found for a batch.

    Attributes:
        pseudo: int64 [B], pseudo-GT class p (highest confidence; ties to the lower id).
        confusing: int64 [B, k], its confusing classes, most confusable first.
        scores: float32 [B, k], confusion scores S.
        commonality: float [B, d], guidance on what the pairs share.
        difference: float [B, d], guidance on what separates them.
    """

    pseudo: Tensor
    confusing: Tensor
    scores: Tensor
    commonality: Tensor
    difference: Tensor


class SemanticConfusionMiner(nn.Module):
    """Rank confusing classes by ``S_i = (1 + n_i / sum n) * softmax(logits)_i`` and attend to the pairs' prompts.

    The prompts of a pair are its encoded pair texts; without them they come from its class texts: commonality
    ``normalize(T_p + T_i)``, difference ``normalize(T_p - T_i)``. Has no parameters; no gradient flows through the
    selection.

    Source: CAPT, SEM (score: Eq. 7 as reported by readers of the paper); attention form and fallback prompts: ours.
    """

    def __init__(self, k: int = 3) -> None:
        """``k``: confusing classes an image; min(k, C - 1) are used."""
        super().__init__()
        self.k = k

    def forward(
        self,
        features: Tensor,
        logits: Tensor,
        text_features: Tensor,
        statistics: ConfusionStatistics | None = None,
        pair_prompts: PairPrompts | None = None,
    ) -> SemanticConfusion:
        """Mine a batch.

        Args:
            features: float [B, d], unit norm.
            logits: float [B, C], scaled logits of the base model.
            text_features: float [C, d], unit norm.
            statistics: confusion counts by pseudo-GT class; None (novel classes): the score is the confidence.
            pair_prompts: pair texts of the C classes; None: class texts only.
        """
        if logits.shape[1] == 1:  # one class cannot be confused with anything: its own text is the guidance
            nothing = torch.zeros(len(logits), 0, dtype=torch.long, device=logits.device)
            own = text_features.expand(len(logits), -1)
            return SemanticConfusion(
                nothing.new_zeros(len(logits)), nothing, nothing.float(), own, torch.zeros_like(own)
            )
        with torch.no_grad():
            pseudo, confusing, scores = confusion_pairs(
                logits.detach(),
                k=self.k,
                offsets=None if statistics is None else statistics.offsets,
                classes=None if statistics is None else statistics.classes,
                counts=None if statistics is None else statistics.counts,
            )
        gather = class_prompts if pair_prompts is None else pair_prompts.gather
        prompts, differences, prompt_index, difference_index = gather(pseudo, confusing, text_features)
        log_prior = torch.log((scores / scores.sum(1, keepdim=True)).clamp_min(1e-12))
        commonality, difference = prompt_attention(
            features,
            prompts,
            differences,
            commonality_index=prompt_index,
            difference_index=difference_index,
            log_prior=log_prior,
        )
        return SemanticConfusion(pseudo, confusing, scores, commonality, difference)

    def extra_repr(self) -> str:
        return f"k={self.k}"
