"""Is a model cross-eyed, where does it lose what is off center, and what helps without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from capt.backbones import Backbone
from capt.data.cutouts import Cutouts, drawn_shapes, emoji_cutouts, read_cutouts
from capt.data.position_grid import PositionGrid
from capt.errors import CaptError
from capt.evaluation.center_bias import LAYOUTS, CenterBiasResult, measure_center_bias
from capt.evaluation.preprocessing_check import PreprocessingCheck, check_preprocessing
from capt.evaluation.whats_up import WhatsUpResult, score_photographs
from capt.methods.bias.explanation import Explanation, explain_center_bias
from capt.methods.bias.members import Member
from capt.methods.bias.mitigation import Mitigation, mitigate_center_bias

Progress = Callable[[str, int, int], None]


class CenterBias:
    """The center bias of one model, on pictures that differ only in where an object is.

    >>> bias = capt.CenterBias(capt.load("embedded-vit"))
    >>> bias.measure().verdict
    >>> bias.explain().diagnosis
    >>> backbone = bias.mitigate().backbone  # for everything that takes a backbone

    Attributes:
        backbone: the model, left as it is.
        cutouts: all objects; the first ``n`` of them are measured and explained, all of them mitigate.
    """

    def __init__(
        self,
        backbone: Backbone,
        objects: Cutouts | str | Path = "emoji",
        *,
        n: int = 20,
        cells: int = 5,
        backgrounds: Sequence[str | Path] = ("grey", "noise"),
        replicates: int = 1,
        center_radius: float = 0.5,
        caption: str = "a {}",
        seed: int = 0,
        progress: Progress | None = None,
    ) -> None:
        """Prepare the objects; nothing is encoded yet.

        Args:
            backbone: the model.
            objects: "emoji" (shipped), "shapes" (drawn), a folder with a sub-folder of cut-outs an object, or cut-outs.
            n: objects that are measured; twice as many, where there are as many, mitigate: half choose, half test.
            cells: along each side of the grid, odd.
            backgrounds: see :func:`capt.data.backgrounds.background`.
            replicates: pictures on every ground.
            center_radius: of what counts as center.
            caption: text of an object's name.
            seed: of everything random.
            progress: called with what is done, how far, of how many.

        Raises:
            CaptError: fewer than 2 objects asked for, or no such kind.
            DataError: more than there are, or a folder that cannot be read.
        """
        if n < 2:
            raise CaptError(f"n: found {n}, expected at least 2 objects to be told apart")
        self.backbone, self.n, self.progress = backbone, n, progress
        self.cutouts = _cutouts(objects, n, seed)
        self._options: dict[str, Any] = {
            "cells": cells, "backgrounds": tuple(backgrounds), "replicates": replicates, "seed": seed,
        }  # fmt: skip
        self._asked: dict[str, Any] = {"center_radius": center_radius, "caption": caption}

    def grid(self, n: int | None = None) -> PositionGrid:
        """Positions for the first ``n`` objects (by default, those that are measured)."""
        chosen = self.cutouts.choose(range(min(n or self.n, len(self.cutouts))))
        return PositionGrid.for_backbone(self.backbone, chosen, **self._options)

    def measure(
        self, layouts: Sequence[Literal["single", "pair", "full"]] | None = None, level: float = 0.01
    ) -> CenterBiasResult:
        """Whether lone objects fade and pairs lose one, off center.

        Args:
            layouts: some of :data:`capt.evaluation.center_bias.LAYOUTS`; by default those that there are objects for.
            level: chance of a false alarm that is accepted.
        """
        grid = self.grid()
        chosen = layouts or [one for one in LAYOUTS if one != "full" or len(grid.cutouts) > 9]
        return measure_center_bias(self.backbone, grid, layouts=chosen, level=level, **self._asked)

    def check_preprocessing(self) -> PreprocessingCheck:
        """How much of a bias the model's own preprocessing makes, by cutting pictures."""
        return check_preprocessing(self.backbone, self.grid(), progress=self.progress, **self._asked)

    def photographs(self, folder: str | Path) -> WhatsUpResult:
        """The published four-way test on photographs, see :func:`capt.evaluation.whats_up.score_photographs`."""
        return score_photographs(self.backbone, folder)

    def explain(self, level: float = 0.01) -> Explanation:
        """Where objects are lost, see :func:`capt.methods.bias.explanation.explain_center_bias`."""
        return explain_center_bias(self.backbone, self.grid(), level=level, progress=self.progress, **self._asked)

    def mitigate(
        self, members: Sequence[Member] | None = None, *, level: float = 0.05, region_objects: int = 4
    ) -> Mitigation:
        """What helps on objects it was not chosen on, see :func:`capt.methods.bias.mitigation.mitigate_center_bias`."""
        grid = self.grid(len(self.cutouts))
        return mitigate_center_bias(
            self.backbone, grid, members=members, level=level, region_objects=region_objects, progress=self.progress,
            **self._asked,
        )  # fmt: skip


def _cutouts(objects: Cutouts | str | Path, n: int, seed: int) -> Cutouts:
    if isinstance(objects, Cutouts):
        return objects
    makers: dict[Any, Callable[..., Cutouts]] = {"emoji": emoji_cutouts, "shapes": drawn_shapes}
    if objects in makers:
        try:
            return makers[objects](2 * n, seed=seed)
        except CaptError:  # not twice as many; fewer than n are refused
            return makers[objects](n, seed=seed)
    folder = Path(objects)
    if not folder.is_dir():
        raise CaptError(f"objects: {str(objects)!r} is neither 'emoji' nor 'shapes', nor a folder of cut-outs")
    return read_cutouts(folder)
