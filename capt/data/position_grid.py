"""Pictures that differ in nothing but where an object is.

Objects are pasted on a canvas of exactly the model's input size, so no preprocessing can crop them. A *scene* says what
is pasted where; a :class:`PositionGrid` turns scenes into pictures or into batches for a model. Everything random
(ground, drawing of an object, its rotation, a common shift) is drawn from the seed, the objects and the number of the
variant, never from the position, so scenes of one item are pairs in the statistical sense.

The layouts, placements and defaults are ours; no published data set is reproduced here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from capt.data.backgrounds import Background, background
from capt.data.cells import Cells, Placement, place_cells
from capt.data.cutouts import Cutouts, Picture, squared
from capt.errors import CaptError

if TYPE_CHECKING:
    from PIL.Image import Image

    from capt.backbones import Backbone

Pixels = NDArray[np.float32]

#: Patch side that is assumed for towers whose grid does not divide their input.
DEFAULT_PATCH = 32
_TURN = 15.0
_BACKGROUND, _DRAWING, _SHIFT = range(3)  # what a random stream is for


class Pasted(NamedTuple):
    """One object in a scene: which, in which of its looks, how large (pixels), and its first row and column."""

    thing: int
    look: int
    side: int
    top: int
    left: int


class Scene(NamedTuple):
    """What is pasted where, later objects over earlier ones.

    Attributes:
        key: what the ground depends on besides the seed: objects and variant.
        pasted: the objects.
    """

    key: tuple[int, ...]
    pasted: tuple[Pasted, ...] = ()


@dataclass(frozen=True, eq=False)
class PositionGrid:
    """Objects, grounds and a grid of positions for one model.

    Attributes:
        cutouts: the objects.
        image_hw: (height, width) of the model's input.
        patch_hw: (height, width) of its patches.
        cells: G, cells along each side, odd.
        fill, placement: see :func:`place_cells`.
        backgrounds: names or paths, see :func:`capt.data.backgrounds.background`.
        replicates: pictures on every ground. Each variant (ground and replicate) has a look of its own: another drawing
            of the object or, when there are no more, the same rotated by up to 15 degrees.
        seed: of everything random.
        mean, std: the model's normalisation of pixels in [0, 1].
    """

    cutouts: Cutouts
    image_hw: tuple[int, int]
    patch_hw: tuple[int, int] = (DEFAULT_PATCH, DEFAULT_PATCH)
    cells: int = 5
    fill: float = 0.8
    placement: Placement = "auto"
    backgrounds: Sequence[str | Path | Background] = ("grey", "noise")
    replicates: int = 1
    seed: int = 0
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    _looks: dict[tuple[int, int, int], Pixels] = field(default_factory=dict, init=False, repr=False)
    _last: list[Any] = field(default_factory=lambda: [None, None], init=False, repr=False)

    def __post_init__(self) -> None:
        if self.replicates < 1:
            raise CaptError(f"replicates: found {self.replicates}, expected at least 1")
        if self.seed < 0:
            raise CaptError(f"seed: found {self.seed}, expected 0 or more")
        if not self.backgrounds:
            raise CaptError("backgrounds: found none, expected at least one, such as 'grey'")
        object.__setattr__(self, "backgrounds", tuple(background(one) for one in self.backgrounds))
        self.grid  # noqa: B018  wrong geometry is refused here, not at the first picture

    @classmethod
    def for_backbone(cls, backbone: Backbone, cutouts: Cutouts, **options: Any) -> Self:
        """A grid with a model's input size, patches and normalisation; ``options`` are the other attributes."""
        hw = backbone.image_hw
        grid = backbone.tower.grid
        divides = hw[0] % grid[0] == 0 and hw[1] % grid[1] == 0
        patch = (hw[0] // grid[0], hw[1] // grid[1]) if divides else (DEFAULT_PATCH, DEFAULT_PATCH)
        like = backbone.train_transform
        return cls(cutouts, **{"image_hw": hw, "patch_hw": patch, "mean": like.mean, "std": like.std, **options})

    @cached_property
    def grid(self) -> Cells:
        """Where the cells lie."""
        return place_cells(self.image_hw, self.patch_hw, self.cells, fill=self.fill, placement=self.placement)

    @property
    def middle(self) -> int:
        """Number of the middle cell."""
        return self.cells**2 // 2

    @property
    def others(self) -> list[int]:
        """All cells but the middle one."""
        return [cell for cell in range(self.cells**2) if cell != self.middle]

    @property
    def corners(self) -> list[int]:
        """The four cells in the corners, row by row."""
        side = self.cells - 1
        return [0, side, self.cells * side, self.cells * side + side]

    @property
    def variants(self) -> int:
        """Grounds times replicates."""
        return len(self.backgrounds) * self.replicates

    def record(self) -> dict[str, Any]:
        """What belongs into a run record."""
        return {
            "objects": self.cutouts.record(),
            "image_hw": list(self.image_hw),
            "patch_hw": list(self.patch_hw),
            "cells": self.cells,
            "object_side": self.grid.side,
            "fill": self.fill,
            "placement": self.placement,
            "phase_matched": self.grid.matched,
            "backgrounds": [one.name for one in self.grounds],
            "replicates": self.replicates,
            "seed": self.seed,
        }

    # --- layouts -------------------------------------------------------------------------------------

    def single(self, thing: int, variant: int) -> list[Scene]:
        """A lone object: first the blank ground, then the object in each cell; 1 + G*G scenes."""
        key = (thing, variant)
        return [Scene(key), *(Scene(key, (self._in_cell(thing, key, cell),)) for cell in range(self.cells**2))]

    def pair(self, central: int, peripheral: int, variant: int) -> list[Scene]:
        """Two objects: G*G - 1, 1 and 4 scenes.

        First ``central`` in the middle and ``peripheral`` in each of the :attr:`others`; then both side by side within
        the middle cell at half size (``central`` on the left); then the first layout again at half size and in the
        :attr:`corners` alone, as the control in which only places differ from the scene before.
        """
        key = (*sorted((central, peripheral)), variant)
        half = self.grid.side // 2
        scenes = [
            Scene(key, tuple(self._in_cell(thing, key, cell, side) for thing, cell in placed))
            for side, cells in ((self.grid.side, self.others), (half, self.corners))
            for placed in (((central, self.middle), (peripheral, cell)) for cell in cells)
        ]
        box = self._in_cell(central, key, self.middle)
        top = box.top + (box.side - half) // 2
        beside = tuple(
            Pasted(thing, variant, half, top, box.left + number * (box.side - half))
            for number, thing in enumerate((central, peripheral))
        )
        n = len(self.others)
        return [*scenes[:n], Scene(key, beside), *scenes[n:]]

    def full(self, things: Sequence[int], variant: int) -> list[Scene]:
        """Every cell holds another object; G*G scenes, in scene i cell p holds ``things[(p + i) % (G*G)]``.

        Over the scenes each object visits each cell once.
        """
        n = self.cells**2
        if len(things) != n:
            raise CaptError(f"things: found {len(things)} objects, expected {n}, one for each of the cells")
        key = (*sorted(things), variant)
        return [
            Scene(key, tuple(self._in_cell(things[(cell + turn) % n], key, cell) for cell in range(n)))
            for turn in range(n)
        ]

    def _in_cell(self, thing: int, key: tuple[int, ...], cell: int, side: int | None = None) -> Pasted:
        side = self.grid.side if side is None else side
        down, right = self._shift(key)
        inset = (self.grid.side - side) // 2
        top = int(self.grid.tops[cell // self.cells]) + down + inset
        left = int(self.grid.lefts[cell % self.cells]) + right + inset
        return Pasted(thing, key[-1], side, top, left)

    def _shift(self, key: tuple[int, ...]) -> tuple[int, int]:
        if self.grid.shifts == (1, 1):
            return 0, 0
        down, right = (self._random(_SHIFT, *key).integers(self.grid.shifts) - np.array(self.grid.shifts) // 2).tolist()
        return down, right

    # --- pictures ------------------------------------------------------------------------------------

    def tensor(self, scenes: Iterable[Scene]) -> Tensor:
        """Scenes as a batch for the model: float32 [B, 3, height, width], pixels of :meth:`picture` normalised."""
        scenes = list(scenes)
        # numpy, because most of the work is on small windows, where torch's threads cost more than they bring
        batch = np.empty((len(scenes), 3, *self.image_hw), np.float32)
        for image, scene in zip(batch, scenes, strict=True):
            ground, normalised = self._ground(scene.key)
            image[:] = normalised
            for window, pixels in self._painted(ground, scene):
                image[window] = self._normalise(pixels)
        return torch.from_numpy(batch)

    def picture(self, scene: Scene) -> Image:
        """One scene as a PIL image, mode RGB."""
        from PIL import Image as image_module

        canvas = self._ground(scene.key)[0].copy()
        for window, pixels in self._painted(canvas, scene):
            canvas[window] = pixels
        return image_module.fromarray(canvas.astype(np.uint8).transpose(1, 2, 0))

    def opacity(self, scene: Scene) -> Tensor:
        """Opacity of each pasted object by itself, float32 [objects, height, width] in [0, 1]."""
        opacity = torch.zeros(len(scene.pasted), *self.image_hw)
        for layer, one in zip(opacity, scene.pasted, strict=True):
            alpha = torch.from_numpy(self._look(one.thing, one.look, one.side)[3])
            layer[one.top : one.top + one.side, one.left : one.left + one.side] = alpha
        return opacity

    def _painted(self, ground: Pixels, scene: Scene) -> Iterable[tuple[tuple[slice, slice, slice], Pixels]]:
        """Windows of the canvas and what they show, whole numbers in [0, 255], one after the other."""
        several = len(scene.pasted) > 1
        canvas = ground.copy() if several else ground  # one object may lie over another
        for one in scene.pasted:
            window = (slice(None), slice(one.top, one.top + one.side), slice(one.left, one.left + one.side))
            look = self._look(one.thing, one.look, one.side)
            pixels = np.rint(canvas[window] * (1 - look[3]) + look[:3]).clip(0, 255)
            if several:
                canvas[window] = pixels
            yield window, pixels

    def _normalise(self, pixels: Pixels) -> Pixels:
        mean, std = (np.array(values, np.float32)[:, None, None] for values in (self.mean, self.std))
        normalised: Pixels = (pixels / np.float32(255) - mean) / std
        return normalised

    def _ground(self, key: tuple[int, ...]) -> tuple[Pixels, Pixels]:
        """Canvas [3, height, width] in [0, 255] without objects, and normalised; the last one is kept."""
        kind = self.grounds[key[-1] // self.replicates]
        name = (kind, key if kind.random else None)
        if self._last[0] != name:
            drawn = kind.draw(self.image_hw, self._random(_BACKGROUND, *key))
            canvas = np.ascontiguousarray(drawn.transpose(2, 0, 1), np.float32)
            self._last[:] = [name, (canvas, self._normalise(canvas))]
        kept: tuple[Pixels, Pixels] = self._last[1]
        return kept

    @property
    def grounds(self) -> tuple[Background, ...]:
        """The grounds, made of their names."""
        return self.backgrounds  # type: ignore[return-value]  # __post_init__ has made them

    def _look(self, thing: int, number: int, side: int) -> Pixels:
        """One look of an object, [4, side, side]: colour times opacity in [0, 255], opacity in [0, 1]."""
        if (look := self._looks.get((thing, number, side))) is None:
            look = self._looks[thing, number, side] = _resized(self._drawing(thing, number), side)
        return look

    def _drawing(self, thing: int, number: int) -> Picture:
        pictures = self.cutouts.pictures[thing]
        first = int(self._random(_DRAWING, thing).integers(len(pictures)))
        picture = pictures[(first + number) % len(pictures)]
        if number < len(pictures):
            return picture
        from PIL import Image as image_module

        angle = self._random(_DRAWING, thing, number).uniform(-_TURN, _TURN)
        turned = image_module.fromarray(picture).rotate(angle, image_module.Resampling.BICUBIC, expand=True)
        return squared(np.asarray(turned), self.cutouts.names[thing])

    def _random(self, purpose: int, *key: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, purpose, *key))


def _resized(picture: Picture, side: int) -> Pixels:
    """Colours are multiplied by opacity first, so that what is transparent does not bleed into edges."""
    values = picture.transpose(2, 0, 1).astype(np.float32)
    values[3] /= 255
    values[:3] *= values[3]
    resized = F.interpolate(torch.from_numpy(values)[None], (side, side), mode="bilinear", antialias=True)
    look: Pixels = resized[0].clamp(min=0).numpy()
    return look
