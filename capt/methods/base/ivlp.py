"""IVLP: learned tokens in both towers, at several depths, independent of each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from capt.methods.base.model import BaseConfig, BaseModel
from capt.modules.prompts import PromptedTower, TextPrompts
from capt.training.loop import TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone, TokenTower


@dataclass(frozen=True)
class IVLPConfig(BaseConfig):
    """Settings of :class:`IVLP`.

    Attributes:
        n_ctx_text: learned tokens of a set on the text side.
        n_ctx_visual: learned tokens of a set on the image side.
        text_depth: sets on the text side: one at the input, then one at each block; at most one a block.
        visual_depth: the same on the image side; 0 leaves the image tower as it is.
        chunk: classes encoded together; bounds the memory of the text side.
    """

    n_ctx_text: int = 4
    n_ctx_visual: int = 4
    text_depth: int = 9
    visual_depth: int = 9
    chunk: int = 64
    training: TrainingOptions = field(
        default_factory=lambda: TrainingOptions(
            epochs=20, batch_size=4, optimizer="sgd", lr=2.5e-3, weight_decay=5e-4, warmup_epochs=1.0, clip_norm=0.0
        )
    )


class IVLP(BaseModel):
    """Independent vision-language prompting; its inputs are the tokens that enter the image tower's first block.

    Raises:
        CaptError: visual prompts in an image tower without blocks, deep text prompts in a text tower that does not
            take them.

    Source: the independent prompting that MaPLe (arXiv 2210.03117) compares with and PromptSRC (arXiv 2307.06948)
    builds on; rates, depths and sizes are those published with the latter, its first epoch at a constant rate of 1e-5
    is a linear warm-up here.
    """

    kind = "ivlp"
    config_type = IVLPConfig
    config: IVLPConfig

    def __init__(self, backbone: Backbone, class_names: Sequence[str], config: IVLPConfig | None = None) -> None:
        super().__init__(backbone, class_names, config)
        own = self.config
        self.text = TextPrompts(backbone, own.n_ctx_text, own.text_depth, chunk=own.chunk)
        self.visual: nn.Parameter | None = None
        self._prompted: PromptedTower | None = None
        if own.visual_depth:
            self._prompted = PromptedTower(backbone.tower, own.n_ctx_visual, own.visual_depth, device=backbone.device)
            self.visual = self._prompted.prompts

    @property
    def tower(self) -> TokenTower:
        """The image tower with its visual prompts."""
        return self._prompted or self.backbone.tower

    def inputs(self, images: Tensor) -> Tensor:
        """Tokens [B, L, D] of the plain tower before its first block; image features [B, d] without visual prompts."""
        if self._prompted is None:
            return super().inputs(images)
        with torch.no_grad():
            return self._prompted.inner.embed(images.to(self.backbone.device, self.backbone.dtype))

    def features(self, inputs: Tensor) -> Tensor:
        """Un-normalised image features [B, d] of :meth:`inputs`, with gradients to the visual prompts."""
        if self._prompted is None:
            return inputs
        return self._prompted.project(self._prompted.advance(self._prompted.begin(inputs)))

    def frozen_features(self, inputs: Tensor) -> Tensor:
        """What the plain tower makes of :meth:`inputs`, [B, d], un-normalised and without gradient."""
        if self._prompted is None:
            return inputs
        inner = self._prompted.inner
        with torch.no_grad():
            return inner.project(inner.advance(inputs))

    def class_text_features(self, class_names: Sequence[str]) -> Tensor:
        """Unit-norm texts [C, d] of any class names behind the learned context, with gradients to it."""
        features: Tensor = self.text(self.backbone, class_names)
        return features
