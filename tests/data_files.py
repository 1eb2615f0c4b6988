"""Small images, folders and archives for the tests of capt.data."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image


def picture(value: int = 128, size: tuple[int, int] = (8, 6)) -> Image.Image:
    return Image.fromarray(np.full((size[1], size[0], 3), value, dtype=np.uint8))


def image_bytes(value: int = 128, format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    picture(value).save(stream, format, **options)
    return stream.getvalue()


def save(path: Path, value: int = 128) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(value).save(path)
    return path


def folders(root: Path, layout: dict[str, int]) -> Path:
    """``{"train/cat": 3}`` makes root/train/cat/{0,1,2}.png."""
    for number, (folder, count) in enumerate(layout.items()):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            save(root / folder / f"{index}.png", (40 * number + index) % 256)
    return root


def member(name: str, content: bytes = b"", type: bytes = tarfile.REGTYPE, link: str = "") -> tuple:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), type, link
    return info, io.BytesIO(content)


def tar(path: Path, *members: tuple) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for info, content in members:
            archive.addfile(info, content)
    return path


def shard(path: Path, labels: list[int], first: int = 0) -> Path:
    members = []
    for number, label in enumerate(labels, start=first):
        members += [
            member(f"{number:04d}.webp", image_bytes(number, "WEBP")),
            member(f"{number:04d}.cls", b"%d" % label),
        ]
    return tar(path, *members)


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
