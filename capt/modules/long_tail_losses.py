"""Losses for long-tailed multi-label training: asymmetric, plain and focal cross-entropy, and re-weighted ones.

Every loss takes logits [B, C] and targets [B, C] (zero or one, any dtype) and returns a scalar, the mean over all
entries, float32 (float64 for float64 logits). Logits are never changed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.errors import CaptError
from capt.ops import asymmetric_loss
from capt.ops._checks import check_count
from capt.reference import accumulate_dtype


class AsymmetricLoss(nn.Module):
    """Easy negatives fade out, those below the margin vanish; see :func:`capt.ops.asymmetric_loss`."""

    def __init__(self, gamma_pos: float = 0.0, gamma_neg: float = 4.0, margin: float = 0.05, eps: float = 1e-8) -> None:
        """CPRFL's values by default."""
        super().__init__()
        self.loss = partial(asymmetric_loss, gamma_pos=gamma_pos, gamma_neg=gamma_neg, margin=margin, eps=eps)

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss."""
        return self.loss(logits, targets)


class BinaryCrossEntropy(nn.Module):
    """Mean sigmoid cross-entropy; the multi-label soft-margin loss is the same function."""

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss."""
        x = logits.to(accumulate_dtype(logits.dtype))
        return F.binary_cross_entropy_with_logits(x, targets.to(x.dtype))


