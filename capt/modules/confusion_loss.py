"""The CAPT objective: cross-entropy plus a contrastive loss among the classes an image is confused with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LossParts:
    """Scalar losses of a batch: cross-entropy, image-to-text, text-to-image, representatives, and their sum."""

    total: Tensor
    cross_entropy: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    representatives: Tensor


class ConfusionLoss(nn.Module):
    """``L_ori + weight * (w_i2t L_i2t + w_t2i L_t2i + w_rep L_rep)``, all three 1/2 by default.

    ``L_i2t`` tells the true class among {y, p, i_1 .. i_k}; ``L_t2i`` tells the image among those of other classes
    (images of the same class are never negatives); ``L_rep`` tells true from predicted class for every retrieved
    mistake. Source: CAPT, L_ori + L_confuse; the paper's exact contrastive form is not known, this one is ours.
    """

    def __init__(
        self,
        weight: float = 1.0,
        *,
        image_to_text: float = 0.5,
        text_to_image: float = 0.5,
        representatives: float = 0.5,
    ) -> None:
        """``weight`` of the confusion part, and of what it consists of."""
        super().__init__()
        self.weight = weight
        self.parts = (image_to_text, text_to_image, representatives)

    def forward(
        self,
        features: Tensor,
        text_features: Tensor,
        labels: Tensor,
        confusing: Tensor,
        logit_scale: Tensor | float,
        *,
        representatives: Tensor | None = None,
        representative_labels: Tensor | None = None,
        representative_predictions: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> LossParts:
        """Loss of a batch.

        Args:
            features: float [B, d], unit norm.
            text_features: float [C, d], unit norm.
            labels: int64 [B].
            confusing: int64 [B, n], candidate classes (pseudo-GT and confusing classes; repeats allowed).
            logit_scale: exp of CLIP's logit scale.
            representatives: float [B, R, d], unit norm.
            representative_labels, representative_predictions: int64 [B, R] of the stored mistakes.
            mask: bool [B, R].
        """
        logits = logit_scale * features @ text_features.T
        cross_entropy = F.cross_entropy(logits, labels)
        candidates = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, confusing, True)
        candidates = candidates.scatter(1, labels.unsqueeze(1), True)
        image_to_text = F.cross_entropy(logits.masked_fill(~candidates, float("-inf")), labels)
        # Row b: how well text y_b tells image b from the other images of the batch.
        by_text = logits[:, labels].T
        same_class = labels.unsqueeze(0) == labels.unsqueeze(1)
        same_class.fill_diagonal_(False)
        diagonal = torch.arange(len(labels), device=labels.device)
        text_to_image = F.cross_entropy(by_text.masked_fill(same_class, float("-inf")), diagonal)
        rep_loss = features.new_zeros(())
        if representatives is not None and mask is not None:
            assert representative_labels is not None and representative_predictions is not None
            true_score = (representatives * text_features[representative_labels]).sum(-1)
            wrong_score = (representatives * text_features[representative_predictions]).sum(-1)
            # Absent ones are weighted with 0 instead of being left out: a selection would wait for the device.
            each = F.softplus(logit_scale * (wrong_score - true_score)).masked_fill(~mask, 0.0)
            rep_loss = each.sum() / mask.sum().clamp_min(1)
        w_i2t, w_t2i, w_rep = self.parts
        confusion = w_i2t * image_to_text + w_t2i * text_to_image + w_rep * rep_loss
        return LossParts(cross_entropy + self.weight * confusion, cross_entropy, image_to_text, text_to_image, rep_loss)
