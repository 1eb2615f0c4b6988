"""Lone objects and pairs of objects, read at every stage of a model's last aggregation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capt.data.position_grid import PositionGrid, Scene
from capt.errors import CaptError
from capt.evaluation.concept_survival import concept_scores, margin, vanished
from capt.evaluation.position_results import Positions
from capt.modules.attention_statistics import attention_rows, center_ratio, object_gain, position_share
from capt.modules.direct_effects import direct_effects, object_share
from capt.modules.pooling_stages import PoolingStages, even_row, patch_mask, pooling_stages

if TYPE_CHECKING:
    from capt.backbones import Backbone
    from capt.backbones.pooling import Pooling

FloatArray = NDArray[np.float64]
Progress = Callable[[str, int, int], None]

#: Stages of a lone object, from the tokens to the feature; the first three are of single patches.
STAGES = ("tokens", "values", "single", "mean", "even", "oracle", "final")
_PER_PATCH = STAGES[:3]
#: Stages whose margins are kept.
MARGINS = STAGES[3:]
#: Objects whose attention and direct effects are looked at: those take passes of their own.
_LOOKED_AT = 8


class Lone(NamedTuple):
    survival: dict[str, FloatArray]
    chance: dict[str, FloatArray]
    vanish: FloatArray
    margins: dict[str, FloatArray]


class StageReader:
    """Reads pictures of a grid at all stages of one model."""

    def __init__(self, backbone: Backbone, grid: PositionGrid, texts: Tensor) -> None:
        self.backbone, self.grid, self.texts = backbone, grid, texts
        self.pooling: Pooling = backbone.tower.pooling()

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
            for scenes in self._variants(thing):
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

    @torch.no_grad()
    def attention(self, positions: Positions) -> dict[str, Any]:
        """Statistics of the pooling row: by layer and head, and by position of the object."""
        things = range(min(_LOOKED_AT, len(self.texts)))
        ratios, gains, rows = [], [], []
        sinks = 0.0
        for thing in things:
            scenes = next(self._variants(thing))
            found = attention_rows(self.pooling, self.images(scenes))
            ratios.append(center_ratio(found.patches, self.pooling.grid).mean(0))
            gains.append(object_gain(found.patches, self.masks(scenes)).mean(2)[:, -1])
            rows.append(found.patches[positions.middle].mean(1)[-1])
            sinks += float(found.sink_mass()[:, -1].mean()) / len(things)
        ratio, gain = torch.stack(ratios).mean(0).double().cpu(), torch.stack(gains).mean(0).double().cpu().numpy()
        blank = attention_rows(self.pooling, self.images(self._blanks()))
        return {
            "kind": self.pooling.kind,
            "center_ratio_by_layer": ratio.mean(1).tolist(),
            "center_ratio_by_head": ratio[-1].tolist(),
            "center_ratio_of_blank_pictures": float(center_ratio(blank.patches, self.pooling.grid)[:, -1].mean()),
            "position_share": self._position_share(rows),
            "sink_mass": sinks,
            "object_gain": positions.rings(gain),
            "object_gain_map": positions.as_map(gain),
        }

    @torch.no_grad()
    def effects(self, positions: Positions) -> dict[str, Any] | str:
        """Part of the true name's direct effect that comes from the object's patches, and its amount by layer."""
        shares, layers = [], []
        try:
            for thing in range(min(_LOOKED_AT, len(self.texts))):
                scenes = next(self._variants(thing))
                effects = direct_effects(self.pooling, self.images(scenes))
                scores = effects.concept_scores(self.texts[thing : thing + 1].to(self.backbone.dtype))
                masks = self.masks(scenes)
                shares.append(object_share(scores, masks)[:, 0].double().cpu().numpy())
                patches = scores[..., -masks.shape[1] :, 0] * masks[:, None, None]
                layers.append((patches.sum((2, 3)) / effects.total().norm(dim=-1)[:, None]).double().cpu().numpy())
        except CaptError as error:
            return str(error)
        share, by_layer, center = np.mean(shares, 0), np.mean(layers, 0), positions.center
        return {
            "object_share": positions.rings(share),
            "by_layer_center": by_layer[center].mean(0).tolist(),
            "by_layer_off": by_layer[~center].mean(0).tolist(),
        }

    def _position_share(self, rows: list[Tensor]) -> float | None:
        if len(rows) < 2:
            return None
        share = float(position_share(torch.stack(rows)[:, None, None]).mean())
        return None if np.isnan(share) else share

    def _variants(self, thing: int) -> Iterator[list[Scene]]:
        """Scenes with the object in each cell, variant by variant."""
        return (self.grid.single(thing, variant)[1:] for variant in range(self.grid.variants))

    def _blanks(self) -> list[Scene]:
        return [self.grid.single(0, variant)[0] for variant in range(self.grid.variants)]


def _present(stages: PoolingStages, texts: Tensor, masks: Tensor, best: int) -> dict[str, Tensor]:
    """Which names are among the best at each stage, bool [B, K]; at patches: in any patch of the object."""
    found = {}
    for stage in STAGES:
        scores = concept_scores(getattr(stages, stage).float(), texts.float())
        among = scores >= scores.topk(best, dim=-1).values[..., -1:]
        found[stage] = (among & masks[..., None]).any(1) if stage in _PER_PATCH else among
    return found
