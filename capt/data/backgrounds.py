"""Grounds that objects are pasted on: plain, noisy, shaded, textured, or a user's photographs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt.data.decode import EXTENSIONS, decode_image
from capt.errors import CaptError, DataError

Canvas = NDArray[np.uint8]
#: Draws uint8 [height, width, 3] from a size (height, width) and a generator.
Draw = Callable[[tuple[int, int], np.random.Generator], Canvas]


@dataclass(frozen=True)
class Background:
    """A kind of ground.

    Attributes:
        name: for records.
        draw: makes one canvas, uint8 [height, width, 3], from its (height, width) and a numpy generator.
        random: whether two generators give two canvases.
    """

    name: str
    draw: Draw
    random: bool = True


def background(which: str | Path | Background) -> Background:
    """A ground by name, or photographs from an image file or a folder of them.

    Names: "grey" (128), "white", "noise" (smooth clouds of grey, mean 128, standard deviation 20), "gradient" (between
    two greys, in any direction), "texture" (coloured waves). A path, which needs a "/" or an image's ending where it is
    given as text, stands for photographs: one is drawn, and of it the largest random cut of the right shape is used.

    Raises:
        CaptError: no such name.
        DataError: no such file, or a folder without images.
    """
    if isinstance(which, Background):
        return which
    if isinstance(which, str) and which in _NAMED:
        return _NAMED[which]
    if isinstance(which, str) and "/" not in which and Path(which).suffix.lower() not in EXTENSIONS:
        raise CaptError(f"background: {which!r} is none of {', '.join(_NAMED)}, nor the path of a photograph or folder")
    return _photographs(Path(which))


def _plain(level: int) -> Draw:
    return lambda hw, _: np.full((*hw, 3), level, np.uint8)


def _noise(hw: tuple[int, int], generator: np.random.Generator) -> Canvas:
    """Gaussian noise, blurred over 1/32 of the shorter side; its contrast is restored after the blur."""
    frequencies = np.fft.fftfreq(hw[0])[:, None] ** 2 + np.fft.rfftfreq(hw[1])[None] ** 2
    blur = np.exp(-2 * (math.pi * min(hw) / 32) ** 2 * frequencies)
    field = np.fft.irfft2(np.fft.rfft2(generator.standard_normal(hw)) * blur, hw)
    return _pixels((128 + 20 * (field - field.mean()) / field.std())[..., None].repeat(3, 2))


def _gradient(hw: tuple[int, int], generator: np.random.Generator) -> Canvas:
    angle, (low, high) = generator.uniform(0, 2 * math.pi), np.sort(generator.uniform(48, 208, 2))
    y, x = _axes(hw)
    along = x * math.cos(angle) + y * math.sin(angle)
    along = (along - along.min()) / (along.max() - along.min())
    return _pixels((low + (high - low) * along)[..., None].repeat(3, 2))


def _texture(hw: tuple[int, int], generator: np.random.Generator) -> Canvas:
    y, x = _axes(hw)
    values = generator.uniform(96, 160, 3) + np.zeros((*hw, 3))
    for _ in range(6):
        angle, waves, phase = generator.uniform(0, (2 * math.pi, 12, 2 * math.pi))
        wave = np.sin(math.pi * (2 + waves) * (x * math.cos(angle) + y * math.sin(angle)) + phase)
        values += wave[..., None] * generator.normal(0, 12, 3)
    return _pixels(values)


def _axes(hw: tuple[int, int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rows, columns = (np.linspace(-1, 1, side) for side in hw)
    return rows[:, None], columns[None]


def _pixels(values: NDArray[Any]) -> Canvas:
    return np.asarray(np.rint(values.clip(0, 255)), np.uint8)


def _photographs(path: Path) -> Background:
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    files = [file for file in files if file.suffix.lower() in EXTENSIONS and file.is_file()]
    if not files:
        raise DataError(f"'{path}': found no image; expected a photograph or a folder of them")

    def draw(hw: tuple[int, int], generator: np.random.Generator) -> Canvas:
        file = files[int(generator.integers(len(files)))]
        image = decode_image(file.read_bytes(), file.name)
        scale = min(image.height / hw[0], image.width / hw[1])
        height, width = hw[0] * scale, hw[1] * scale
        top, left = generator.uniform(0, 1, 2) * (image.height - height, image.width - width)
        return np.asarray(image.resize((hw[1], hw[0]), box=(left, top, left + width, top + height)))

    return Background(f"photographs in {path.name}", draw)


_NAMED = {
    "grey": Background("grey", _plain(128), random=False),
    "white": Background("white", _plain(255), random=False),
    "noise": Background("noise", _noise),
    "gradient": Background("gradient", _gradient),
    "texture": Background("texture", _texture),
}
