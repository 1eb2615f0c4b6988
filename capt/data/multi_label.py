"""Multi-label data: every image shows a set of classes, possibly none, and some classes are rare in training."""

from __future__ import annotations

import hashlib
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from capt.data.image_set import SPLITS, Images, Splits
from capt.data.names import class_key
from capt.data.sources import ImageSource
from capt.errors import DataError

THRESHOLDS = (100, 20)


class MultiLabelImages(Images):
    """Images with any number of labels: ``labels`` is uint8 [N, C], 1 where an image shows a class."""

    def _checked(self, labels: ArrayLike) -> NDArray[np.uint8]:
        given = np.asarray(labels)
        expected = (len(self.names), len(self.classes))
        if given.shape != expected:
            raise DataError(
                f"targets: found shape {list(given.shape)}, expected {list(expected)}, a row for each name and a "
                "column for each class"
            )
        if given.dtype != np.bool_ and not np.isin(given, (0, 1)).all():
            raise DataError(f"targets: found values of {given.dtype} other than 0 and 1")
        kept = given.astype(np.uint8)
        kept.flags.writeable = False
        return kept

    def _label_bytes(self) -> bytes:
        return np.packbits(self.labels).tobytes()

    @property
    def targets(self) -> NDArray[np.uint8]:
        """Which classes an image shows, uint8 [N, C]; the same as ``labels``. Read-only."""
        return self.labels

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Positive images of each class, int64 [C]."""
        counts: NDArray[np.int64] = self.targets.sum(0, dtype=np.int64)
        return counts

    @property
    def unlabelled(self) -> int:
        """Images without any label. They are negatives of every class."""
        return int((~self.targets.any(1)).sum())

    def names_of(self, index: int) -> list[str]:
        """Class names that the image at ``index`` shows."""
        return [self.classes[number] for number in np.flatnonzero(self.targets[index])]


@dataclass(frozen=True)
class ClassGroups:
    """Class ids by training frequency, each int64 and ascending. Their union is every class."""

    head: NDArray[np.int64]
    medium: NDArray[np.int64]
    tail: NDArray[np.int64]


def frequency_groups(frequency: ArrayLike, thresholds: tuple[int, int] = THRESHOLDS) -> ClassGroups:
    """Head, medium and tail classes.

    Args:
        frequency: int [C], training positives of each class.
        thresholds: (h, m); a class with at least h training positives is head, with at least m medium, else tail.
            Source: CPRFL's evaluation, 100 and 20.
    """
    head, medium = thresholds
    if not head >= medium >= 0:
        raise DataError(f"thresholds: found {thresholds}, expected (head, medium) with head >= medium >= 0")
    counts = np.asarray(frequency)
    rank = (counts < head).astype(np.int64) + (counts < medium)
    return ClassGroups(*(np.flatnonzero(rank == place) for place in range(3)))


@dataclass(frozen=True)
class MultiLabelSet(Splits[MultiLabelImages]):
    """A data set whose images have any number of labels; see :class:`Splits`.

    Attributes:
        frequency: int64 [C], positives of each class in the training list, with the images that :meth:`hold_out` took
            from it. It decides which classes are head, medium and tail. Read-only.
    """

    frequency: NDArray[np.int64] = field(kw_only=True)

    def groups(self, thresholds: tuple[int, int] = THRESHOLDS) -> ClassGroups:
        """Head, medium and tail classes, see :func:`frequency_groups`."""
        return frequency_groups(self.frequency, thresholds)

    def hold_out(self, fraction: float, seed: int = 0) -> MultiLabelSet:
        """The same data with a validation split taken from the training images by :func:`hold_out`.

        Raises:
            DataError: there is a validation split already.
        """
        if self.val is not None:
            raise DataError(f"val_fraction: '{self.name}' has {len(self.val)} validation images; leave the option out")
        train, val = hold_out(self.train, fraction, seed)
        return replace(self, train=train, val=val, meta={**self.meta, **train.meta})

    def counts(self) -> dict[str, dict[str, float]]:
        """For each split: images, labels, labels an image, unlabelled images, classes without a positive."""
        result = {}
        for split, images in self.splits().items():
            labels = int(images.counts.sum())
            result[split] = {
                "images": len(images),
                "labels": labels,
                "labels_per_image": round(labels / len(images), 3) if len(images) else 0.0,
                "unlabelled_images": images.unlabelled,
                "classes_without_positive": int((images.counts == 0).sum()),
            }
        return result

    def record(self) -> dict[str, Any]:
        """What belongs into a run record: that of the images, with labels counted and the sizes of the groups."""
        groups = {name: len(ids) for name, ids in vars(self.groups()).items()}
        return {**super().record(), "labels": self.counts(), "groups": groups}

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any class, split, image name, label, id or frequency."""
        parts = super().fingerprint().encode() + self.frequency.astype("<i8").tobytes()
        return hashlib.blake2b(parts, digest_size=16).hexdigest()


