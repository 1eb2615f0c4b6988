"""A lock on the test split: its labels may be counted, its images are read during an evaluation only."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from capt.data.image_set import ImagesT, Splits
from capt.data.sources import ImageSource
from capt.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

SplitsT = TypeVar("SplitsT", bound="Splits[Any]")


class TestLock:
    """Shut until :meth:`opened`; shared by everything that is cut from the locked splits."""

    __test__ = False  # not a test class, whatever its name

    def __init__(self) -> None:
        self.is_open = False

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Let test images be read inside the block."""
        self.is_open = True
        try:
            yield
        finally:
            self.is_open = False


@dataclass(frozen=True)
class LockedSource:
    """An image source that refuses to read while ``lock`` is shut."""

    source: ImageSource
    lock: TestLock

    def read(self, name: str) -> bytes | Image.Image:
        """The image, if the lock is open.

        Raises:
            DataError: it is not.
        """
        if not self.lock.is_open:
            raise DataError(
                f"test image '{name}': the test split is locked; only an evaluation opens it. Train and choose "
                "settings on training or validation images"
            )
        return self.source.read(name)


def lock_images(images: ImagesT, lock: TestLock) -> ImagesT:
    """The same images behind ``lock``."""
    return images.with_source(LockedSource(images.source, lock))


def lock_test(data: SplitsT, lock: TestLock) -> SplitsT:
    """The same data set with its test split behind ``lock``."""
    return data if data.test is None else replace(data, test=lock_images(data.test, lock))
