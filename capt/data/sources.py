"""Where the bytes of images come from: a folder, tar shards or memory."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from capt.data.decode import MAX_FILE_BYTES, bad_image
from capt.data.names import is_inside, safe_relative

if TYPE_CHECKING:
    from PIL import Image


class ImageSource(Protocol):
    """Finds an image by its name. Must be safe to call from several threads."""

    def read(self, name: str) -> bytes | Image.Image:
        """Bytes of the image file, or an image already in memory; DataError if it cannot be had."""
        ...


@dataclass(frozen=True)
class FolderSource:
    """Images are files below ``root``; links that lead out of it are refused.

    Args:
        root: folder the names are relative to.
        trusted: further folders links may lead into (published layouts map image folders by links).
        follow_links: accept links to anywhere.
    """

    root: Path
    trusted: tuple[Path, ...] = ()
    follow_links: bool = False
    _real_roots: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        real = tuple(os.path.realpath(folder) for folder in (self.root, *self.trusted))
        object.__setattr__(self, "_real_roots", real)

    def read(self, name: str) -> bytes:
        """Bytes of the file ``root/name``."""
        path = self.root / safe_relative(name, f"image {name!r}")
        if not self.follow_links and not is_inside(path, self._real_roots):
            raise bad_image(name, "a link that leads out of the folder of the data set (follow_links=True allows it)")
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise bad_image(name, "not a regular file")
            if status.st_size > MAX_FILE_BYTES:
                raise bad_image(name, f"{status.st_size:,} bytes, more than the limit {MAX_FILE_BYTES:,}")
            return path.read_bytes()
        except OSError as error:
            raise bad_image(name, f"cannot be read ({error.strerror or error})") from error


@dataclass(frozen=True)
class ShardSource:
    """Images are byte ranges of uncompressed tar files; nothing is extracted.

    Args:
        members: name -> (tar file, offset of the first byte, number of bytes).
    """

    members: Mapping[str, tuple[str, int, int]]

    def read(self, name: str) -> bytes:
        """Bytes of the member."""
        shard, offset, size = self.members[name]
        try:
            with open(shard, "rb") as stream:
                stream.seek(offset)
                data = stream.read(size)
        except OSError as error:
            raise bad_image(name, f"its shard cannot be read ({error.strerror or error})") from error
        if len(data) != size:
            raise bad_image(name, f"its shard {os.path.basename(shard)!r} became shorter since it was indexed")
        return data


@dataclass(frozen=True)
class MemorySource:
    """Images kept in memory, as PIL images or as the bytes of image files."""

    images: Mapping[str, Image.Image | bytes]

    def read(self, name: str) -> bytes | Image.Image:
        """The image."""
        return self.images[name]