def build_multi_label(
    name: str,
    classes: Sequence[str],
    members: Mapping[str, Sequence[tuple[str, Sequence[int]]]],
    source: ImageSource,
    *,
    root: Path | None = None,
    meta: Mapping[str, Any] | None = None,
) -> MultiLabelSet:
    """A :class:`MultiLabelSet` from (image name, label numbers) lists by split.

    Images are numbered through train, val and test in the order given; that number is their id. A label that an image
    has twice counts once; how often that happened is in ``meta``, as are images without a label and classes without a
    training image.

    Raises:
        DataError: no image, an image that is listed twice, or a label number that is no class.
    """
    seen: set[str] = set()
    splits: dict[str, MultiLabelImages | None] = {}
    repeated = 0
    for split in SPLITS:
        items = members.get(split)
        if items is None and split != "train":
            splits[split] = None
            continue
        items = items or []
        targets = np.zeros((len(items), len(classes)), dtype=np.uint8)
        for row, (image, labels) in enumerate(items):
            if image in seen:
                raise DataError(f"{name}: the image {image!r} is listed twice; remove one of the entries")
            seen.add(image)
            for label in labels:
                if not 0 <= label < len(classes):
                    raise DataError(f"{name}: {image!r} has the label {label}, expected 0 to {len(classes) - 1}")
                repeated += int(targets[row, label])
                targets[row, label] = 1
        ids = np.arange(len(seen) - len(items), len(seen))
        splits[split] = MultiLabelImages(classes, targets, ids, [item[0] for item in items], source)
    train = splits["train"]
    if not seen or train is None:
        raise DataError(f"{name}: found no image; expected at least one")
    counted = {"repeated_labels": repeated, "classes_without_training_image": int((train.counts == 0).sum())}
    frequency = train.counts.copy()
    frequency.flags.writeable = False
    merged = {**(meta or {}), **counted}
    return MultiLabelSet(
        name, train, splits["val"], splits["test"], tuple(classes), root, merged, frequency=frequency
    )  # fmt: skip


def hold_out(images: MultiLabelImages, fraction: float, seed: int = 0) -> tuple[MultiLabelImages, MultiLabelImages]:
    """Split a set in two so that every class keeps its share, by hash.

    Classes choose in turn, the rarest first (equal ones by name). A class with n images wants n * ``fraction`` of them
    held out, rounded to the nearest count; it takes those with the smallest hash of (seed, image name) that no rarer
    class decided on, and keeps the others. No class loses its last image. Images without a label are held out in the
    same proportion. So the choice depends on nothing but names, labels and the seed. Source: ours, after iterative
    stratification.

    Args:
        images: the images.
        fraction: part to hold out, between 0 and 1.
        seed: any whole number.

    Returns:
        (kept, held out), each in the order of ``images``.
    """
    if not 0 < fraction < 1:
        raise DataError(f"val_fraction: found {fraction}, expected a number between 0 and 1")
    order = by_hash(images, seed, "hold-out")
    held, undecided = np.zeros(len(images), dtype=np.bool_), np.ones(len(images), dtype=np.bool_)
    kept = images.counts.copy()
    shows = [images.targets[:, label] == 1 for label in rarest_first(images)]
    for mine in [*shows, ~images.targets.any(1)]:
        wanted = math.floor(int(mine.sum()) * fraction + 0.5) - int(held[mine].sum())
        for place in order[(mine & undecided)[order]]:
            if wanted > 0 and (kept > images.targets[place]).all(where=images.targets[place] == 1):
                held[place] = True
                kept -= images.targets[place]
                wanted -= 1
        undecided &= ~mine
    record = {"hold_out": {"fraction": fraction, "seed": int(seed)}}
    return images.subset(~held, meta=record), images.subset(held, meta=record)


def by_hash(images: Images, seed: int, purpose: str) -> NDArray[np.int64]:
    """Positions of the images in an order that looks random, and depends on their names and the seed alone."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise DataError(f"seed: found {seed!r}, expected a whole number")
    keys = []
    for place, name in enumerate(images.names):
        # NFC: some file systems hand back another spelling of the same file name.
        text = unicodedata.normalize("NFC", name)
        digest = hashlib.blake2b(f"{purpose}\0{int(seed)}\0{text}".encode(), digest_size=16).digest()
        keys.append((digest, text, place))
    return np.array([place for *_, place in sorted(keys)], dtype=np.int64)


def rarest_first(images: MultiLabelImages) -> list[int]:
    """Class ids from the fewest to the most images; equal ones by name."""
    return sorted(range(len(images.classes)), key=lambda c: (images.counts[c], class_key(images.classes[c])))