class FocalLoss(nn.Module):
    """Cross-entropy of regularised logits, each entry weighted by ``2 (1 - p_t)**2``.

    Class c with n_c of M training images gets the offset ``-(bias / negative_scale) ln(M / n_c - 1)`` on its logits.
    With z the shifted logit, positives cost ``bce(z)`` and negatives ``bce(negative_scale * z) / negative_scale``;
    p_t = exp(-bce) is the probability of the target. Subclasses weight entries by frequency. Source: the
    distribution-balanced loss (Wu et al., ECCV 2020), whose logit regularisation the compared losses share.
    """

    focal = True

    def __init__(
        self,
        frequency: Tensor,
        n_images: int,
        *,
        loss_weight: float = 1.0,
        bias: float = 0.05,
        negative_scale: float = 2.0,
        batch_scalar_focal: bool = False,
    ) -> None:
        """``frequency`` int64 [C], training images with each class, of ``n_images``.

        negative_scale: 2 for COCO-LT, 5 for VOC-LT. batch_scalar_focal: one focal factor a batch, from the mean
        cross-entropy, as the released code computes; for comparison only.

        Raises:
            CaptError: a class that no training image has, or all have: its offset would be infinite.
        """
        super().__init__()
        n_images = check_count(type(self).__name__, "n_images", n_images)
        counts = torch.as_tensor(frequency).double()
        if counts.dim() != 1 or not len(counts):
            raise CaptError(f"{type(self).__name__}: frequency must have shape [C], found {list(counts.shape)}")
        odd = ((counts < 1) | (counts >= n_images)).nonzero().flatten().tolist()
        if odd:
            raise CaptError(
                f"{type(self).__name__}: every class needs a positive and a negative among the {n_images} training "
                f"images; class {odd[0]} has frequency {counts[odd[0]]:g} ({len(odd)} such classes); leave them out"
            )
        if not negative_scale > 0:
            raise CaptError(f"{type(self).__name__}: negative_scale must be above 0, found {negative_scale}")
        self.loss_weight, self.negative_scale, self.batch_scalar_focal = loss_weight, negative_scale, batch_scalar_focal
        offset = -(bias / negative_scale) * (n_images / counts - 1).log()
        self.register_buffer("counts", counts, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def weight(self, targets: Tensor) -> Tensor | None:
        """Weights that broadcast to targets (floating [B, C]); None: all 1."""
        return None

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss."""
        counts, offset = self.get_buffer("counts"), self.get_buffer("offset")
        if logits.dim() != 2 or logits.shape[1] != len(counts) or targets.shape != logits.shape:
            raise CaptError(
                f"{type(self).__name__}: logits and targets must have shape [B, {len(counts)}], found "
                f"{list(logits.shape)} and {list(targets.shape)}"
            )
        z = logits.to(accumulate_dtype(logits.dtype))
        z = z + offset.to(z.dtype)
        target = targets.to(z.dtype)
        positive = target > 0
        scale = self.negative_scale
        entropy = F.binary_cross_entropy_with_logits(torch.where(positive, z, scale * z), target, reduction="none")
        loss = torch.where(positive, entropy, entropy / scale)
        weight = self.weight(target)
        if weight is not None:
            loss = loss * weight.to(z.dtype)
        if self.focal:
            entropy = entropy.mean() if self.batch_scalar_focal else entropy
            loss = 2 * (1 - (-entropy).exp()) ** 2 * loss
        return self.loss_weight * loss.mean()


class ClassBalancedLoss(FocalLoss):
    """Focal loss, each class weighted by its effective number ``(1 - beta) / (1 - beta**n_c)``.

    Source: Cui et al., CVPR 2019; beta and the loss weight as in the distribution-balanced comparison.
    """

    def __init__(
        self, frequency: Tensor, n_images: int, *, beta: float = 0.9, loss_weight: float = 10.0, **options: Any
    ) -> None:
        """beta in [0, 1); the rest as in :class:`FocalLoss`."""
        super().__init__(frequency, n_images, loss_weight=loss_weight, **options)
        if not 0 <= beta < 1:
            raise CaptError(f"ClassBalancedLoss: beta must lie in [0, 1), found {beta}")
        self.beta = beta

    def weight(self, targets: Tensor) -> Tensor:
        """[C]."""
        return (1 - self.beta) / (1 - self.beta ** self.get_buffer("counts"))


class DistributionBalancedLoss(FocalLoss):
    """Focal loss, entries weighted by how often re-sampling by class would draw their image for their class.

    ``r_c = (1 / n_c) / sum_j (1 / n_j)`` over the positives j of the image; weight ``0.1 + sigmoid(10 (r_c - mu))``,
    1.1 for an image without a positive. Source: Wu et al., ECCV 2020.
    """

    def __init__(self, frequency: Tensor, n_images: int, *, mu: float = 0.2, **options: Any) -> None:
        """mu: 0.2 for COCO-LT, 0.3 for VOC-LT; the rest as in :class:`FocalLoss`."""
        super().__init__(frequency, n_images, **options)
        self.mu = mu

    def weight(self, targets: Tensor) -> Tensor:
        """[B, C]."""
        rarity = 1 / self.get_buffer("counts").to(targets.dtype)
        return 0.1 + torch.sigmoid(10 * (rarity / (targets * rarity).sum(1, keepdim=True) - self.mu))


class DistributionBalancedLossWithoutFocal(DistributionBalancedLoss):
    """DB-0FL: the distribution-balanced loss without its focal factor, half its weight."""

    focal = False

    def __init__(self, frequency: Tensor, n_images: int, *, loss_weight: float = 0.5, **options: Any) -> None:
        """As :class:`DistributionBalancedLoss`."""
        super().__init__(frequency, n_images, loss_weight=loss_weight, **options)


#: Names in configurations. The first two need no frequencies.
LOSSES: dict[str, type[nn.Module]] = {
    "asl": AsymmetricLoss,
    "bce": BinaryCrossEntropy,
    "focal": FocalLoss,
    "class-balanced": ClassBalancedLoss,
    "distribution-balanced": DistributionBalancedLoss,
    "distribution-balanced-0fl": DistributionBalancedLossWithoutFocal,
}


def long_tail_loss(name: str, frequency: Tensor, n_images: int, **options: Any) -> nn.Module:
    """The loss of this name for training data with these class frequencies; options go to its class.

    Raises CaptError for an unknown name or option.
    """
    if name not in LOSSES:
        raise CaptError(f"long_tail_loss: there is no loss '{name}'; known are {', '.join(LOSSES)}")
    kind = LOSSES[name]
    counts = (frequency, n_images) if issubclass(kind, FocalLoss) else ()
    try:
        return kind(*counts, **options)
    except TypeError as error:
        raise CaptError(f"long_tail_loss('{name}'): {error}") from error
