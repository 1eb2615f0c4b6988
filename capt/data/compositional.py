"""Compositional data: every image shows one (state, object) pair, and some pairs are never seen in training."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capt.data.image_set import SPLITS, DataSet, ImageSet, build
from capt.data.names import class_list
from capt.data.sources import ImageSource
from capt.errors import DataError

Pair = tuple[str, str]


@dataclass(frozen=True)
class CompositionalSet:
    """A compositional data set.

    Attributes:
        data: its images; the classes are the pairs ("red heart"), labels are positions in ``pairs``. All three splits
            are there and none is empty.
        states, objects: the primitives, sorted by code point.
        pairs: int64 [P, 2], (state, object) positions of every pair that a split lists, sorted. Read-only.
        split_pairs: "train", "val", "test" -> int64 positions in ``pairs`` that the split lists, in the order of its
            list. Every state and object occurs in a training pair. Read-only.
    """

    data: DataSet
    states: tuple[str, ...]
    objects: tuple[str, ...]
    pairs: NDArray[np.int64]
    split_pairs: dict[str, NDArray[np.int64]]

    @property
    def name(self) -> str:
        """What to call the data set."""
        return self.data.name

    @property
    def train(self) -> ImageSet:
        """Training images."""
        return self.data.train

    @property
    def val(self) -> ImageSet:
        """Validation images."""
        return self.data.splits()["val"]

    @property
    def test(self) -> ImageSet:
        """Test images."""
        return self.data.splits()["test"]

    @cached_property
    def seen(self) -> NDArray[np.bool_]:
        """Whether a pair is a training pair, bool [P]. Read-only."""
        seen = np.zeros(len(self.pairs), dtype=np.bool_)
        seen[self.split_pairs["train"]] = True
        seen.flags.writeable = False
        return seen

    def counts(self) -> dict[str, dict[str, int]]:
        """For each split: its pairs and its images, seen and unseen."""
        result = {}
        for split, images in self.data.splits().items():
            pairs_seen, images_seen = self.seen[self.split_pairs[split]], self.seen[images.labels]
            result[split] = {
                "seen_pairs": int(pairs_seen.sum()),
                "unseen_pairs": int((~pairs_seen).sum()),
                "seen_images": int(images_seen.sum()),
                "unseen_images": int((~images_seen).sum()),
            }
        return result

    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any state, object, pair list, image name, label or id."""
        lists = [self.split_pairs[split].tolist() for split in SPLITS]
        parts = [self.data.fingerprint(), self.states, self.objects, self.pairs.tolist(), lists]
        return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()

    def record(self) -> dict[str, Any]:
        """What belongs into a run record: that of the images, primitives and pairs counted; no absolute path."""
        sizes = {"states": len(self.states), "objects": len(self.objects), "pairs": self.counts()}
        return {**self.data.record(), **sizes, "fingerprint": self.fingerprint()}


def build_compositional(
    name: str,
    pair_lists: Mapping[str, Sequence[Pair]],
    members: Mapping[str, Sequence[tuple[str, Pair]]],
    source: ImageSource,
    *,
    root: Path | None = None,
    meta: Mapping[str, Any] | None = None,
    sources: Mapping[str, Sequence[str]] | None = None,
) -> CompositionalSet:
    """A :class:`CompositionalSet` from the pair list and the (image name, pair) list of every split.

    An image stays in its split even if that split's list lacks its pair (as long as another one has it): filtering
    images by pair lists moves or drops images of the published splits.

    Raises:
        DataError: an empty split; a pair listed twice or an image listed twice; two pairs with one name; an image of
            an unknown state, object or pair; a state or object without training pair; a training image of an unseen
            pair.
    """
    for split in SPLITS:
        for what, values in (("pair", pair_lists.get(split)), ("image", members.get(split))):
            if not values:
                raise DataError(f"{name}: the split {split!r} has no {what}; expected all of train, val and test")
        twice = [pair for pair, count in Counter(pair_lists[split]).items() if count > 1]
        if twice:
            raise DataError(f"{name}: {split} lists the pair {_shown(twice[0])} twice; remove one of the entries")
    _check_learnable(name, pair_lists)
    ordered = sorted({pair for listed in pair_lists.values() for pair in listed})
    states, objects = (sorted({pair[part] for pair in ordered}) for part in (0, 1))
    for what, names in (("state", states), ("object", objects)):
        class_list(names, f"{name}, {what}s")
    _check_names(name, ordered)
    place = {pair: number for number, pair in enumerate(ordered)}
    known = {"state": frozenset(states), "object": frozenset(objects)}
    training = frozenset(pair_lists["train"])
    listed: dict[str, list[tuple[str, int]]] = {}
    for split in SPLITS:
        listed[split] = []
        for image, pair in members[split]:
            if pair not in place:
                raise DataError(f"{name}: the {split} image {image!r} shows {_unknown(pair, known)}")
            if split == "train" and pair not in training:
                raise DataError(
                    f"{name}: the pair {_shown(pair)} is unseen, no training list has it, but the training image "
                    f"{image!r} shows it; add the pair to the training pairs or take the image out"
                )
            listed[split].append((image, place[pair]))
    classes = [" ".join(pair) for pair in ordered]
    data = build(name, classes, listed, source, root=root, meta=meta, sources=sources)
    position = [{primitive: number for number, primitive in enumerate(names)} for names in (states, objects)]
    pairs = _frozen([[position[0][state], position[1][thing]] for state, thing in ordered])
    split_pairs = {split: _frozen([place[pair] for pair in pair_lists[split]]) for split in SPLITS}
    return CompositionalSet(data, tuple(states), tuple(objects), pairs, split_pairs)


def _check_learnable(name: str, pair_lists: Mapping[str, Sequence[Pair]]) -> None:
    for part, what in enumerate(("state", "object")):
        trained = {pair[part] for pair in pair_lists["train"]}
        for split in ("val", "test"):
            for pair in pair_lists[split]:
                if pair[part] not in trained:
                    raise DataError(
                        f"{name}: the {what} {pair[part]!r} of the {split} pair {_shown(pair)} is in no training pair, "
                        "so it cannot be learned; every state and object needs one"
                    )


def _check_names(name: str, pairs: Sequence[Pair]) -> None:
    owner: dict[str, Pair] = {}
    for pair in pairs:
        other = owner.setdefault(" ".join(pair), pair)
        if other != pair:
            raise DataError(
                f"{name}: the pairs {_shown(other)} and {_shown(pair)} are both called {' '.join(pair)!r}; "
                "rename a state or an object"
            )


def _unknown(pair: Pair, known: Mapping[str, frozenset[str]]) -> str:
    for what, primitive in zip(("state", "object"), pair, strict=True):
        if primitive not in known[what]:
            return f"the unknown {what} {primitive!r}; expected one of the {len(known[what])} {what}s of the pair lists"
    return f"the pair {_shown(pair)}, which no pair list has; add it to the list of a split"


def _shown(pair: Pair) -> str:
    return f"({pair[0]!r}, {pair[1]!r})"


def _frozen(values: Sequence[Any]) -> NDArray[np.int64]:
    array = np.array(values, dtype=np.int64)
    array.flags.writeable = False
    return array
