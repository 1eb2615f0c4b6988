"""Lone objects and pairs of objects, read at every stage of a model's last aggregation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capt.backbones.pooling import plain_pooling
from capt.data.position_grid import PositionGrid, Scene
from capt.errors import CaptError
from capt.evaluation.concept_survival import concept_scores, margin, vanished
from capt.modules.pooling_stages import PoolingStages, even_row, patch_mask, pooling_stages

if TYPE_CHECKING:
    from capt.backbones import Backbone

FloatArray = NDArray[np.float64]
Progress = Callable[[str, int, int], None]

#: Stages of a lone object, from the tokens to the feature; the first three are of single patches.
STAGES = ("tokens", "values", "single", "mean", "even", "oracle", "final")
_PER_PATCH = STAGES[:3]
#: Stages whose margins are kept.
MARGINS = STAGES[3:]


class Lone(NamedTuple):
    survival: dict[str, FloatArray]
    chance: dict[str, FloatArray]
    vanish: FloatArray
    margins: dict[str, FloatArray]


class StageReader:
    """Reads pictures of a grid at all stages of one model."""

    def __init__(self, backbone: Backbone, grid: PositionGrid, texts: Tensor) -> None:
        self.backbone, self.grid, self.texts = backbone, grid, texts
        self.pooling = plain_pooling(backbone.tower)

    def images(self, scenes: list[Scene]) -> Tensor:
        """Normalised pictures of scenes on the model's device, [B, 3, height, width]."""
        return self.grid.tensor(scenes).to(device=self.backbone.device, dtype=self.backbone.dtype)

    def masks(self, scenes: list[Scene]) -> Tensor:
        """Patches of the first pasted object of each scene, bool [B, N]."""
        opacity = torch.stack([self.grid.opacity(scene)[0] for scene in scenes])
        return patch_mask(opacity, self.pooling.grid).to(self.backbone.device)

    @torch.no_grad()
    def lone(self, best: int, tell: Progress) -> Lone:
        """Every object in every cell, its stages averaged over variants."""
        k, p = len(self.texts), self.grid.cells**2
        found = {stage: np.zeros((k, p)) for stage in (*STAGES, "vanish")}
        chance = {stage: np.zeros((k, p)) for stage in STAGES}
        margins = {stage: np.zeros((k, p)) for stage in MARGINS}
        for thing in range(k):
            tell("stages of lone objects", thing, k)
            for scenes in self.variants(thing):
                masks = self.masks(scenes)
                stages = pooling_stages(self.pooling, self.pooling.inputs(self.images(scenes)), masks)
                own = torch.full((p,), thing, device=masks.device)
                absent = torch.ones(p, k, dtype=torch.bool, device=masks.device)
                absent[:, thing] = False
                present = _present(stages, self.texts, masks, best)
                for stage, values in present.items():
                    found[stage][thing] += values[:, thing].double().cpu().numpy()
                    chance[stage][thing] += (values & absent).sum(1).double().cpu().numpy() / (k - 1)
                in_patches = present["values"][:, thing] | present["single"][:, thing]
                lost = vanished(in_patches[:, None], present["final"][:, thing], torch.ones_like(in_patches[:, None]))
                found["vanish"][thing] += lost.double().cpu().numpy()
                for stage in margins:
                    scores = concept_scores(getattr(stages, stage).double(), self.texts.double())
                    margins[stage][thing] += margin(scores, own, absent).cpu().numpy()
        v = self.grid.variants
        survival = {stage: found[stage].mean(0) / v for stage in STAGES}
        return Lone(
            survival,
            {stage: values.mean(0) / v for stage, values in chance.items()},
            found["vanish"].mean(0) / v,
            {stage: values / v for stage, values in margins.items()},
        )

    @torch.no_grad()
    def pairs(self, n_pairs: int, tell: Progress) -> tuple[FloatArray, FloatArray]:
        """For each pair, the middle object's score above the other's, in the feature and in an even row."""
        n = len(self.texts)
        if not 1 <= n_pairs <= n // 2:
            raise CaptError(f"pairs: found {n_pairs}, expected 1 to {n // 2}, disjoint pairs of {n} objects")
        chosen = np.random.default_rng(self.grid.seed).permutation(n)[: 2 * n_pairs].reshape(n_pairs, 2)
        final, early = np.zeros(n_pairs), np.zeros(n_pairs)
        for number, (a, b) in enumerate(chosen.tolist()):
            tell("stages of pairs", number, n_pairs)
            for central, peripheral in ((a, b), (b, a)):
                for variant in range(self.grid.variants):
                    scenes = self.grid.pair(central, peripheral, variant)[: len(self.grid.others)]
                    inputs = self.pooling.inputs(self.images(scenes))
                    feature = self.pooling.tower.project(self.pooling.tower.advance(inputs, start=self.pooling.depth))
                    texts = self.texts[[central, peripheral]].double()
                    for found, vectors in ((final, feature), (early, even_row(self.pooling, inputs))):
                        scores = concept_scores(vectors.double(), texts)
                        found[number] += float((scores[:, 0] - scores[:, 1]).mean())
        return final / (2 * self.grid.variants), early / (2 * self.grid.variants)

    def variants(self, thing: int) -> Iterator[list[Scene]]:
        """Scenes with the object in each cell, variant by variant."""
        return (self.grid.single(thing, variant)[1:] for variant in range(self.grid.variants))

    def blanks(self) -> list[Scene]:
        """The grounds alone."""
        return [self.grid.single(0, variant)[0] for variant in range(self.grid.variants)]


def _present(stages: PoolingStages, texts: Tensor, masks: Tensor, best: int) -> dict[str, Tensor]:
    """Which names are among the best at each stage, bool [B, K]; at patches: in any patch of the object."""
    found = {}
    for stage in STAGES:
        scores = concept_scores(getattr(stages, stage).float(), texts.float())
        among = scores >= scores.topk(best, dim=-1).values[..., -1:]
        found[stage] = (among & masks[..., None]).any(1) if stage in _PER_PATCH else among
    return found
