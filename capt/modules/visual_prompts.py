"""Visual prompts: marks in a picture that point an image tower at a region. Nothing is trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.errors import CaptError
from capt.modules.pooling_replacements import resized

Marker = Literal["circle", "box", "blur", "grey", "darken", "crop", "frame"]
MARKERS: tuple[Marker, ...] = get_args(Marker)
RED = (1.0, 0.0, 0.0)

_GROWN = 0.01  # of the shorter side, on every side of the box
_PIXELS_PER_STROKE = 168
_BLUR = 0.3  # standard deviation, of the shorter side
_DIMMED = 0.3
_CONTEXT = 0.25  # of the box, on every side, that a crop keeps
_LUMA = (0.299, 0.587, 0.114)

# Source: circles, blurred and grey surroundings after arXiv 2304.06712; sizes, "darken", "crop" and "frame": ours.


def marked(images: Tensor, boxes: Tensor, marker: Marker, *, colour: Sequence[float] = RED) -> Tensor:
    """Pictures with a mark each, [B, 3, height, width].

    "circle": outline of the ellipse in the box, which is grown by 1 % of the picture's side; "box": outline of the
    box; "blur", "grey", "darken": what is outside of the ellipse is blurred, desaturated or dimmed; "crop": the box
    and a quarter of it on each side, resized; "frame": four circles in the corners, whatever the box.

    Args:
        images: float, pixels in [0, 1]: mark after resizing and before normalisation.
        boxes: [B, 4], left, top, right, bottom in pixels.
        marker: see above.
        colour: of strokes, red, green, blue in [0, 1].

    Raises:
        CaptError: an unknown marker, a box without area or boxes that do not fit the images.
    """
    if marker not in MARKERS:
        raise CaptError(f"marker: found {marker!r}, expected one of {', '.join(MARKERS)}")
    if images.ndim != 4 or images.shape[1] != 3 or boxes.shape != (len(images), 4):
        raise CaptError(
            f"boxes: found {list(boxes.shape)} for images {list(images.shape)}, expected [B, 4] for [B, 3, height, "
            "width]: left, top, right and bottom of each image's region in pixels"
        )
    boxes = boxes.to(images.device, torch.float32)  # half precision has no pixel 257
    if not bool((boxes[:, 2:] > boxes[:, :2]).all()):
        raise CaptError("boxes: one has no area; right must be beyond left, and bottom below top")
    if marker == "crop":
        return torch.cat([_crop(image[None], box) for image, box in zip(images, boxes, strict=True)])
    if marker == "frame":
        drawn = torch.zeros_like(images[:, :1], dtype=torch.bool)
        for corner in _corners(images):
            drawn |= _outline(images, corner.expand(len(images), 4), round_=True)
        return _painted(images, drawn, colour)
    boxes = _grown(boxes, images)
    if marker in ("circle", "box"):
        return _painted(images, _outline(images, boxes, round_=marker == "circle"), colour)
    other = {"blur": _blurred, "grey": _desaturated, "darken": lambda x: x * _DIMMED}[marker](images)
    return torch.where(_inside(images, boxes, round_=True), images, other)


def marked_normalised(
    images: Tensor, boxes: Tensor, marker: Marker, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """The same for images [B, 3, height, width] that are normalised already, with their mean and std."""
    shift, scale = (torch.tensor(list(values)).to(images).view(1, 3, 1, 1) for values in (mean, std))
    return (marked(images * scale + shift, boxes, marker) - shift) / scale


def stroke(images: Tensor) -> int:
    """Pixels across a line: one for every 168 of the shorter side."""
    return max(1, round(min(images.shape[2:]) / _PIXELS_PER_STROKE))


def _grown(boxes: Tensor, images: Tensor, by: float | Tensor | None = None) -> Tensor:
    more = _GROWN * min(images.shape[2:]) if by is None else by
    return torch.cat([boxes[:, :2] - more, boxes[:, 2:] + more], dim=1)


def _inside(images: Tensor, boxes: Tensor, *, round_: bool) -> Tensor:
    """bool [B, 1, height, width]: pixels whose middle is in the box, or in the ellipse that touches its sides."""
    y, x = (torch.arange(n, device=images.device) + 0.5 for n in images.shape[2:])
    left, top, right, bottom = (side[:, None, None, None] for side in boxes.unbind(1))
    across = (x - (left + right) / 2) / ((right - left) / 2).clamp_min(1e-6)
    down = (y[:, None] - (top + bottom) / 2) / ((bottom - top) / 2).clamp_min(1e-6)
    return across.square() + down.square() <= 1 if round_ else (across.abs() <= 1) & (down.abs() <= 1)


def _outline(images: Tensor, boxes: Tensor, *, round_: bool) -> Tensor:
    inner = _grown(boxes, images, -stroke(images))
    empty = (inner[:, 2:] <= inner[:, :2]).any(1)[:, None, None, None]
    return _inside(images, boxes, round_=round_) & (empty | ~_inside(images, inner, round_=round_))


def _painted(images: Tensor, where: Tensor, colour: Sequence[float]) -> Tensor:
    return torch.where(where, torch.tensor(list(colour)).to(images).view(1, 3, 1, 1), images)


def _blurred(images: Tensor) -> Tensor:
    """Gaussian blur, edges repeated; std 100 at 336 pixels."""
    std = _BLUR * min(images.shape[2:])
    blurred = images
    for axis in (2, 3):
        reach = min(round(3 * std), images.shape[axis] - 1)
        offsets = torch.arange(-reach, reach + 1).to(images)
        weights = torch.exp(-(offsets**2) / (2 * std**2))
        kernel = (
            (weights / weights.sum()).view(1, 1, -1, 1) if axis == 2 else (weights / weights.sum()).view(1, 1, 1, -1)
        )
        padding = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        blurred = F.conv2d(F.pad(blurred, padding, mode="replicate"), kernel.expand(3, 1, -1, -1), groups=3)
    return blurred


def _desaturated(images: Tensor) -> Tensor:
    luma = torch.tensor(_LUMA).to(images).view(1, 3, 1, 1)
    return (images * luma).sum(1, keepdim=True).expand_as(images)


def _crop(image: Tensor, box: Tensor) -> Tensor:
    height, width = image.shape[2:]
    more = _CONTEXT * (box[2:] - box[:2])
    left, top = (box[:2] - more).round().long().tolist()
    right, bottom = (box[2:] + more).round().long().tolist()
    window = image[:, :, max(0, top) : min(height, bottom), max(0, left) : min(width, right)]
    if 0 in window.shape:
        raise CaptError(f"boxes: {box.tolist()} lies outside of the picture of {height} x {width} pixels")
    return resized(window, height, width).clamp(0, 1)


def _corners(images: Tensor) -> Tensor:
    """Boxes [4, 1, 4] of a third of the picture in each corner."""
    height, width = images.shape[2:]
    h, w = height / 3, width / 3
    lefts, tops = (0.0, width - w), (0.0, height - h)
    boxes = [[left, top, left + w, top + h] for top in tops for left in lefts]
    return torch.tensor(boxes, device=images.device)[:, None]
