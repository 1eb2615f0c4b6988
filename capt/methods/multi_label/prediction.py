"""Prediction with one trained multi-label model: labels of an image, with probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capt.errors import CaptError
from capt.methods.multi_label.model import MultiLabelModel
from capt.methods.multi_label.training import IMAGES

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Label:
    """A class with its probability; ``predicted``: it reaches the threshold of its class."""

    name: str
    probability: float
    threshold: float
    predicted: bool


@torch.no_grad()
def predict(
    model: MultiLabelModel, images: Sequence[Image], transform: Callable[..., Tensor], *, top: int = 5,
    threshold: float | None = None,
) -> list[tuple[Label, ...]]:  # fmt: skip
    """Labels of PIL images: all that reach the threshold of their class, and at least ``top`` (or all there are).

    Most probable first; equal ones in the order of the classes.

    Args:
        model: in evaluation mode; its thresholds come from validation images.
        transform: PIL image to float [3, H, W], that of the run (:func:`~.run.picture_transform`).
        threshold: one probability for all classes in place of their own thresholds.

    Raises:
        CaptError: ``top`` is below 1, or ``threshold`` no probability.
    """
    if top < 1:
        raise CaptError(f"top: expected at least 1, found {top}")
    if threshold is not None and not 0 <= threshold <= 1:
        raise CaptError(f"threshold: expected a probability from 0 to 1, found {threshold}")
    found: list[tuple[Label, ...]] = []
    thresholds = model.thresholds.cpu()
    if threshold is not None:
        thresholds = torch.full_like(thresholds, float(torch.tensor(threshold).logit()))
    for start in range(0, len(images), IMAGES):
        pixels = torch.stack([transform(image) for image in images[start : start + IMAGES]])
        logits = model.logits(model.inputs(pixels.to(model.backbone.device))).float().cpu()
        found += [_ranked(model, row, thresholds, top) for row in logits]
    return found


def _ranked(model: MultiLabelModel, logits: Tensor, thresholds: Tensor, top: int) -> tuple[Label, ...]:
    values, order = logits.sort(descending=True, stable=True)
    ranked: list[Any] = list(zip(order.tolist(), values.tolist(), strict=True))
    labels = [
        Label(
            model.classes[index], float(torch.tensor(value).sigmoid()), float(thresholds[index].sigmoid()),
            value >= float(thresholds[index]),
        )
        for index, value in ranked
    ]  # fmt: skip
    return tuple(label for place, label in enumerate(labels) if place < top or label.predicted)
