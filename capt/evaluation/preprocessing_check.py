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
from capt.evaluation.position_statistics import Interval, bootstrap, position_gap
from capt.evaluation.whats_up import PREPROCESSING, preprocessing

if TYPE_CHECKING:
    from capt.backbones import Backbone

_WIDE = 4 / 3

# Source: ours.


@dataclass(frozen=True, eq=False)
class PreprocessingCheck:
    """Lone objects on pictures of 4:3, named after each way of preprocessing.

    Attributes:
        positions: of the objects in the whole picture.
        right: by preprocessing, float64 [K objects, P]: 1 where the object is named.
        visible: by preprocessing, float64 [P]: share of the object's box that the model gets to see; None if unknown.
    """

    positions: Positions
    right: dict[str, NDArray[np.float64]]
    visible: dict[str, NDArray[np.float64] | None]

    @property
    def encoder_gap(self) -> float:
        """Center less off-center accuracy where nothing is cut off ("squash")."""
        return float(position_gap(self.right["squash"], self.positions.center).mean())

    def words(self) -> str:
        """What the preprocessing adds, in one sentence."""
        gaps = {
            mode: _points(bootstrap(position_gap(right, self.positions.center))) for mode, right in self.right.items()
        }
        off = self.visible["native"]
        seen = (
            ""
            if off is None
            else f", {100 * off[~self.positions.center].mean():.0f} % of off-center objects' area seen"
        )
        return (
            f"Confound check, preprocessing crop, on 4:3 pictures: center less off-center accuracy is "
            f"{gaps['native']} points with the model's own preprocessing (native{seen}) and "
            f"{gaps['squash']} when nothing is cut off (squash), {gaps['pad']} with borders (pad). Only what "
            "is left under squash and pad is the encoder's."
        )

    def record(self) -> dict[str, Any]:
        """For JSON."""
        center = self.positions.center
        rows = {}
        for mode, right in self.right.items():
            visible = self.visible[mode]
            rows[mode] = {
                "accuracy_center": float(right[:, center].mean()),
                "accuracy_off": float(right[:, ~center].mean()),
                "gap": bootstrap(position_gap(right, center)).record(),
                "accuracy_map": self.positions.as_map(right.mean(0)),
                "visible_center": None if visible is None else float(visible[center].mean()),
                "visible_off": None if visible is None else float(visible[~center].mean()),
            }
        return {"words": self.words(), "preprocessing": rows, "positions": self.positions.record()}


def _points(gap: Interval) -> str:
    return f"{100 * gap.estimate:+.1f} [{100 * gap.low:+.1f}, {100 * gap.high:+.1f}]"


def check_preprocessing(
    backbone: Backbone,
    grid: PositionGrid,
    *,
    center_radius: float = 0.5,
    caption: str = "a {}",
    modes: Sequence[str] = PREPROCESSING,
    progress: Callable[[str, int, int], None] | None = None,
) -> PreprocessingCheck:
    """Name every lone object of a grid on pictures of 4:3, first variant only, once for each way of preprocessing.

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
    positions = Positions.of(wide.grid, center_radius)
    names = grid.cutouts.names
    texts = backbone.text_features([caption.replace("{}", name) for name in names]).float()
    transforms = {mode: preprocessing(backbone, mode) for mode in modes}
    right = {mode: np.zeros((len(names), wide.cells**2)) for mode in modes}
    for thing in range(len(names)):
        if progress:
            progress("confound check", thing, len(names))
        pictures = [wide.picture(scene) for scene in wide.single(thing, 0)[1:]]
        for mode, transform in transforms.items():
            with torch.no_grad():
                features = backbone.image_features(torch.stack([transform(picture) for picture in pictures]))
            scores = F.normalize(features.float(), dim=-1) @ texts.T
            right[mode][thing] = (scores.argmax(-1) == thing).double().cpu().numpy()
    return PreprocessingCheck(positions, right, {mode: _visible(one, wide) for mode, one in transforms.items()})


def _visible(transform: Any, grid: PositionGrid) -> NDArray[np.float64] | None:
    """Share of an object in each cell that is in front of the model, float64 [P]."""
    cells = grid.grid
    if not isinstance(transform, EvalTransform):
        return np.ones(len(cells.radius)) if hasattr(transform, "to_tensor") else None
    height, width = grid.image_hw
    if transform.resize_mode != "shortest":
        return np.ones(len(cells.radius))
    scale = min(height / transform.size[0], width / transform.size[1])
    shares = []
    for starts, length, target in ((cells.tops, height, transform.size[0]), (cells.lefts, width, transform.size[1])):
        first = (length - scale * target) / 2
        overlap = np.minimum(starts + cells.side, length - first) - np.maximum(starts, first)
        shares.append(overlap.clip(0) / cells.side)
    return np.asarray((shares[0][:, None] * shares[1][None]).reshape(-1))
