"""Does a model's preprocessing make a center bias of its own? Wide pictures, cut as the model does, and not cut."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from capt.backbones.transforms import EvalTransform
from capt.data.position_grid import PositionGrid
from capt.evaluation.position_results import Positions
from capt.evaluation.position_statistics import bootstrap, position_gap
from capt.evaluation.whats_up import PREPROCESSING, preprocessing

if TYPE_CHECKING:
    from capt.backbones import Backbone

_WIDE = 4 / 3

# Source: ours.


@dataclass(frozen=True, eq=False)
class PreprocessingCheck:
    """Lone objects along the middle row of pictures of 4:3, whose ends a crop cuts, after each way of preprocessing.

    Attributes:
        x: float64 [G], where the objects were, in [-1, 1].
        center: bool [G], |x| is at most the center radius.
        right: by preprocessing, float64 [K objects, G]: 1 where the object is named.
        visible: by preprocessing, float64 [G]: share of the object's box that the model gets to see; None if unknown.
    """

    x: NDArray[np.float64]
    center: NDArray[np.bool_]
    right: dict[str, NDArray[np.float64]]
    visible: dict[str, NDArray[np.float64] | None]

    def words(self) -> str:
        """What the preprocessing adds, in one sentence."""
        gaps = {mode: bootstrap(position_gap(right, self.center)).points() for mode, right in self.right.items()}
        off = self.visible["native"]
        seen = "" if off is None else f", {100 * off[~self.center].mean():.0f} % of off-center objects' area seen"
        return (
            f"Confound check, preprocessing crop, on 4:3 pictures: center less off-center accuracy is "
            f"{gaps['native']} points with the model's own preprocessing (native{seen}) and "
            f"{gaps['squash']} when nothing is cut off (squash), {gaps['pad']} with borders (pad). Only what "
            "is left under squash and pad is the encoder's."
        )

    def record(self) -> dict[str, Any]:
        """For JSON."""
        center = self.center
        rows = {}
        for mode, right in self.right.items():
            visible = self.visible[mode]
            rows[mode] = {
                "accuracy_center": float(right[:, center].mean()),
                "accuracy_off": float(right[:, ~center].mean()),
                "gap": bootstrap(position_gap(right, center)).record(),
                "accuracy": right.mean(0).tolist(),
                "visible_center": None if visible is None else float(visible[center].mean()),
                "visible_off": None if visible is None else float(visible[~center].mean()),
            }
        return {"words": self.words(), "preprocessing": rows, "x": self.x.tolist(), "center": self.center.tolist()}


def check_preprocessing(
    backbone: Backbone,
    grid: PositionGrid,
    *,
    center_radius: float = 0.5,
    caption: str = "a {}",
    modes: Sequence[str] = PREPROCESSING,
    progress: Callable[[str, int, int], None] | None = None,
) -> PreprocessingCheck:
    """Name every lone object along the middle row of pictures of 4:3, first variant, once for each preprocessing.

    Args:
        backbone: the model.
        grid: objects and grounds; its canvas is replaced by a wider one.
        center_radius, caption: as in :func:`capt.evaluation.center_bias.measure_center_bias`.
        modes: see :func:`capt.evaluation.whats_up.preprocessing`.
        progress: called with what is done, how far, of how many.
    """
    height, width = grid.image_hw
    # Patches of one pixel: cells spread evenly, and nothing is shifted.
    wide = replace(grid, image_hw=(height, round(_WIDE * width)), patch_hw=(1, 1), replicates=1, placement="random")
    row = slice(wide.cells * (wide.cells // 2), wide.cells * (wide.cells // 2 + 1))
    center = Positions.of(wide.grid, center_radius).center[row]
    names = grid.cutouts.names
    texts = backbone.text_features([caption.replace("{}", name) for name in names]).float()
    transforms = {mode: preprocessing(backbone, mode) for mode in modes}
    right = {mode: np.zeros((len(names), wide.cells)) for mode in modes}
    for thing in range(len(names)):
        if progress:
            progress("confound check", thing, len(names))
        pictures = [wide.picture(scene) for scene in wide.single(thing, 0)[1:][row]]
        images = torch.stack([transform(picture) for transform in transforms.values() for picture in pictures])
        with torch.no_grad():
            features = backbone.image_features(images)
        found = (F.normalize(features.float(), dim=-1) @ texts.T).argmax(-1).view(len(modes), -1) == thing
        for mode, values in zip(modes, found.double().cpu().numpy(), strict=True):
            right[mode][thing] = values
    visible = {mode: _visible(one, wide) for mode, one in transforms.items()}
    return PreprocessingCheck(wide.grid.xy[row, 0], center, right, visible)


def _visible(transform: Any, grid: PositionGrid) -> NDArray[np.float64] | None:
    """Share of an object in each cell of the middle row that is in front of the model, float64 [G]."""
    cells = grid.grid
    if not isinstance(transform, EvalTransform):
        return np.ones(grid.cells) if hasattr(transform, "to_tensor") else None
    if transform.resize_mode != "shortest":
        return np.ones(grid.cells)
    height, width = grid.image_hw
    seen = min(height / transform.size[0], width / transform.size[1]) * transform.size[1]
    first = (width - seen) / 2
    overlap = np.minimum(cells.lefts + cells.side, width - first) - np.maximum(cells.lefts, first)
    return np.asarray(overlap.clip(0) / cells.side)
