"""An encoder whose center bias is known, to check what the measurement says about it.

Its attention is a fixed function of the distance from the middle, and its tokens say exactly which object they show, so
the answer to every question is a short formula. The construction is ours.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from capt.data.cutouts import Cutouts
from capt.data.position_grid import PositionGrid
from capt.errors import CaptError

_SIDE = 8
_LEVELS = (0, 64, 128, 192, 255)


class PlantedBias:
    """Average of patch tokens with weights ``softmax((extra - beta) * rho^2)``, ``rho^2 = x^2 + y^2`` of the patch.

    A patch's token is the sum of the unit vectors of the objects in it, and ``ground`` times a further unit vector if
    it shows none. With ``ground`` 0 a lone object is never overlooked, while of two objects in patches p and q both are
    found exactly if the ratio of their weights, ``exp((extra - beta) * (rho_p^2 - rho_q^2))``, lies between 2^(1/2) - 1
    and 2^(1/2) + 1. With ``ground`` above 0 lone objects fade towards the border too.

    Args:
        n: number of objects.
        patches: patches along each side.
        patch: pixels along each side of a patch.
        beta: strength of the planted bias; 0 for none, below 0 for a bias to the border.
        extra: a counter-measure of the same form; ``extra=beta`` cancels the bias exactly.
        ground: length of an empty patch's token.
        noise: standard deviation of what is added to each number of the image feature.
        seed: of the noise, drawn anew for each picture.
    """

    def __init__(
        self,
        n: int = 8,
        *,
        patches: int = 7,
        patch: int = 8,
        beta: float = 2.0,
        extra: float = 0.0,
        ground: float = 0.0,
        noise: float = 0.0,
        seed: int = 0,
    ) -> None:
        if n > len(_LEVELS) ** 3 - 1:
            raise CaptError(f"n: found {n}, expected at most {len(_LEVELS) ** 3 - 1} objects")
        self.n, self.patches, self.patch = n, patches, patch
        self.image_hw = (patches * patch, patches * patch)
        self.ground, self.noise = ground, noise
        axis = (torch.arange(patches, dtype=torch.float64) + 0.5) / patches * 2 - 1
        self.rho2 = (axis[:, None] ** 2 + axis[None] ** 2).flatten()
        self.attention = torch.softmax((extra - beta) * self.rho2, 0)
        self._generator = torch.Generator().manual_seed(seed)

    @cached_property
    def cutouts(self) -> Cutouts:
        """Its objects: squares of one colour each, which the encoder recognises by that colour."""
        pictures = []
        for colour in self._colours:
            picture = np.full((_SIDE, _SIDE, 4), 255, np.uint8)
            picture[..., :3] = colour
            pictures.append((picture,))
        return Cutouts(tuple(f"object {number}" for number in range(self.n)), tuple(pictures), "planted")

    @property
    def _colours(self) -> NDArray[np.uint8]:
        grid = np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS, indexing="ij"), -1).reshape(-1, 3)
        return np.asarray(grid[(grid != 128).any(1)][: self.n], np.uint8)

    def grid(self, cells: int | None = None, **options: object) -> PositionGrid:
        """A position grid for it: plain grey ground, one look, one cell a patch unless ``cells`` says otherwise."""
        given = {"backgrounds": ("grey",), "replicates": 1, "placement": "matched", **options}
        patch_hw = (self.patch, self.patch)
        return PositionGrid(self.cutouts, self.image_hw, patch_hw, cells or self.patches, **given)  # type: ignore[arg-type]

    def tokens(self, images: Tensor) -> Tensor:
        """Patch tokens float64 [B, N, n + 2] of images normalised with mean and std 0.5."""
        red, green, blue = ((images * 0.5 + 0.5) * 255).round().int().unbind(1)
        code = (red << 16) | (green << 8) | blue
        cut = code.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch).flatten(3).flatten(1, 2)
        red, green, blue = torch.from_numpy(self._colours.astype(np.int32)).unbind(1)
        shown = (cut[..., None] == ((red << 16) | (green << 8) | blue)).any(2).double()
        ground = self.ground * (shown.sum(-1, keepdim=True) == 0)
        return torch.cat([shown, ground, torch.zeros_like(ground)], -1)

    def image_features(self, images: Tensor) -> Tensor:
        """Images float [B, 3, height, width] to features float64 [B, n + 2]."""
        features = torch.einsum("j,bjd->bd", self.attention, self.tokens(images))
        if self.noise:
            scale = self.noise * features.norm(dim=1, keepdim=True)
            features = features + scale * torch.randn(features.shape, generator=self._generator, dtype=torch.float64)
        return features

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm float64 [N, n + 2]: the sum of the named objects, or a direction of its own where none is named."""
        rows = torch.zeros(len(texts), self.n + 2, dtype=torch.float64)
        for row, text in zip(rows, texts, strict=True):
            named = [int(number) for number in re.findall(r"object (\d+)", text)]
            row[named or [self.n + 1]] = 1
        return F.normalize(rows, dim=-1)
