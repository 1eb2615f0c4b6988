"""Few-shot lists of CoOp, matched with the images that are here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from capt.data.few_shot import base_novel
from capt.data.image_set import DataSet, ImageSet
from capt.data.readers.coop_pickle import Datum, read_coop_pickle
from capt.errors import DataError
from capt.files import sha256

_NAME = re.compile(r"shot_([0-9]{1,9})-seed_([0-9]{1,18})\.pkl")


def read_coop_few_shot(path: str | Path, data: DataSet) -> DataSet:
    """Keep only the images a few-shot file of CoOp lists, for training and validation; test images stay.

    The absolute paths in the file belong to the machine that wrote it: each is matched by its end with an image
    of the same split here. Images the file repeats (CoOp fills short classes that way) are taken once and counted
    in ``meta``.

    Args:
        path: ``shot_{k}-seed_{s}.pkl``.
        data: the data set the list was made from, all classes.

    Raises:
        DataError: the file is no such list, or lists an image, label or class name that is not in the same split.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"'{path}': no such few-shot file; make a list with capt.data.few_shot instead")
    lists = read_coop_pickle(path)
    record: dict[str, Any] = {"file": path.name, "sha256": sha256(path), "repeated": {}}
    if described := _NAME.fullmatch(path.name):
        record |= {"shots": int(described[1]), "seed": int(described[2])}
    chosen: dict[str, ImageSet] = {}
    for split, items in lists.items():
        images = data.splits().get(split)
        if images is None:
            raise DataError(f"'{path.name}': lists {split} images, but '{data.name}' has no such split")
        place = {name: position for position, name in enumerate(images.names)}
        positions = [_place(datum, images, place, path.name, split) for datum in items]
        unique = list(dict.fromkeys(positions))
        record["repeated"][split] = len(positions) - len(unique)
        chosen[split] = images.subset(np.array(unique, dtype=np.int64), meta={"few_shot": record})
    return data.with_splits(chosen, meta={"few_shot": record})


def coop_few_shot_sets(path: str | Path, data: DataSet, *, base_only: bool = False) -> dict[str, ImageSet]:
    """The images of a few-shot file of CoOp, ready for :func:`capt.data.save_few_shot`.

    Args:
        path: ``shot_{k}-seed_{s}.pkl``.
        data: the data set the list was made from, all classes.
        base_only: leave out the novel half of the classes, as the base-to-novel protocol does after the choice.

    Returns:
        "train" and, if the file lists validation images, "val". ``meta["few_shot"]`` says which file it was, and which
        classes have fewer training images than its name says.

    Raises:
        DataError: see :func:`read_coop_few_shot`.
    """
    listed = read_coop_few_shot(path, data)
    record = listed.meta["few_shot"]
    if base_only:
        listed, _ = base_novel(listed)
    counted = zip(listed.classes, listed.train.counts.tolist(), strict=True)
    short = {name: count for name, count in counted if count < record.get("shots", 0)}
    found = {split: images for split, images in listed.splits().items() if split in record["repeated"] and len(images)}
    return {
        split: images.subset(
            np.arange(len(images)),
            meta={"few_shot": {**record, "short_classes": short if split == "train" else {}}},
        )
        for split, images in found.items()
    }


def _place(datum: Datum, images: ImageSet, place: dict[str, int], file: str, split: str) -> int:
    parts = [part for part in re.split(r"[/\\]", datum.path) if part]
    for start in range(len(parts)):
        position = place.get("/".join(parts[start:]))
        if position is not None:
            label = int(images.labels[position])
            if datum.label != label or datum.class_name.replace("_", " ") != images.classes[label].replace("_", " "):
                raise DataError(
                    f"'{file}': {images.names[position]!r} has label {datum.label} ({datum.class_name!r}) in the list, "
                    f"but {label} ({images.classes[label]!r}) in the split file; they do not belong together"
                )
            return position
    raise DataError(f"'{file}': {'/'.join(parts[-2:])!r} is not among the {split} images; the list has another split")
