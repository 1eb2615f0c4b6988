"""CoOp: learned context in front of the class name, nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from capt.methods.base.model import BaseConfig, BaseModel
from capt.modules.prompts import TextPrompts
from capt.training.loop import TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone


@dataclass(frozen=True)
class CoOpConfig(BaseConfig):
    """Settings of :class:`CoOp`; training as published, with 50 epochs instead of 200.

    Attributes:
        n_ctx: learned tokens; 4 start as "a photo of a", 16 (published, too) at random.
        chunk: classes encoded together; bounds the memory of the text side.
    """

    n_ctx: int = 4
    chunk: int = 64
    training: TrainingOptions = field(
        default_factory=lambda: TrainingOptions(
            epochs=50, optimizer="sgd", lr=2e-3, weight_decay=5e-4, warmup_epochs=1.0, clip_norm=0.0
        )
    )


class CoOp(BaseModel):
    """One context for all classes, the class name behind it; images as the backbone sees them, so they are kept.

    Source: CoOp, arXiv 2109.01134 (unified context, class token at the end). The published first epoch at a constant
    rate of 1e-5 is a linear warm-up here.
    """

    kind = "coop"
    config_type = CoOpConfig
    config: CoOpConfig

    def __init__(self, backbone: Backbone, class_names: Sequence[str], config: CoOpConfig | None = None) -> None:
        super().__init__(backbone, class_names, config)
        self.text = TextPrompts(backbone, self.config.n_ctx, chunk=self.config.chunk)

    def class_text_features(self, class_names: Sequence[str]) -> Tensor:
        """Unit-norm texts [C, d] of any class names behind the learned context, with gradients to it."""
        features: Tensor = self.text(self.backbone, class_names)
        return features
