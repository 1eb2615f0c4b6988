"""Heads that carry an object less the farther out it is: which they are, what they say, what they do to the margin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from capt.evaluation.concept_survival import concept_scores, margin
from capt.evaluation.position_results import Positions
from capt.modules.direct_effects import heads_replaced
from capt.modules.text_span import text_span

if TYPE_CHECKING:
    from capt.methods.bias.stages import StageReader

#: Blocks whose heads are looked at, and how many of the heads are named.
LAST_BLOCKS, NAMED_HEADS = 4, 5
#: Texts that span a named head.
SPANNING = 5
#: What the texts that may span a head say besides the names.
PLACES = (
    "in the middle", "in the corner", "at the edge", "on the left", "on the right", "at the top", "at the bottom",
)  # fmt: skip
_CONTROLS = 5  # draws of other heads
_ROUNDING = 1e-6  # slopes that are none

# Sources: direct effects, their mean ablation and text spans, see capt.modules. Location heads by the slope of the
# object's share, and their control: ours.


class HeadEffects(NamedTuple):
    """Direct effects of the heads of the last M blocks, or of the pooling layer (M = 1); n objects in P cells.

    Attributes:
        reader: model, grid and texts of the names.
        positions: of the cells.
        shares: [n, P, M, H], part of the magnitude of a head's effect on the object's name that the object's patches
            have among all patches.
        heads: [n, P, M, H, E], what each head wrote.
        features: [n, P, E], the sum of all parts.
    """

    reader: StageReader
    positions: Positions
    shares: Tensor
    heads: Tensor
    features: Tensor

    def record(self, caption: str) -> dict[str, Any]:
        """Shares by distance, location heads, and margins without what they wrote; for JSON.

        Args:
            caption: text of a name.
        """
        slopes = slopes_with_distance(self.shares, torch.from_numpy(self.positions.ring))
        mean, shares = slopes.mean(0), self.shares.mean(0)
        chosen = steepest(mean)
        names, texts = self._texts(caption)
        return {
            "blocks": [self._block(layer) for layer in range(len(mean))],
            "distance": [ring["distance"] for ring in self.positions.rings(self.positions.ring)],
            "object_share": [
                [[ring["mean"] for ring in self.positions.rings(one.numpy())] for one in layer.unbind(-1)]
                for layer in shares.unbind(1)
            ],
            "location": [
                {
                    "name": self._name(layer, head), "block": self._block(layer), "head": head + 1,
                    "slope": float(mean[layer, head]),
                    "objects_falling": int((slopes[:, layer, head] < 0).sum()), "objects": len(slopes),
                    **self._center_off(shares[:, layer, head]),
                    **spanned(self.heads[:, :, layer, head].flatten(0, 1), names, texts),
                }
                for layer, head in chosen
            ],
            "margins": self._margins(chosen),
        }  # fmt: skip

    def _margins(self, chosen: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """Of the features, without what the chosen heads wrote, and without what as many others did."""
        means = self.heads.mean((0, 1))
        ablated = torch.zeros(means.shape[:2], dtype=torch.bool)
        for place in chosen:
            ablated[place] = True
        found: dict[str, Any] = {"whole": self._margin(self.features), "ablated": None, "others": None}
        if chosen:
            found["ablated"] = self._margin(heads_replaced(self.features, self.heads, ablated, means))
        rest = (~ablated).nonzero()
        if chosen and len(rest) >= len(chosen):
            random = np.random.default_rng(self.reader.grid.seed)
            draws = []
            for _ in range(_CONTROLS):
                others = torch.zeros_like(ablated)
                others[tuple(rest[random.choice(len(rest), len(chosen), replace=False)].T)] = True
                draws.append(self._margin(heads_replaced(self.features, self.heads, others, means)))
            found["others"] = torch.stack(draws).mean(0)
        return {name: None if one is None else self._center_off(one) for name, one in found.items()}

    def _margin(self, features: Tensor) -> Tensor:
        """Margin of the true name averaged over objects, [P]."""
        n, p = features.shape[:2]
        scores = concept_scores(features.flatten(0, 1).double(), self.reader.texts.double().cpu())
        own = torch.arange(n).repeat_interleave(p)
        return margin(scores, own, F.one_hot(own, scores.shape[-1]) == 0).reshape(n, p).mean(0)

    def _texts(self, caption: str) -> tuple[list[str], Tensor]:
        """Names and places, and their texts less what these have in common, [names + places, E]."""
        places = self.reader.backbone.text_features([f"{caption.replace('{}', 'object')} {place}" for place in PLACES])
        texts = torch.cat([self.reader.texts, places.to(self.reader.texts)]).float().cpu()
        return [*self.reader.grid.cutouts.names, *PLACES], texts - texts.mean(0)

    def _center_off(self, values: Tensor) -> dict[str, float]:
        return center_and_off(values, torch.from_numpy(self.positions.center))

    def _block(self, layer: int) -> int | None:
        """Number of a block, counted from 1; None for a pooling layer."""
        blocks = len(self.reader.pooling.tower.blocks)
        return max(blocks - LAST_BLOCKS, 0) + layer + 1 if self.reader.pooling.kind == "class token" else None

    def _name(self, layer: int, head: int) -> str:
        block = self._block(layer)
        return f"{'the pooling' if block is None else f'block {block}'}, head {head + 1}"


def center_and_off(values: Tensor, center: Tensor) -> dict[str, float]:
    """Means of values [P] in the center, bool [P], and outside."""
    return {"center": float(values[center].mean()), "off": float(values[~center].mean())}


def slopes_with_distance(shares: Tensor, distance: Tensor) -> Tensor:
    """Least-squares slopes of shares [n, P, ...] against distances [P], [n, ...]."""
    away = distance - distance.mean()
    return torch.einsum("p,np...->n...", away / away.square().sum(), shares)


def steepest(slopes: Tensor) -> list[tuple[int, int]]:
    """Layer and head of the lowest of slopes [M, H], lowest first; only slopes below 0."""
    order = slopes.flatten().argsort(stable=True)[:NAMED_HEADS].tolist()
    places = [divmod(number, slopes.shape[1]) for number in order]
    return [place for place in places if slopes[place] < -_ROUNDING]


def spanned(written: Tensor, names: Sequence[str], texts: Tensor) -> dict[str, Any]:
    """Texts [m, E] along which what a head wrote, [n, E], varies, and the part of its variance that they span."""
    span = text_span(written, texts, min(SPANNING, len(texts)))
    return {"texts": [names[i] for i in span.texts.tolist()], "explained": float(span.explained[-1])}
