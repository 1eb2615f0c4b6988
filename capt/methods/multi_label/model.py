"""What every multi-label model offers, and the two simplest: zero-shot CLIP and a linear classifier."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.errors import CaptError, DataError
from capt.methods.tuned_model import TunedModel
from capt.modules.long_tail_losses import AsymmetricLoss, long_tail_loss
from capt.training.loop import TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.data import MultiLabelImages

Loss = Literal[
    "asl", "bce", "focal", "class-balanced", "distribution-balanced", "distribution-balanced-0fl"
]  # fmt: skip
#: Settings that a loss takes, under the same name in the configuration.
_LOSS_OPTIONS: dict[str, tuple[str, ...]] = {
    "asl": ("gamma_pos", "gamma_neg", "margin"),
    "bce": (),
    "focal": ("negative_scale",),
    "class-balanced": ("negative_scale",),
    "distribution-balanced": ("negative_scale", "mu"),
    "distribution-balanced-0fl": ("negative_scale", "mu"),
}


@dataclass(frozen=True)
class MultiLabelConfig:
    """Settings that all multi-label models have.

    Attributes:
        loss: asymmetric loss, cross-entropy, or one that weighs classes by their training frequency.
        gamma_pos: asl: focusing exponent of positives.
        gamma_neg: asl: focusing exponent of negatives.
        margin: asl: probability below which negatives cost nothing.
        negative_scale: losses by frequency: factor of negatives' logits (2 for COCO-LT, 5 for VOC-LT).
        mu: distribution-balanced losses: centre of their weights (0.2 for COCO-LT, 0.3 for VOC-LT).
        ema: decay of the moving average of the weights, which is what is validated and kept; 0: none.
        views: augmented views a training image, beside the plain one; all are encoded once and kept.
        training: optimiser, schedule, batch size.
    """

    loss: Loss = "asl"
    gamma_pos: float = 0.0
    gamma_neg: float = 4.0
    margin: float = 0.05
    negative_scale: float = 2.0
    mu: float = 0.2
    ema: float = 0.0
    views: int = 0
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        if self.loss not in get_args(Loss):
            raise CaptError(f"loss: expected one of {', '.join(get_args(Loss))}, found {self.loss!r}")
        if not 0 <= self.ema < 1:
            raise CaptError(f"ema: expected at least 0 and less than 1, found {self.ema}")
        if self.views < 0:
            raise CaptError(f"views: expected at least 0, found {self.views}")
        for name in (one.name for one in fields(self) if one.name.endswith("dropout")):
            if not 0 <= getattr(self, name) < 1:
                raise CaptError(f"{name}: expected at least 0 and less than 1, found {getattr(self, name)}")
        AsymmetricLoss(self.gamma_pos, self.gamma_neg, self.margin)(torch.zeros(1, 1), torch.zeros(1, 1))  # checks them

    def make_loss(self, images: MultiLabelImages) -> nn.Module:
        """The loss for these training images.

        Raises:
            DataError: it weighs classes by their frequency, and one is shown by no image or by all of them.
        """
        odd = np.flatnonzero((images.counts == 0) | (images.counts == len(images)))
        if self.loss not in ("asl", "bce") and odd.size:
            raise DataError(
                f"loss '{self.loss}': every class needs training images with it and without it; "
                f"'{images.classes[odd[0]]}' is shown by {images.counts[odd[0]]} of {len(images)} ({odd.size} such "
                "classes); train with loss 'asl' or 'bce', or leave these classes out of the data"
            )
        options = {name: getattr(self, name) for name in _LOSS_OPTIONS[self.loss]}
        return long_tail_loss(self.loss, torch.from_numpy(images.counts.copy()), len(images), **options)


class MultiLabelModel(TunedModel):
    """A CLIP model, tuned or not, seen as: inputs of images, a logit for each class.

    Attributes:
        classes: class names, in the order of the logits.
        thresholds: float32 [C], least logit of a predicted label; 0 until chosen on validation images.
        config: its settings.
    """

    config_type: ClassVar[type[MultiLabelConfig]] = MultiLabelConfig
    config: MultiLabelConfig
    thresholds: Tensor

    def __init__(self, backbone: Backbone, classes: Sequence[str], config: MultiLabelConfig | None = None) -> None:
        super().__init__(backbone)
        self.classes = tuple(classes)
        self.config = config or self.config_type()
        self.register_buffer("thresholds", torch.zeros(len(self.classes), device=backbone.device))

    @property
    def input_kind(self) -> Hashable:
        """Models of one backbone with equal kinds have equal :meth:`inputs`, and may share a cache of them."""
        return "feature"

    def inputs(self, images: Tensor) -> Tensor:
        """What :meth:`logits` takes, of transformed images float [B, 3, H, W]: frozen, so it may be cached."""
        with torch.no_grad():
            return F.normalize(self.backbone.image_features(images).float(), dim=-1)

    @abstractmethod
    def logits(self, inputs: Tensor) -> Tensor:
        """Logits float32 [B, C] of :meth:`inputs`, with gradients to what is trained."""

    def trained_by_rate(self) -> Mapping[float, list[nn.Parameter]]:
        """Trained parameters by factor on the learning rate."""
        return {1.0: list(self.trainable().values())}

    def start_epoch(self, epoch: int) -> None:
        """Called before the first step of every epoch, counted from 0; may freeze parts for that epoch."""

    def record(self) -> dict[str, Any]:
        """Class names."""
        return {"classes": list(self.classes)}


class ZeroShotLabels(MultiLabelModel):
    """The backbone as it is: scaled cosines of image and class texts, plus the bias of sigmoid-trained models.

    Nothing learns. Each class ranks images; its probabilities are of use with thresholds from validation images alone.
    """

    kind = "zero-shot"

    def logits(self, inputs: Tensor) -> Tensor:
        """Scaled cosines."""
        texts = self.backbone.class_text_features(spoken(self.classes))
        return self.backbone.logit_scale * inputs @ texts.float().T + self.backbone.logit_bias


@dataclass(frozen=True)
class LinearLabelsConfig(MultiLabelConfig):
    """Settings of :class:`LinearLabels`.

    Attributes:
        initial: ``text`` starts from the class texts, ``zero`` knows nothing of the class names.
    """

    initial: Literal["text", "zero"] = "text"
    training: TrainingOptions = field(
        default_factory=lambda: TrainingOptions(epochs=60, batch_size=64, lr=5e-3, weight_decay=0.0, clip_norm=0.0)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.initial not in ("text", "zero"):
            raise CaptError(f"initial: expected 'text' or 'zero', found {self.initial!r}")


class LinearLabels(MultiLabelModel):
    """A linear classifier on the frozen image feature: ``scale * cos(v, w_c)``-like logits with a bias a class.

    Rows start from the class texts (or zero) and are free, not unit-norm; the bias makes all logits negative at first,
    as nearly all labels are. Source: the field's linear probe; text start and scale: ours.
    """

    kind = "linear"
    config_type = LinearLabelsConfig
    config: LinearLabelsConfig

    def __init__(self, backbone: Backbone, classes: Sequence[str], config: LinearLabelsConfig | None = None) -> None:
        super().__init__(backbone, classes, config)
        with torch.no_grad():
            texts = backbone.class_text_features(spoken(self.classes)).float().clone()
        text_start = self.config.initial == "text"
        self.weight = nn.Parameter(texts if text_start else torch.zeros_like(texts))
        # The cosine of an image and a text is about a quarter before anything is known of either.
        start = -0.25 * float(backbone.logit_scale) if text_start else 0.0
        self.bias = nn.Parameter(torch.full((len(self.classes),), start - 4.0, device=backbone.device))

    def logits(self, inputs: Tensor) -> Tensor:
        """``scale * v @ W.T + b``."""
        with torch.autocast(inputs.device.type, enabled=False):
            return self.backbone.logit_scale * inputs.float() @ self.weight.T + self.bias


def spoken(names: Sequence[str]) -> list[str]:
    """Class names as words of a sentence: ``_`` joins words in the published lists."""
    return [name.replace("_", " ") for name in names]
