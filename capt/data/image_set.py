"""Labelled images: one split (:class:`ImageSet`) and a whole data set (:class:`DataSet`).

:class:`Images` and :class:`Splits` are what these share with data whose images have several labels.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capt.data.decode import decode_image, to_rgb
from capt.data.names import class_list
from capt.data.sources import ImageSource, MemorySource
from capt.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

SPLITS = ("train", "val", "test")
ImagesT = TypeVar("ImagesT", bound="Images")


class Images:
    """Images with labels of some form; what every kind of labelled images has.

    Attributes:
        classes: class names, [C].
        labels: one row an image, [N, ...]. Read-only.
        ids: int64 [N], unique in the data set and the same in all of its subsets. Read-only.
        names: relative path of each image, unique, length N.
        sources: where each image comes from (shipped emoji: the vendor), length N, or None.
        meta: what is worth recording about how this set was made.
    """

    labels: NDArray[Any]

    def __init__(
        self,
        classes: Sequence[str],
        labels: ArrayLike,
        ids: ArrayLike,
        names: Sequence[str],
        source: ImageSource,
        *,
        sources: Sequence[str] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.classes = tuple(classes)
        self.ids = frozen(ids, "ids")
        self.names = list(names)
        self.labels = self._checked(labels)
        self.sources = None if sources is None else list(sources)
        self.source = source
        self.meta = dict(meta or {})
        n_images = len(self.names)
        if self.ids.shape != (n_images,):
            raise DataError(f"ids: found shape {self.ids.shape}, expected [{n_images}], one for each name")
        if self.sources is not None and len(self.sources) != n_images:
            raise DataError(f"sources: found {len(self.sources)}, expected {n_images}, one for each name")
        if len(np.unique(self.ids)) != n_images:
            raise DataError("ids: an id is given to two images; ids must be unique")

    def _checked(self, labels: ArrayLike) -> NDArray[Any]:
        """The labels as they are kept, read-only; DataError if they do not fit names and classes."""
        raise TypeError(f"{type(self).__name__} does not say what its labels are")

    def _label_bytes(self) -> bytes:
        return self.labels.astype("<i8").tobytes()

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} images, {len(self.classes)} classes)"

    def image(self, index: int) -> Image.Image:
        """The image at ``index``, decoded: PIL, RGB, upright.

        Raises:
            DataError: the file is missing or is no complete image; names it.
        """
        name = self.names[index]
        content = self.source.read(name)
        return decode_image(content, name) if isinstance(content, bytes) else to_rgb(content, name)

    def subset(self, indices: ArrayLike, *, meta: Mapping[str, Any] | None = None) -> Self:
        """The images at ``indices`` (int [M], or bool [N]), in that order, with their ids and the same classes."""
        chosen = np.asarray(indices)
        if chosen.dtype == np.bool_:
            if chosen.shape != (len(self),):
                raise DataError(f"indices: found a mask of shape {chosen.shape}, expected [{len(self)}]")
            chosen = np.flatnonzero(chosen)
        if chosen.size == 0:
            chosen = np.zeros(0, dtype=np.int64)
        if chosen.ndim != 1 or not np.issubdtype(chosen.dtype, np.integer):
            raise DataError(f"indices: found {chosen.dtype} {list(chosen.shape)}, expected int64 [M] or bool [N]")
        if chosen.size and (chosen.min() < 0 or chosen.max() >= len(self)):
            raise DataError(f"indices: found {chosen.min()} to {chosen.max()}, expected 0 to {len(self) - 1}")
        return type(self)(
            self.classes,
            self.labels[chosen],
            self.ids[chosen],
            [self.names[i] for i in chosen],
            self.source,
            sources=None if self.sources is None else [self.sources[i] for i in chosen],
            meta={**self.meta, **(meta or {})},
        )

    def fingerprint(self, content: bool = False) -> str:
        """32 hexadecimal digits (BLAKE2b) of class names, labels, ids and image names, in order.

        Args:
            content: hash the bytes of every image file as well; reads them all.
        """
        digest = hashlib.blake2b(digest_size=16)
        names = [unicodedata.normalize("NFC", name) for name in self.names]
        digest.update(json.dumps([self.classes, names]).encode())
        digest.update(self._label_bytes())
        digest.update(self.ids.astype("<i8").tobytes())
        if content:
            for name in self.names:
                data = self.source.read(name)
                digest.update(hashlib.blake2b(data if isinstance(data, bytes) else data.tobytes()).digest())
        return digest.hexdigest()

    def with_source(self, source: ImageSource) -> Self:
        """The same images, read from ``source``."""
        return type(self)(self.classes, self.labels, self.ids, self.names, source, sources=self.sources, meta=self.meta)


class ImageSet(Images):
    """Images with one label each: ``labels`` is int64 [N], positions in ``classes``."""

    def _checked(self, labels: ArrayLike) -> NDArray[np.int64]:
        kept = frozen(labels, "labels")
        if kept.shape != (len(self.names),):
            raise DataError(f"labels: found shape {kept.shape}, expected [{len(self.names)}], one for each name")
        if kept.size and not (kept.min() >= 0 and kept.max() < len(self.classes)):
            raise DataError(
                f"labels: found {kept.min()} to {kept.max()}, expected 0 to {len(self.classes) - 1} "
                f"for {len(self.classes)} classes"
            )
        return kept

    @classmethod
    def from_images(cls, images: Sequence[Image.Image], labels: ArrayLike, classes: Sequence[str]) -> ImageSet:
        """A set from PIL images in memory; they are named and numbered 0, 1, 2, ..."""
        names = [str(number) for number in range(len(images))]
        source = MemorySource(dict(zip(names, images, strict=True)))
        return cls(class_list(classes, "classes"), labels, np.arange(len(names)), names, source)

    def select_classes(self, class_ids: Sequence[int], relabel: bool = True) -> ImageSet:
        """Only the images of some classes, in their present order.

        Args:
            class_ids: labels to keep; with ``relabel`` the i-th of them becomes label i.
            relabel: False keeps labels and class names as they are.
        """
        wanted = [int(label) for label in class_ids]
        if len(set(wanted)) != len(wanted):
            raise DataError("class_ids: a class is given twice")
        if wanted and not (min(wanted) >= 0 and max(wanted) < len(self.classes)):
            raise DataError(f"class_ids: found {min(wanted)} to {max(wanted)}, expected 0 to {len(self.classes) - 1}")
        new_label = np.full(len(self.classes), -1, dtype=np.int64)
        new_label[wanted] = np.arange(len(wanted))
        kept = self.subset(new_label[self.labels] >= 0)
        if not relabel:
            return kept
        return ImageSet(
            [self.classes[label] for label in wanted],
            new_label[kept.labels],
            kept.ids,
            kept.names,
            self.source,
            sources=kept.sources,
            meta=kept.meta,
        )

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Images of each class, int64 [C]."""
        return np.bincount(self.labels, minlength=len(self.classes)).astype(np.int64)


