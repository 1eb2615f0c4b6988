"""PromptSRC: prompts in both towers that may not wander far from the frozen model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.errors import CaptError
from capt.methods.base.ivlp import IVLP, IVLPConfig
from capt.methods.base.model import BaseModel


@dataclass(frozen=True)
class PromptSRCConfig(IVLPConfig):
    """Settings of :class:`PromptSRC`, as published.

    Attributes:
        image_weight: of the distance between prompted and frozen image features.
        text_weight: of the distance between prompted and frozen class texts.
        logit_weight: of the divergence between prompted and frozen logits.
        mean: epoch that counts most when the prompts of all epochs are averaged, as a share of their number (15 of 20).
        deviation: width of that Gaussian, as a share of the number of epochs (1 of 20); 0 keeps the last epoch's.
    """

    image_weight: float = 10.0
    text_weight: float = 25.0
    logit_weight: float = 1.0
    mean: float = 0.75
    deviation: float = 0.05

    def __post_init__(self) -> None:
        if self.deviation < 0:
            raise CaptError(f"deviation: found {self.deviation}, expected at least 0")


class PromptSRC(IVLP):
    """IVLP with three consistency losses and the Gaussian average of the prompts of all epochs.

    With unit-norm image features f and class texts g, prompted (~) and frozen::

        loss = CE + w_image * mean|f~ - f| + w_text * mean|g~ - g| + w_logit * KL(frozen || prompted) / C

    and the final prompts are ``sum_e w_e prompts_e`` with ``w_e`` proportional to ``N(e; mean, deviation^2)``. Frozen
    texts are means over the backbone's templates.

    Source: PromptSRC (arXiv 2307.06948); means over all entries and the order of the divergence as released by its
    authors.
    """

    kind = "promptsrc"
    config_type = PromptSRCConfig
    config: PromptSRCConfig
    _average: tuple[float, dict[str, Tensor]] = (0.0, {})

    def losses(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``loss`` and its parts ``ce``, ``image``, ``text``, ``logits``, each already weighted."""
        config, scale = self.config, self.logit_scale
        image, frozen_image = (
            F.normalize(f.float(), dim=-1) for f in (self.features(inputs), self.frozen_features(inputs))
        )
        text = self.class_text_features(self.class_names)
        frozen_text = self.backbone.class_text_features(self.class_names)
        log_p, log_frozen = (
            F.log_softmax(scale * f @ t.T, dim=-1) for f, t in ((image, text), (frozen_image, frozen_text))
        )
        parts = {
            "ce": F.nll_loss(log_p, labels),
            "image": config.image_weight * F.l1_loss(image, frozen_image),
            "text": config.text_weight * F.l1_loss(text, frozen_text),
            "logits": config.logit_weight * (log_frozen.exp() * (log_frozen - log_p)).mean(),
        }
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    def end_epoch(self, epoch: int, epochs: int) -> None:
        """Add the prompts of this epoch to their average."""
        config = self.config
        if config.deviation == 0:
            return
        # As logarithms with the largest taken out, because far from the mean the densities are no longer floats.
        ages = torch.arange(1, epochs + 1, dtype=torch.float64)
        share = torch.softmax(-0.5 * ((ages / epochs - config.mean) / config.deviation) ** 2, dim=0)[epoch - 1]
        weight, (total, sums) = float(share), self._average
        now = {name: weight * value.detach().double() for name, value in self.trainable().items()}
        self._average = total + weight, {name: value + sums.get(name, 0) for name, value in now.items()}

    def finish(self) -> BaseModel:
        """Take the average as the prompts."""
        total, sums = self._average
        if total > 0:  # epochs that were never reached leave less than 1
            with torch.no_grad():
                for name, value in self.trainable().items():
                    value.copy_(sums[name] / total)
        self._average = (0.0, {})
        return super().finish()
