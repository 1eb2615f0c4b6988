"""Scores of images against the pairs of a world, streamed into the best seen and unseen pair of each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from capt.evaluation import FrontierMeter, PairSpace, feasibility
from capt.methods.compositional.model import CompositionalModel, PairTexts, Weights, spoken

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.data import CompositionalSet

IMAGES = 32  # scored together


def closed_world(data: CompositionalSet, split: str) -> PairSpace:
    """Training pairs and those of a split."""
    return PairSpace.closed_world(
        torch.from_numpy(data.pairs.copy()), torch.from_numpy(data.seen.copy()),
        torch.from_numpy(data.split_pairs[split].copy()), n_states=len(data.states), n_objects=len(data.objects),
    )  # fmt: skip


def open_world(data: CompositionalSet, backbone: Backbone) -> PairSpace:
    """Every state of a data set with every object, see :func:`all_pairs`."""
    return all_pairs(backbone, data.states, data.objects, torch.from_numpy(data.pairs[data.split_pairs["train"]]))


def all_pairs(backbone: Backbone, states: Sequence[str], objects: Sequence[str], seen: Tensor) -> PairSpace:
    """Every state with every object, with the feasibility that the frozen text features of their names give.

    seen: int64 [M, 2] (state, object), the training pairs.
    """
    state_vectors, object_vectors = (backbone.class_text_features(spoken(names)).cpu() for names in (states, objects))
    plausible = feasibility(state_vectors, object_vectors, seen)
    return PairSpace.open_world(len(states), len(objects), seen, plausible)


@torch.no_grad()
def encode_pairs(model: CompositionalModel, space: PairSpace) -> PairTexts:
    """Prompts of all pairs of a world and of the primitives, once for any number of images."""
    return model.texts(space.pairs.to(model.backbone.device))


def rows(texts: PairTexts, space: PairSpace, part: PairSpace) -> PairTexts:
    """The prompts of a part of a world out of those of the whole."""
    chosen = space.position(part.pairs).to(texts.pair.device)
    return texts._replace(pair=texts.pair[chosen], world=texts.world or len(space))


@torch.no_grad()
def score(
    model: CompositionalModel,
    texts: PairTexts,
    space: PairSpace,
    inputs: Callable[[Tensor], Tensor],
    labels: Tensor,
    *,
    weights: Weights | None = None,
    thresholds: Tensor | None = None,
    top: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> FrontierMeter:
    """Score every image against every pair of a world.

    Memory grows with neither the number of images times pairs nor, beside their texts, the number of pairs.

    Args:
        texts: of ``space``, see :func:`encode_pairs`.
        inputs: image positions int64 [B] -> the model's inputs of these images.
        labels: int64 [N, 2] (state, object) of the images.
        weights: instead of the model's ``score_weights``.
        thresholds, top: see :class:`FrontierMeter`.
        progress: called with (images done, images).
    """
    meter, device = FrontierMeter(space, thresholds=thresholds, top=top), model.backbone.device
    with torch.autocast(device.type, torch.bfloat16, enabled=model.config.training.amp):
        for batch in torch.arange(len(labels)).split(IMAGES):
            view = model.look(inputs(batch))
            factors = model.primitives(view, texts, weights)
            terms: dict[str, Any] = {} if factors is None else factors._asdict()
            meter.add(model.pair_scores(view, texts, weights), labels[batch], **terms)
            if progress is not None:
                progress(int(batch[-1]) + 1, len(labels))
    return meter


def labels_of(data: CompositionalSet, split: str) -> Tensor:
    """(state, object) of every image of a split, int64 [N, 2]."""
    return torch.from_numpy(data.pairs[data.data.splits()[split].labels])
