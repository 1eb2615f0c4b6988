"""What every kind of image file becomes: documented pixels, or an error that names the file."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from capt.data import decode
from capt.data.decode import decode_image
from capt.errors import DataError
from tests.data_files import image_bytes, picture

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL.TiffImagePlugin")  # about the files damaged on purpose


def encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def pixels(data: bytes) -> np.ndarray:
    image = decode_image(data, "x")
    assert image.mode == "RGB"
    return np.asarray(image)


def png(width: int, height: int, bits: int = 8, colour: int = 2) -> bytes:
    """A PNG that declares a size and has no pixels to speak of."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "WEBP", "BMP", "TIFF", "PPM"])
def test_lossless_formats_give_their_pixels(format):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    options = {"lossless": True} if format == "WEBP" else {}
    assert np.array_equal(pixels(encode(image, format, **options)), np.asarray(image))


def test_jpeg_and_gif():
    assert np.abs(pixels(image_bytes(100, "JPEG")).astype(int) - 100).max() <= 2
    assert (pixels(image_bytes(100, "GIF")) == 100).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 2, 3) * 10)
    # Columns and rows as the EXIF standard defines where row 0 and column 0 of the stored picture belong.
    back = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1),
        6: lambda a: a.swapaxes(0, 1)[::-1],
        7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: a.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    stored = Image.fromarray(np.ascontiguousarray(back(np.asarray(upright))))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(pixels(encode(stored, exif=exif)), np.asarray(upright))


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_impossible_orientation_is_ignored(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert pixels(encode(picture(), exif=exif)).shape == (6, 8, 3)


def test_junk_in_exif_does_not_make_pixels_bad():
    assert (pixels(encode(picture(7), exif=b"Exif\0\0MM\0*\xff\xff\xff\xffjunk")) == 7).all()


def test_transparency_is_laid_on_white():
    layer = np.zeros((1, 3, 4), dtype=np.uint8)
    layer[0, :, 3] = (0, 51, 255)
    assert pixels(encode(Image.fromarray(layer)))[0, :, 0].tolist() == [255, 204, 0]


def test_grey_with_alpha_is_laid_on_white():
    layer = np.array([[[10, 0], [10, 255]]], dtype=np.uint8)
    assert pixels(encode(Image.fromarray(layer, "LA")))[0, :, 1].tolist() == [255, 10]


def test_palette_and_palette_with_transparent_entry():
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 100, 0])
    image.putpixel((1, 0), 1)
    assert pixels(encode(image)).tolist() == [[[200, 0, 0], [0, 100, 0]]]
    assert pixels(encode(image, transparency=1)).tolist() == [[[200, 0, 0], [255, 255, 255]]]


def test_rgb_with_a_transparent_colour():
    image = Image.fromarray(np.array([[[1, 2, 3], [9, 9, 9]]], dtype=np.uint8))
    assert pixels(encode(image, transparency=(1, 2, 3))).tolist() == [[[255, 255, 255], [9, 9, 9]]]


@pytest.mark.parametrize(("mode", "colour", "expected"), [("1", 1, 255), ("L", 77, 77)])
def test_grey(mode, colour, expected):
    assert (pixels(encode(Image.new(mode, (3, 2), colour))) == expected).all()


def test_sixteen_bit_grey_keeps_the_high_byte():
    values = np.array([[0, 255, 256, 0x8000, 0xFFFF]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        assert pixels(encode(Image.fromarray(values), format))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_cmyk():
    image = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    assert (pixels(encode(image, "TIFF")) == 255).all() and (pixels(encode(image, "JPEG")) > 250).all()


def test_first_frame_of_an_animation():
    frames = [picture(10), picture(200)]
    data = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(data) == 10).all()


@pytest.mark.parametrize("size", [(1, 1), (65_535, 1), (1, 65_535)])
def test_extreme_shapes(size):
    assert pixels(encode(picture(3, size))).shape == (size[1], size[0], 3)


BAD = {
    "empty": b"",
    "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "html": b"<!doctype html><script>alert(1)</script>",
    "text": b"not found",
    "zip": b"PK\x03\x04" + bytes(60),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "signature only": b"\x89PNG\r\n\x1a\n",
    "bomb": png(20_000, 10_001),
    "huge bomb": png(2**31 - 1, 2**31 - 1),
    "no pixels": png(10, 10),
    "zero width": png(0, 10),
    "float": encode(Image.fromarray(np.zeros((2, 2), dtype=np.float32)), "TIFF"),
    "32 bit": encode(Image.fromarray(np.full((2, 2), 70_000, dtype=np.int32)), "TIFF"),
    "negative": encode(Image.fromarray(np.full((2, 2), -1, dtype=np.int32)), "TIFF"),
}


@pytest.mark.parametrize("data", BAD.values(), ids=BAD)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bad_file_is_named_with_a_way_out(data):
    with pytest.raises(DataError, match=r"image 'a/b\.png': .*on_bad_image='skip'"):
        decode_image(data, "a/b.png")


@pytest.mark.parametrize("format", ["PCX", "TGA", "ICO", "EPS"])
def test_formats_that_are_not_on_the_list_are_not_even_tried(format):
    with pytest.raises(DataError, match="not an image in a known format"):
        decode_image(encode(picture(size=(16, 16)), format), "x")


def test_limit_is_on_pixels(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 48)
    assert decode_image(encode(picture()), "x").size == (8, 6)
    monkeypatch.setattr(decode, "MAX_PIXELS", 47)
    with pytest.raises(DataError, match=r"8 x 6 is 48 pixels"):
        decode_image(encode(picture()), "x")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_file_cut_short_is_bad(format, part):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, format)
    assert decode_image(data, "x").size == (64, 64)
    with pytest.raises(DataError, match="'x'"):
        decode_image(data[: int(len(data) * part)], "x")


def test_random_damage_gives_an_image_or_a_data_error():
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    refused = 0
    for format in ("JPEG", "PNG", "WEBP", "GIF", "TIFF"):
        original = np.frombuffer(encode(noise, format), dtype=np.uint8)
        for _ in range(60):
            data = original.copy()
            data[rng.integers(0, len(data), 4)] = rng.integers(0, 256, 4, dtype=np.uint8)
            try:
                assert decode_image(data.tobytes(), "x").mode == "RGB"
            except DataError:
                refused += 1
    assert refused > 60


def test_control_characters_in_a_name_are_escaped():
    with pytest.raises(DataError) as caught:
        decode_image(b"", "a\n\x1b[31m.png")
    assert "\n" not in str(caught.value) and "\x1b" not in str(caught.value)
