"""Where the cells of a grid lie on a canvas that a model will cut into patches."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capt.errors import CaptError

Placement = Literal["auto", "matched", "random", "border"]
FloatArray = NDArray[np.float64]

#: Placement "auto" is "matched" where that reaches this share as far out as "random" does.
_FAR_ENOUGH = 0.9


class Cells(NamedTuple):
    """Where the cells of a grid lie, in pixels.

    Attributes:
        side: of an object.
        tops: int64 [G], first row of an object in each row of cells.
        lefts: int64 [G], first column.
        image_hw: (height, width) of the canvas.
        matched: the patch grid cuts an object in the same way in every cell.
        shifts: how many common shifts of all cells there are down and to the right, symmetric around 0.
    """

    side: int
    tops: NDArray[np.int64]
    lefts: NDArray[np.int64]
    image_hw: tuple[int, int]
    matched: bool
    shifts: tuple[int, int]

    @property
    def xy(self) -> FloatArray:
        """Centres (x, y) of the objects in [-1, 1], row by row, float64 [G*G, 2]; without the common shift."""
        y = (self.tops + self.side / 2) / self.image_hw[0] * 2 - 1
        x = (self.lefts + self.side / 2) / self.image_hw[1] * 2 - 1
        return np.stack([np.tile(x, len(y)), np.repeat(y, len(x))], 1)

    @property
    def radius(self) -> FloatArray:
        """Distance of each centre from the middle, 0 to 1 in the corner, float64 [G*G]."""
        return np.asarray(np.hypot(*self.xy.T) / math.sqrt(2))

    @property
    def ring(self) -> FloatArray:
        """Larger of |x| and |y| of each centre, float64 [G*G]."""
        return np.asarray(abs(self.xy).max(1))

    @property
    def ring_number(self) -> NDArray[np.int64]:
        """Rows or columns, whichever are more, to the middle cell, int64 [G*G]."""
        steps = abs(np.arange(len(self.tops)) - len(self.tops) // 2)
        return np.asarray(np.maximum(steps[:, None], steps[None]).reshape(-1))


def place_cells(
    image_hw: tuple[int, int],
    patch_hw: tuple[int, int],
    n: int,
    *,
    fill: float = 0.8,
    placement: Placement = "auto",
) -> Cells:
    """Lay n x n cells of one object size on a canvas.

    "matched": neighbours are a whole number of patches apart, so every object meets the patch grid in the same phase;
    the number is the nearest to an even spread that fits. Where not even one patch fits, cells are spread evenly
    (``matched`` of the result is False). "random": spread evenly, and each item has all its cells shifted by up to
    half a patch, so that every cell meets every phase. "auto": matched where that reaches about as far out, random
    elsewhere. "border": outer objects touch the edge of the picture; phases differ from cell to cell.

    Args:
        image_hw: (height, width) of the canvas.
        patch_hw: (height, width) of a patch.
        n: odd, so that there is a middle.
        fill: side of an object over side of a cell; smaller where neighbours would overlap otherwise.

    Raises:
        CaptError: an even or too small n, a ``fill`` outside of (0, 1], an unknown placement, a canvas too small.
    """
    if n < 3 or n % 2 == 0:
        raise CaptError(f"cells: found {n}, expected an odd number of at least 3, so that there is a middle cell")
    if not 0 < fill <= 1:
        raise CaptError(f"fill: found {fill}, expected a share above 0 and at most 1 of a cell's side")
    if placement == "auto":
        matched = place_cells(image_hw, patch_hw, n, fill=fill, placement="matched")
        spread = place_cells(image_hw, patch_hw, n, fill=fill, placement="random")
        far = bool((abs(matched.xy).max(0) >= _FAR_ENOUGH * abs(spread.xy).max(0)).all())
        return matched if matched.matched and far else spread
    if placement not in ("matched", "random", "border"):
        raise CaptError(f"placement: found {placement!r}, expected 'auto', 'matched', 'random' or 'border'")
    side = round(fill * min(image_hw) / n)
    steps = [_step(length, patch, n, side, placement) for length, patch in zip(image_hw, patch_hw, strict=True)]
    side = min(side, *(int(step) for step in steps))
    side -= (min(image_hw) - side) % 2  # so that objects can lie symmetric around the middle
    if side < 2:
        raise CaptError(f"cells: {n} x {n} objects on {image_hw[0]} x {image_hw[1]} pixels are too small; use fewer")
    if placement == "border":
        steps = [(length - side) / (n - 1) for length in image_hw]
    whole = all(step % patch == 0 for step, patch in zip(steps, patch_hw, strict=True))
    tops, lefts = (_starts(length, step, n, side) for length, step in zip(image_hw, steps, strict=True))
    return Cells(side, tops, lefts, image_hw, whole, patch_hw if placement == "random" else (1, 1))


def _step(length: int, patch: int, n: int, side: int, placement: Placement) -> float:
    """Pixels from one cell to the next."""
    if placement == "border":
        return (length - side) / (n - 1)
    if placement == "random":
        return min(length / n, (length - side - patch) / (n - 1))
    step = patch * max(1, round(length / (n * patch)))
    while length / 2 + (n - 1) / 2 * step + side / 2 > length:
        step -= patch
    return step or length / n


def _starts(length: int, step: float, n: int, side: int) -> NDArray[np.int64]:
    first = (length - side - (n - 1) * step) / 2
    # A half pixel is cut off everywhere alike; the last object may end at the edge, never behind it.
    starts = np.floor(first + step * np.arange(n) + 1e-9).astype(np.int64)
    return np.asarray(np.clip(starts, 0, length - side))
