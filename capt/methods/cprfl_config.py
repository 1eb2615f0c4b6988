"""Settings of CPRFL."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from capt.errors import CaptError
from capt.methods.multi_label.model import MultiLabelConfig
from capt.training.loop import TrainingOptions

Paths = Literal["both", "encoder", "classifier"]
Refinement = Literal["joint", "alternate"]


@dataclass(frozen=True)
class CPRFLConfig(MultiLabelConfig):
    """Settings of :class:`capt.methods.cprfl.CPRFL`.

    Published: ``dim`` 2048, ``lr`` 5e-5 (COCO-LT), ``batch_size`` 16, 80 epochs, the image tower trained from an
    ImageNet network at 448 x 448 without normalisation, the text tower trained in the code and frozen in the figure.

    Attributes:
        dim: width d of prompts and interaction.
        hidden_ratio: width of the prompt network's hidden layer over ``dim``.
        linear_prompts: a prompt network of one linear layer.
        prompt_dropout: after each layer of the prompt network.
        depth: layers of the interaction.
        n_heads: its attention heads.
        head_dim: width of one; default: ``2 * dim / n_heads``.
        feed_forward: hidden width of its feed-forward part; default: ``dim``.
        residual: skip connections in the interaction; published without.
        interaction_dropout: in the interaction.
        paths: ways by which the loss reaches a category prompt: as input of the ``encoder``, as weight of the
            ``classifier``, or ``both``.
        refinement: ``joint``: everything learns in every step; ``alternate``: of ten epochs five leave the interaction
            as it is, four the prompt network, one nothing.
        train_text: the text tower learns, too.
        train_image: the image tower learns, too; its inputs are then encoded in every step.
        backbone_lr_mult: factor on the learning rate of the towers.
        normalize: give the tower pixels with its own mean and deviation taken off; published: without.
    """

    dim: int = 256
    hidden_ratio: float = 0.5
    linear_prompts: bool = False
    prompt_dropout: float = 0.0
    depth: int = 1
    n_heads: int = 8
    head_dim: int | None = None
    feed_forward: int | None = None
    residual: bool = False
    interaction_dropout: float = 0.1
    paths: Paths = "both"
    refinement: Refinement = "joint"
    train_text: bool = False
    train_image: bool = False
    backbone_lr_mult: float = 1.0
    normalize: bool = True
    ema: float = 0.998
    training: TrainingOptions = field(
        default_factory=lambda: TrainingOptions(
            epochs=20, batch_size=16, lr=5e-4, weight_decay=1e-4, schedule="one-cycle", clip_norm=0.0,
        )
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("paths", get_args(Paths)), ("refinement", get_args(Refinement))):
            if (found := getattr(self, name)) not in allowed:
                raise CaptError(f"{name}: expected one of {', '.join(allowed)}, found {found!r}")
        if self.refinement == "alternate" and self.paths == "classifier":
            raise CaptError(
                "refinement: 'alternate' takes turns between prompt network and interaction, which never learns with "
                "paths='classifier'; give 'joint', or other paths"
            )
        for name in ("dim", "depth", "n_heads", "head_dim", "feed_forward"):
            if (found := getattr(self, name)) is not None and found < 1:
                raise CaptError(f"{name}: expected at least 1, found {found}")
        for name in ("hidden_ratio", "backbone_lr_mult"):
            if not 0 < (found := getattr(self, name)) < math.inf:
                raise CaptError(f"{name}: expected a finite number above 0, found {found}")
