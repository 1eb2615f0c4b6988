"""Objects to paste into pictures: RGBA cut-outs with a name, as many pictures of each as there are.

Three origins: the emoji that ship with the package, simple drawn shapes, and folders of a user's own. Every picture is
cut to what is opaque and laid in the middle of a square, so that the side of the square is the size of the object.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from capt.data.decode import decode_rgba
from capt.data.names import class_list
from capt.data.readers.emoji import read_emoji
from capt.data.readers.folder import read_folder
from capt.errors import CaptError, DataError

if TYPE_CHECKING:
    from capt.data.image_set import ImageSet

Picture = NDArray[np.uint8]
FloatArray = NDArray[np.float64]

#: Opacity (of 255) from which a pixel belongs to the object's box.
_VISIBLE = 16
#: Darkest channel of a pixel of the white ground that shipped emoji lie on; WebP makes it a little uneven.
_WHITE = 248
#: An outline whose inner side is this bright may be white itself, so it cannot be told from the ground.
_BRIGHT, _BRIGHT_SHARE = 236, 0.1


@dataclass(frozen=True)
class Cutouts:
    """Named objects with an opacity of their own.

    Attributes:
        names: what each object is called in captions, [K].
        pictures: uint8 [side, side, 4] (RGBA) pictures of each object, at least one.
        origin: where they come from, for records.
    """

    names: tuple[str, ...]
    pictures: tuple[tuple[Picture, ...], ...]
    origin: str = "own"

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", class_list(self.names, "names"))
        if len(self.pictures) != len(self.names):
            raise DataError(
                f"pictures: found those of {len(self.pictures)} objects, expected {len(self.names)}, one tuple a name"
            )
        kept = []
        for name, pictures in zip(self.names, self.pictures, strict=True):
            if not pictures:
                raise DataError(f"pictures: the object {name!r} has none; give at least one or leave the object out")
            kept.append(tuple(squared(picture, name) for picture in pictures))
        object.__setattr__(self, "pictures", tuple(kept))

    def __len__(self) -> int:
        return len(self.names)

    def choose(self, indices: Sequence[int]) -> Cutouts:
        """Only some of the objects, in the order given."""
        return Cutouts(tuple(self.names[i] for i in indices), tuple(self.pictures[i] for i in indices), self.origin)

    def record(self) -> dict[str, Any]:
        """What belongs into a run record."""
        counts = [len(pictures) for pictures in self.pictures]
        return {"origin": self.origin, "names": list(self.names), "pictures": counts}


def squared(picture: Picture, name: str) -> Picture:
    """RGBA uint8 [H, W, 4] cut to what is visible, in the middle of the smallest square, uint8 [side, side, 4]."""
    if picture.ndim != 3 or picture.shape[2] != 4 or picture.dtype != np.uint8:
        raise DataError(
            f"pictures: found {picture.dtype} {list(picture.shape)} for {name!r}, expected uint8 [height, width, 4]"
        )
    rows, columns = ((picture[..., 3] >= _VISIBLE).any(axis) for axis in (1, 0))
    if not rows.any():
        raise DataError(f"pictures: a picture of {name!r} is transparent everywhere; there is nothing to paste")
    (top, bottom), (left, right) = (np.flatnonzero(line)[[0, -1]] + (0, 1) for line in (rows, columns))
    height, width = int(bottom - top), int(right - left)
    side = max(height, width)
    square = np.zeros((side, side, 4), np.uint8)
    y, x = (side - height) // 2, (side - width) // 2
    square[y : y + height, x : x + width] = picture[top:bottom, left:right]
    return square


# ---- shipped emoji ---------------------------------------------------------------------------------------------------


def emoji_cutouts(n: int = 20, *, seed: int = 0, names: Sequence[str] | None = None) -> Cutouts:
    """Objects cut out of the shipped emoji, each drawn by up to six vendors.

    The emoji were stored on white. What is white and connected to the border becomes transparent; drawings whose
    outline is itself nearly white cannot be cut that way and are left out, and so are objects with fewer than three
    drawings left.

    Args:
        n: number of objects, drawn at random from those that share no word in their names.
        seed: of that draw.
        names: take these objects instead.

    Raises:
        DataError: ``names`` has one that is not shipped or cannot be cut out; more objects than there are.
    """
    data = read_emoji(verify=False)
    splits = list(data.splits().values())
    found: dict[str, tuple[Picture, ...]] = {}
    order = [data.classes[i] for i in np.random.default_rng(seed).permutation(len(data.classes))]
    taken: set[str] = set()
    if n > len(order):
        raise DataError(f"n: {n} objects asked for, but only {len(order)} emoji are shipped")
    for name in order if names is None else names:
        if name not in data.classes:
            raise DataError(f"names: no shipped emoji is called {name!r}; see the classes of capt.data.load('emoji')")
        if names is None and (len(found) == n or taken & set(name.split())):
            continue
        pictures = _vendor_cutouts(splits, data.classes.index(name))
        if len(pictures) < 3:
            if names is None:
                continue
            raise DataError(f"names: the outline of {name!r} is too bright to be told from the white ground")
        found[name] = pictures
        taken |= set(name.split())
    if names is None and len(found) < n:
        raise DataError(f"n: {n} objects asked for, but only {len(found)} emoji can be cut out and share no word")
    return Cutouts(tuple(found), tuple(found.values()), "emoji")


@functools.cache
def emoji_names() -> tuple[str, ...]:
    """Names of all shipped emoji, whether they can be cut out or not."""
    return read_emoji(verify=False).classes


def _vendor_cutouts(splits: Sequence[ImageSet], label: int) -> tuple[Picture, ...]:
    cut = (
        _off_white(np.asarray(images.image(int(index))))
        for images in splits
        for index in np.flatnonzero(images.labels == label)
    )
    return tuple(picture for picture in cut if picture is not None)


def _off_white(pixels: Picture) -> Picture | None:
    """RGBA of a drawing on white, or None where its outline cannot be told from the ground; uint8 [H, W, 3] in."""
    darkest = pixels.min(2)
    ground = _connected_to_border(darkest >= _WHITE)
    # Smoothed edges are mixtures with white: one pixel less of the object keeps the bright rim out.
    ground = _grown(ground)
    inside = _grown(_grown(ground)) & ~ground
    if ground.all() or (darkest[inside] >= _BRIGHT).mean() > _BRIGHT_SHARE:
        return None
    return np.dstack([pixels, np.where(ground, 0, 255).astype(np.uint8)])


def _grown(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The mask and its four neighbours; True outside of the picture."""
    padded = np.pad(mask, 1, constant_values=True)
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _connected_to_border(open_to: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels reached from the border through pixels that are ``open_to`` it, by sweeps in the four directions."""
    reached = np.zeros_like(open_to)
    reached[[0, -1]], reached[:, [0, -1]] = open_to[[0, -1]], open_to[:, [0, -1]]
    count = -1
    while count != (count := int(reached.sum())):
        for view, free in ((reached, open_to), (reached.T, open_to.T)):
            for lines in (range(1, len(view)), range(len(view) - 2, -1, -1)):
                step = -1 if lines.step > 0 else 1
                for line in lines:
                    view[line] |= view[line + step] & free[line]
    return reached


# ---- own folders -----------------------------------------------------------------------------------------------------


def read_cutouts(folder: str | Path) -> Cutouts:
    """Cut-outs from a folder with one sub-folder per object, holding pictures with transparency (PNG, WebP).

    Raises:
        DataError: no sub-folder, no usable picture, or a picture without any transparent pixel.
    """
    data = read_folder(folder, layout="plain")
    pictures: list[list[Picture]] = [[] for _ in data.classes]
    for name, label in zip(data.train.names, data.train.labels, strict=True):
        content = data.train.source.read(name)
        assert isinstance(content, bytes)
        picture = np.asarray(decode_rgba(content, name))
        if (picture[..., 3] == 255).all():
            raise DataError(
                f"image {name!r}: expected a cut-out with a transparent ground, found an opaque picture. Remove its "
                "background and save it as PNG or WebP."
            )
        pictures[int(label)].append(picture)
    return Cutouts(data.classes, tuple(map(tuple, pictures)), "folder")


# ---- drawn shapes ----------------------------------------------------------------------------------------------------

_COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (245, 210, 40),
    "purple": (140, 50, 180),
    "orange": (245, 140, 30),
    "black": (20, 20, 20),
    "white": (250, 250, 250),
}
_SHAPE_SIDE = 128
_OVERSAMPLING = 4


def _polygon(x: FloatArray, y: FloatArray, corners: Sequence[tuple[float, float]]) -> NDArray[np.bool_]:
    """Even-odd rule."""
    inside = np.zeros(x.shape, bool)
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        if y0 != y1:
            inside ^= ((y0 > y) != (y1 > y)) & (x < x0 + (x1 - x0) * (y - y0) / (y1 - y0))
    return inside


def _star(x: FloatArray, y: FloatArray) -> NDArray[np.bool_]:
    angles = np.pi / 5 * np.arange(10)
    radii = np.where(np.arange(10) % 2, 0.382, 1.0)
    return _polygon(x, y, list(zip(radii * np.sin(angles), -radii * np.cos(angles), strict=True)))


_SHAPES: dict[str, Callable[[FloatArray, FloatArray], NDArray[np.bool_]]] = {
    "circle": lambda x, y: np.hypot(x, y) <= 1,
    "square": lambda x, y: np.maximum(abs(x), abs(y)) <= 1,
    "triangle": lambda x, y: _polygon(x, y, [(-1, 0.87), (1, 0.87), (0, -0.87)]),
    "star": _star,
    "heart": lambda x, y: ((1.15 * x) ** 2 + (0.1 - 1.15 * y) ** 2 - 1) ** 3 <= (1.15 * x) ** 2 * (0.1 - 1.15 * y) ** 3,
    "cross": lambda x, y: np.minimum(abs(x), abs(y)) <= 1 / 3,
    "ring": lambda x, y: abs(np.hypot(x, y) - 0.8) <= 0.2,
    "crescent": lambda x, y: (np.hypot(x, y) <= 1) & (np.hypot(x - 0.45, y) > 0.8),
}


def drawn_shapes(n: int | None = None, *, seed: int = 0, without: Sequence[str] = ()) -> Cutouts:
    """Drawn objects called "<colour> <shape>": eight colours, eight shapes.

    Args:
        n: number of objects, drawn at random; all of them by default.
        seed: of that draw.
        without: colours and shapes to leave out, such as ("red", "circle", "ring") when red circles are a marker, or
            ("white",) on white.

    Raises:
        CaptError: an unknown word in ``without``, or more objects than are left.
    """
    for word in without:
        if word not in _COLOURS and word not in _SHAPES:
            raise CaptError(f"without: {word!r} is none of {', '.join([*_COLOURS, *_SHAPES])}")
    pairs = [(c, s) for s in _SHAPES for c in _COLOURS if c not in without and s not in without]
    n = len(pairs) if n is None else n
    if not 1 <= n <= len(pairs):
        raise CaptError(f"n: found {n}, expected 1 to {len(pairs)}, the shapes that are left")
    chosen = [pairs[i] for i in np.random.default_rng(seed).permutation(len(pairs))[:n]]
    return Cutouts(
        tuple(f"{colour} {shape}" for colour, shape in chosen),
        tuple((_drawn(colour, shape),) for colour, shape in chosen),
        "drawn shapes",
    )


@functools.cache
def _drawn(colour: str, shape: str) -> Picture:
    """Drawn large and averaged down, so that edges are smooth."""
    side = _SHAPE_SIDE * _OVERSAMPLING
    axis = (np.arange(side) + 0.5) / side * 2 - 1
    inside = _SHAPES[shape](axis[None].repeat(side, 0), axis[:, None].repeat(side, 1))
    opacity = inside.reshape(_SHAPE_SIDE, _OVERSAMPLING, _SHAPE_SIDE, _OVERSAMPLING).mean((1, 3))
    picture = np.empty((_SHAPE_SIDE, _SHAPE_SIDE, 4), np.uint8)
    picture[..., :3] = _COLOURS[colour]
    picture[..., 3] = np.rint(opacity * 255)
    return picture
