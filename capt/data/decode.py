"""From the bytes of an image file to RGB pixels, by one stated policy.

EXIF orientation is applied; transparency is laid on white; palette, grey, CMYK and YCbCr become RGB; 16-bit
grey keeps its high byte; of an animation the first frame counts. Refused: anything that is no image in a
common format, files cut short, pictures over 200 megapixels, 32-bit pixels (their range is not defined).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from capt.errors import DataError, MissingDependencyError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 200_000_000
MAX_FILE_BYTES = 1 << 29
EXTENSIONS = frozenset(
    (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif")
)

# Never EPS, PDF and their like: Pillow hands some of them to external programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")
_ORIENTATION_TAG = 0x0112
_WAY_OUT = "Replace or remove the file, or pass on_bad_image='skip' to go on without it."


@functools.cache
def _pillow() -> tuple[Any, tuple[str, ...]]:
    try:
        from PIL import Image
    except ImportError:
        raise MissingDependencyError("pillow", "reading images", "images") from None
    Image.init()
    return Image, tuple(name for name in _FORMATS if name in Image.OPEN)


def bad_image(name: str, reason: str) -> DataError:
    """The error every unusable image ends in."""
    return DataError(f"image {name!r}: {reason}. {_WAY_OUT}")


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode an image file.

    Args:
        data: the whole file.
        name: what to call it in messages.

    Returns:
        PIL image of mode RGB, upright.

    Raises:
        DataError: empty, cut short, not an image, or too large.
    """
    return _decoded(data, name, to_rgb)


def decode_rgba(data: bytes, name: str) -> Image.Image:
    """Decode an image file as mode RGBA, upright, its transparency kept; raises as :func:`decode_image`."""
    return _decoded(data, name, lambda image, _: image.convert("RGBA"))


def _decoded(data: bytes, name: str, convert: Callable[[Image.Image, str], Image.Image]) -> Image.Image:
    image_module, formats = _pillow()
    if not data:
        raise bad_image(name, "the file is empty")
    try:
        with image_module.open(io.BytesIO(data), formats=formats) as opened:
            width, height = opened.size
            if width * height > MAX_PIXELS:
                raise bad_image(
                    name, f"{width} x {height} is {width * height:,} pixels, more than the limit {MAX_PIXELS:,}"
                )
            opened.load()
            return _upright(convert(opened, name), _orientation(opened))
    except (DataError, MemoryError):
        raise
    except image_module.DecompressionBombError as error:
        raise bad_image(name, f"too many pixels ({error})") from error
    except image_module.UnidentifiedImageError:
        raise bad_image(name, f"not an image in a known format ({', '.join(formats)}; {_first_bytes(data)})") from None
    except Exception as error:  # parsers of hostile files raise nearly anything; it all means the same here
        raise bad_image(name, f"damaged or cut short ({type(error).__name__}: {error})") from error


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """The image as mode RGB; orientation is not touched.

    Raises:
        DataError: 32-bit integer or float pixels.
    """
    image_module, _ = _pillow()
    mode = image.mode
    if mode == "RGB" and "transparency" not in image.info:
        return image.copy()
    if mode.startswith("I;16") or mode == "I":
        values = np.asarray(image)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise bad_image(name, "its pixels are 32-bit integers, whose range is not defined")
        image = image_module.fromarray((values >> 8).astype(np.uint8))
        return image.convert("RGB")
    if mode == "F":
        raise bad_image(name, "its pixels are floating-point numbers, whose range is not defined")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = image_module.alpha_composite(image_module.new("RGBA", layer.size, (255, 255, 255, 255)), layer)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # junk in the EXIF block does not make the pixels bad
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    image_module, _ = _pillow()
    turn = image_module.Transpose
    undo = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }.get(orientation)
    return image if undo is None else image.transpose(undo)


def _first_bytes(data: bytes) -> str:
    return f"{len(data):,} bytes beginning with {data[:12]!r}"
