"""Is a model cross-eyed, where does it lose what is off center, and what helps without training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from capt.backbones import Backbone
from capt.data.cutouts import Cutouts, drawn_shapes, emoji_cutouts, read_cutouts
from capt.data.position_grid import PositionGrid
from capt.errors import CaptError
from capt.evaluation.center_bias import LAYOUTS, CenterBiasResult, measure_center_bias, recognised_objects
from capt.evaluation.position_results import Positions
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
        candidates: objects to choose from.
    """

    def __init__(
        self,
        backbone: Backbone,
        objects: Cutouts | str | Path = "emoji",
        *,
        n: int = 20,
        candidates: int | None = None,
        cells: int = 5,
        fill: float = 0.8,
        backgrounds: Sequence[str | Path] = ("grey",),
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
            n: objects that are measured, all where there are fewer; twice as many, where there are as many, mitigate:
                half choose, half test.
            candidates: the objects are those that the model names best among so many (of a folder, drawn by the seed),
                since one that is recognised nowhere cannot be lost anywhere; ``n``: no choice; by default three times
                ``n``, where there are as many. The choice favours no position, and its pictures are not used again.
            cells: along each side of the grid, odd; fewer make larger objects.
            fill: side of an object over side of a cell.
            backgrounds: see :func:`capt.data.backgrounds.background`.
            replicates: pictures on every ground.
            center_radius: of what counts as center.
            caption: text of an object's name.
            seed: of everything random.
            progress: called with what is done, how far, of how many.

        Raises:
            CaptError: fewer than 2 objects asked for, or no such kind.
            DataError: more emoji or shapes than there are, or a folder that cannot be read.
        """
        if n < 2:
            raise CaptError(f"n: found {n}, expected at least 2 objects to be told apart")
        if candidates is not None and candidates < n:
            raise CaptError(f"candidates: found {candidates}, expected at least the {n} objects that are chosen")
        self.backbone, self.progress = backbone, progress
        self.candidates = _candidates(objects, n, candidates, seed)
        self.n = min(n, len(self.candidates))
        self._options: dict[str, Any] = {
            "cells": cells, "fill": fill, "backgrounds": tuple(backgrounds), "replicates": replicates, "seed": seed,
        }  # fmt: skip
        self._asked: dict[str, Any] = {"center_radius": center_radius, "caption": caption}
        Positions.of(self._grid(self.candidates).grid, center_radius)  # refused here, not after the choice

    @cached_property
    def cutouts(self) -> Cutouts:
        """The objects, those that the model names best first; ``n`` are measured and explained, 2 ``n`` mitigate."""
        found, keep = self.candidates, min(2 * self.n, len(self.candidates))
        if len(found) == self.n:
            return found
        if self.progress:
            self.progress("choice of objects", 0, 1)
        return recognised_objects(self.backbone, self._grid(found), keep, **self._asked)

    def grid(self, n: int | None = None) -> PositionGrid:
        """Positions for the first ``n`` objects (by default, those that are measured)."""
        return self._grid(self.cutouts.choose(range(min(n or self.n, len(self.cutouts)))))

    def _grid(self, cutouts: Cutouts) -> PositionGrid:
        return PositionGrid.for_backbone(self.backbone, cutouts, **self._options)

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
        self,
        members: Sequence[Member] | None = None,
        *,
        passes: int = 1,
        level: float = 0.05,
        region_objects: int = 4,
    ) -> Mitigation:
        """What helps on objects it was not chosen on, see :func:`capt.methods.bias.mitigation.mitigate_center_bias`."""
        grid = self.grid(len(self.cutouts))
        return mitigate_center_bias(
            self.backbone, grid, members=members, passes=passes, level=level, region_objects=region_objects,
            progress=self.progress, **self._asked,
        )  # fmt: skip


def _candidates(objects: Cutouts | str | Path, n: int, wanted: int | None, seed: int) -> Cutouts:
    makers: dict[Any, Callable[..., Cutouts]] = {"emoji": emoji_cutouts, "shapes": drawn_shapes}
    if isinstance(objects, str) and objects in makers:
        if wanted is not None:
            return makers[objects](wanted, seed=seed)
        for times in (3, 2):
            try:
                return makers[objects](times * n, seed=seed)
            except CaptError:  # not as many; fewer than n are refused
                pass
        return makers[objects](n, seed=seed)
    if not isinstance(objects, Cutouts):
        folder = Path(objects)
        if not folder.is_dir():
            raise CaptError(f"objects: {str(objects)!r} is neither 'emoji' nor 'shapes', nor a folder of cut-outs")
        objects = read_cutouts(folder)
        objects = objects.choose(np.random.default_rng(seed).permutation(len(objects)).tolist())
    return objects.choose(range(min(wanted or 3 * n, len(objects))))
