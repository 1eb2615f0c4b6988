"""DPC-style: prompts contrasted with images of classes that look alike, as the released trainer of CAPT does it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.errors import CaptError
from capt.methods.base.ivlp import IVLP, IVLPConfig
from capt.methods.base.model import BaseModel, ZeroShot
from capt.modules.kmeans import spherical_kmeans
from capt.training.loop import TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone


@dataclass(frozen=True)
class DPCConfig(IVLPConfig):
    """Settings of :class:`DPCStyle`.

    Attributes:
        top: confident classes of an image that are looked at.
        least: classes an image brings along at least.
        random_text_noise: add ``W Z + b`` to the class texts in every training step, W and b drawn anew from
            U(-1/sqrt 5, 1/sqrt 5), Z five centres of the frozen class texts. The released trainer does so (and before
            it looks for confident classes, too); at 768 dimensions its rows are 6 to 7 long, those of texts 1.
        centres: rows of Z.
    """

    top: int = 8
    least: int = 2
    random_text_noise: bool = False
    centres: int = 5
    training: TrainingOptions = field(
        default_factory=lambda: TrainingOptions(
            epochs=20, batch_size=4, optimizer="sgd", lr=2e-3, weight_decay=5e-4, warmup_epochs=1.0, clip_norm=0.0
        )
    )

    def __post_init__(self) -> None:
        if self.top < 1 or self.least < 1 or self.centres < 1:
            raise CaptError(
                f"dpc: top, least and centres must be at least 1, found {self.top}, {self.least}, {self.centres}"
            )


class DPCStyle(IVLP):
    """Prompts in both towers, trained by symmetric InfoNCE over a batch and one image each of its confident classes.

    A step gathers, for every image, the ``top`` classes of the frozen model without the image's own and without those
    that the batch already has, at least ``least`` of them, and one random training image of each (the few-shot images,
    evaluation transform). All images against their classes' texts make the matrix ``scale * x T^T``, whose diagonal is
    the target of rows and columns. As released, images of one class are each other's negatives.

    Evaluation is decoupled, with the released weight 0 for new classes: :meth:`for_classes` gives the frozen model for
    lists without any training class, and runs score it so. CAPT on top of it corrects the tuned image features among
    all classes. Towers without blocks get text prompts only.

    Source: the trainer released with CAPT, whose lineage is DPC on PromptKD; without its projector and its second set
    of prompts, and with zero-shot CLIP as the model before tuning.
    """

    kind = "dpc"
    class_bound = True
    config_type = DPCConfig
    config: DPCConfig

    def __init__(self, backbone: Backbone, class_names: Sequence[str], config: DPCConfig | None = None) -> None:
        config = config or DPCConfig()
        config = replace(
            config,
            visual_depth=config.visual_depth if backbone.tower.blocks else 0,
            text_depth=config.text_depth if backbone.text_tower.blocks else 1,
        )
        super().__init__(backbone, class_names, config)
        self._stored: Callable[[Tensor], Tensor] | None = None
        self._order = self._first = self._counts = torch.zeros(0, dtype=torch.int64)
        self._centres = torch.zeros(0)

    # ---- decoupled evaluation ------------------------------------------------------------------------

    def for_classes(self, class_names: Sequence[str]) -> BaseModel:
        """The model that judges images among these classes: itself, or zero-shot if no class is a training class."""
        new = set(class_names).isdisjoint(self.class_names)
        return ZeroShot(self.backbone, class_names) if new else self

    def class_text_features(self, class_names: Sequence[str]) -> Tensor:
        """Unit-norm texts [C, d]: behind the learned context, or zero-shot if no class is a training class."""
        if set(class_names).isdisjoint(self.class_names):
            return self.backbone.class_text_features(class_names)
        return super().class_text_features(class_names)

    def forward(self, images: Tensor, class_names: Sequence[str] | None = None) -> Tensor:
        """Logits [B, C] of transformed images [B, 3, H, W]; default: the training classes."""
        model = self.for_classes(class_names or self.class_names)
        return super().forward(images, class_names) if model is self else model(images, class_names)

    # ---- training ------------------------------------------------------------------------------------

    def prepare(self, inputs: Callable[[Tensor], Tensor], labels: Tensor) -> None:
        """Keep the training images at hand, by class."""
        labels = labels.cpu()
        self._stored, self._order = inputs, labels.argsort(stable=True)
        self._counts = labels.bincount(minlength=len(self.class_names))
        self._first = self._counts.cumsum(0) - self._counts
        if self.config.random_text_noise:
            texts = self.backbone.class_text_features(self.class_names)
            self._centres = spherical_kmeans(texts, self.config.centres)

    def negatives(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Classes that a batch brings along, int64 [n], image by image, confident ones first.

        Args:
            logits: float [B, C] of the frozen model, on the CPU.
            labels: int64 [B], on the CPU.
        """
        empty = self._counts == 0
        best = logits.masked_fill(empty, -torch.inf).topk(min(self.config.top, logits.shape[1])).indices
        classes = best.flatten()
        # The first place of every class in the batch; later ones are dropped, like the classes of the images.
        place = torch.arange(len(classes))
        first = torch.full((logits.shape[1],), len(classes)).scatter_reduce(0, classes, place, "amin")
        used = empty.clone()
        used[labels] = True
        kept = ((first[classes] == place) & ~used[classes]).view_as(best)
        # Random classes where too few are left: best unused ones, then any but the image's own.
        taken = used.clone()
        taken[classes[kept.flatten()]] = True
        own = torch.zeros_like(logits, dtype=torch.bool).scatter(1, best, kept).scatter(1, labels.unsqueeze(1), True)
        lot = torch.rand(logits.shape) - taken.float()
        lot, drawn = lot.masked_fill(own | empty, -torch.inf).topk(min(self.config.least, logits.shape[1]))
        missing = self.config.least - kept.sum(1, keepdim=True)
        more = (torch.arange(drawn.shape[1]) < missing) & lot.isfinite()
        return torch.cat([best, drawn], 1)[torch.cat([kept, more], 1)]

    def losses(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """``loss`` and its halves ``image_to_text`` and ``text_to_image``.

        Raises:
            CaptError: :meth:`prepare` was not called.
        """
        if self._stored is None:
            raise CaptError("losses: call prepare with the training images first, they are the negatives")
        with torch.no_grad():
            frozen_text = self.backbone.class_text_features(self.class_names)
            frozen = F.normalize(self.frozen_features(inputs), dim=-1) @ frozen_text.T
        # One transfer a step; everything that is chosen from here on is chosen on the CPU.
        chosen = self.negatives(frozen.float().cpu(), labels.cpu())
        if len(chosen):  # there may be no other class with images
            images = self._first[chosen] + (torch.rand(len(chosen)) * self._counts[chosen]).long()
            inputs = torch.cat([inputs, self._stored(self._order[images])])
            labels = torch.cat([labels, chosen.to(labels.device)])
        x = F.normalize(self.features(inputs), dim=-1)
        text = self.class_text_features(self.class_names)[labels]
        if self.config.random_text_noise:
            text = text + self.noise(len(labels))
        logits = self.logit_scale * x @ text.T
        target = torch.arange(len(labels), device=logits.device)
        rows, columns = F.cross_entropy(logits, target), F.cross_entropy(logits.T, target)
        return {"loss": (rows + columns) / 2, "image_to_text": rows.detach(), "text_to_image": columns.detach()}

    def finish(self) -> BaseModel:
        """Let go of the training images."""
        self._stored = None
        return super().finish()

    def noise(self, rows: int) -> Tensor:
        """A fresh random affine map of the centres: float32 [rows, d]."""
        n = len(self._centres)
        weight = torch.empty(rows, n + 1, device=self._centres.device).uniform_(-1, 1) / n**0.5
        noise: Tensor = weight[:, :n] @ self._centres + weight[:, n:]
        return noise