@dataclass(frozen=True)
class Splits(Generic[ImagesT]):
    """A data set: up to three splits over one list of classes.

    Attributes:
        name: what to call it.
        train, val, test: its splits; ``train`` may be empty, the others may be None.
        classes: class names, [C].
        root: folder of the data set, or None.
        meta: how it was read: format, counts, hash of the split file, and what had to be decided.
    """

    name: str
    train: ImagesT
    val: ImagesT | None
    test: ImagesT | None
    classes: tuple[str, ...]
    root: Path | None = None
    meta: dict[str, Any] = field(default_factory=dict)

    def splits(self) -> dict[str, ImagesT]:
        """The splits there are, by name."""
        found = {split: getattr(self, split) for split in SPLITS}
        return {split: images for split, images in found.items() if images is not None}

    def with_splits(
        self, splits: Mapping[str, ImagesT], *, name: str | None = None, meta: Mapping[str, Any] | None = None
    ) -> Self:
        """The same data set with some of its splits replaced; ``meta`` is added to what it has."""
        merged = {**self.splits(), **splits}
        return replace(
            self,
            name=name or self.name,
            train=merged["train"],
            val=merged.get("val"),
            test=merged.get("test"),
            classes=merged["train"].classes,
            meta={**self.meta, **(meta or {})},
        )

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any class, split, image name, label or id."""
        parts = [f"{split}:{images.fingerprint()}" for split, images in self.splits().items()]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).hexdigest()

    def record(self) -> dict[str, Any]:
        """What belongs into a run record: names, counts, fingerprints and ``meta``; no absolute path."""
        return {
            "name": self.name,
            "classes": len(self.classes),
            "images": {split: len(images) for split, images in self.splits().items()},
            "fingerprint": self.fingerprint(),
            **self.meta,
        }


@dataclass(frozen=True)
class DataSet(Splits[ImageSet]):
    """A data set whose images have one label each; see :class:`Splits`."""

    def select_classes(self, class_ids: Sequence[int], *, meta: Mapping[str, Any] | None = None) -> DataSet:
        """The same data set with only some of its classes, renumbered 0, 1, ... in the order given."""
        selected = {split: images.select_classes(class_ids) for split, images in self.splits().items()}
        return self.with_splits(selected, meta=meta)


def build(
    name: str,
    classes: Sequence[str],
    members: Mapping[str, Sequence[tuple[str, int]]],
    source: ImageSource,
    *,
    root: Path | None = None,
    meta: Mapping[str, Any] | None = None,
    sources: Mapping[str, Sequence[str]] | None = None,
) -> DataSet:
    """A :class:`DataSet` from (image name, label) lists by split.

    Images are numbered through train, val and test in the order given; that number is their id.

    Raises:
        DataError: an image is listed twice.
    """
    seen: set[str] = set()
    splits: dict[str, ImageSet | None] = {"val": None, "test": None}
    for split in SPLITS:
        items = members.get(split)
        if items is None and split != "train":
            continue
        items = items or []
        ids = np.arange(len(seen), len(seen) + len(items))
        for image_name, _ in items:
            if image_name in seen:
                raise DataError(f"{name}: the image {image_name!r} is listed twice; remove one of the entries")
            seen.add(image_name)
        labels = np.fromiter((label for _, label in items), dtype=np.int64, count=len(items))
        origin = None if sources is None else sources.get(split, [])
        splits[split] = ImageSet(classes, labels, ids, [item[0] for item in items], source, sources=origin)
    if not seen:
        raise DataError(f"{name}: found no image; expected at least one")
    train = splits["train"]
    assert train is not None
    return DataSet(name, train, splits["val"], splits["test"], tuple(classes), root, dict(meta or {}))


def frozen(values: ArrayLike, what: str) -> NDArray[np.int64]:
    """Whole numbers as a read-only int64 array."""
    array = np.array(values)
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise DataError(f"{what}: found {array.dtype}, expected whole numbers")
    array = array.astype(np.int64)
    array.flags.writeable = False
    return array
