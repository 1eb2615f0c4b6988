"""Prediction with one trained compositional model: pair, state and object of an image, with probabilities."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from capt.errors import CaptError, DataError
from capt.evaluation import PairSpace
from capt.files import read_json
from capt.methods.compositional.model import CompositionalModel, PairTexts, View
from capt.methods.compositional.run import World
from capt.methods.compositional.scoring import IMAGES, all_pairs, encode_pairs

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class RankedPair:
    """A candidate pair with its probability; ``seen``: training had images of it."""

    state: str
    object: str
    seen: bool
    probability: float


@dataclass(frozen=True)
class RankedName:
    """A state or an object with its probability."""

    name: str
    probability: float


@dataclass(frozen=True)
class PairPrediction:
    """One image: pairs, states and objects, each best first."""

    pairs: tuple[RankedPair, ...]
    states: tuple[RankedName, ...]
    objects: tuple[RankedName, ...]


def candidates(run: str | Path, model: CompositionalModel, world: World, *, seed: int, method: str) -> PairSpace:
    """Candidate pairs of a run's model.

    Args:
        world: ``closed``: every pair that a split of the run's data lists, training and test alike; ``open``: every
            state with every object, without those that the run found infeasible for this seed and method.

    Raises:
        DataError: the closed world is asked for, but the run's record lists no pairs.
    """
    run, seen = Path(run), model.train_pairs.cpu()
    if world == "open":
        space = all_pairs(model.backbone, model.states, model.objects, seen)
        threshold = _threshold(run, seed, method)
        return space if threshold is None else space.pruned(threshold)
    listed = read_json(run / "run.json").get("pairs")
    if listed is None:
        raise DataError(f"'{run}': its record lists no pairs, so the closed world is unknown; ask for the open one")
    pairs = torch.tensor(listed).reshape(-1, 2)
    known = {tuple(pair) for pair in seen.tolist()}
    is_seen = torch.tensor([tuple(pair) in known for pair in pairs.tolist()])
    return PairSpace(pairs, is_seen, len(model.states), len(model.objects))


def _threshold(run: Path, seed: int, method: str) -> float | None:
    """The feasibility threshold that the run's evaluation used; None if it used none or, which is said, is missing."""
    if not (run / "summary.json").is_file():
        warnings.warn(
            f"'{run}': the run is not finished (no summary.json), so its feasibility threshold is unknown; all pairs "
            "of the open world are candidates, infeasible ones too",
            stacklevel=3,
        )
        return None
    value = read_json(run / "summary.json")["methods"][method]["per_seed"][str(seed)].get("open_threshold")
    return None if value is None else float(value)


@torch.no_grad()
def predict(
    model: CompositionalModel, images: Sequence[Image], space: PairSpace, *, top: int = 5
) -> list[PairPrediction]:
    """Name the pair, the state and the object of PIL images.

    Probabilities of pairs are the softmax of their scores over all candidates. Those of states and objects come from
    the model's branches for them; without such branches they are sums over the pairs.

    Args:
        model: in evaluation mode.
        space: the candidates.
        top: pairs, states and objects listed for each image.

    Raises:
        CaptError: ``top`` is below 1.
    """
    if top < 1:
        raise CaptError(f"top: expected at least 1, found {top}")
    texts = encode_pairs(model, space)
    if space.feasibility is not None:  # an open world, of which infeasible pairs may have been dropped
        texts = texts._replace(world=space.n_states * space.n_objects)
    found: list[PairPrediction] = []
    for start in range(0, len(images), IMAGES):
        pixels = torch.stack([model.backbone.preprocess(image) for image in images[start : start + IMAGES]])
        view = model.look(model.inputs(pixels.to(model.backbone.device)))
        pairs = _scores(model, view, texts, space).softmax(1)
        states, objects = _primitives(model, view, texts, space, pairs)
        for row in range(len(pixels)):
            ranked = tuple(_ranked_pair(model, space, *one) for one in _best(pairs[row], top))
            primitives = (
                tuple(RankedName(names[index], probability) for index, probability in _best(of_image, top))
                for names, of_image in ((model.states, states[row]), (model.objects, objects[row]))
            )
            found.append(PairPrediction(ranked, *primitives))
    return found


def _ranked_pair(model: CompositionalModel, space: PairSpace, index: int, probability: float) -> RankedPair:
    state, object_ = space.pairs[index].tolist()
    return RankedPair(model.states[state], model.objects[object_], bool(space.seen[index]), probability)


def _scores(model: CompositionalModel, view: View, texts: PairTexts, space: PairSpace) -> Tensor:
    """Scores float32 [B, K] of all candidates: a few images are predicted at a time, so the matrix may exist."""
    scores = torch.cat([part for _, part in model.pair_scores(view, texts)], dim=1)
    factors = model.primitives(view, texts)
    if factors is None:
        return scores
    states, objects = space.pairs.to(scores.device).T
    return scores + factors.state[:, states].float() * factors.object[:, objects].float()


def _primitives(
    model: CompositionalModel, view: View, texts: PairTexts, space: PairSpace, pairs: Tensor
) -> tuple[Tensor, Tensor]:
    """Probabilities [B, n_states] and [B, n_objects]."""
    branches = ((view.state, texts.state), (view.object, texts.object))
    sizes = (len(model.states), len(model.objects))

    def of(kind: int) -> Tensor:
        vector, prompts = branches[kind]
        if vector is not None and prompts is not None:
            return model.branch_logits(view, vector, prompts).float().softmax(1)
        summed = pairs.new_zeros(len(pairs), sizes[kind])
        return summed.index_add_(1, space.pairs[:, kind].to(pairs.device), pairs)

    return of(0), of(1)


def _best(probabilities: Tensor, top: int) -> Iterator[tuple[int, float]]:
    """(position, probability), best first; equal ones in their order."""
    values, order = probabilities.cpu().sort(descending=True, stable=True)
    yield from zip(order[:top].tolist(), values[:top].tolist(), strict=True)
