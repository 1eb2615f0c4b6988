"""CoOp's layout of eleven data sets and four variants of ImageNet: images, split files, few-shot lists; only read."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, Literal

from capt.data.image_set import SPLITS, DataSet, build
from capt.data.names import class_list
from capt.data.readers.coop_few_shot import read_coop_few_shot
from capt.data.readers.coop_layouts import Layout, layout_of
from capt.data.readers.coop_members import Items, read_members
from capt.data.sources import FolderSource
from capt.errors import DataError
from capt.files import sha256


def read_coop(
    dataset: str,
    *,
    root: str | Path,
    shots: int | None = None,
    seed: int | None = None,
    underscores: Literal["spaces", "keep"] = "spaces",
    check_files: bool = True,
    warn: bool = True,
) -> DataSet:
    """One of the eleven data sets, or of the four variants of ImageNet, in CoOp's folder layout.

    Labels, order and membership are those of the split file. ImageNet's validation images are the test split.
    ImageNetV2, -Sketch, -A and -R have test images alone; their ``train`` is empty. Labels of ImageNet and its variants
    follow the order of the synsets. Classes whose published names are equal (two pairs in ImageNet) stay apart;
    ``meta`` lists them.

    Args:
        dataset: a key of :data:`capt.data.readers.coop_layouts.LAYOUTS`, or another common name of the data set.
        root: folder that holds all data sets.
        shots, seed: read ``split_fewshot/shot_{shots}-seed_{seed}.pkl`` too and keep only the images listed there.
            For lists of our own use :func:`capt.data.few_shot`.
        underscores: "spaces" writes class names as CoOp's prompts do; "keep" leaves them as stored.
        check_files: make sure now that every image exists.
        warn: warn if class or image counts differ from the published data set.

    Raises:
        DataError: a folder or file is missing; a split file does not have its form; an image is missing.
    """
    layout = layout_of(dataset)
    folder = Path(root) / layout.folder
    missing = missing_parts(layout, root)
    if missing:
        raise DataError(
            f"'coop:{layout.name}': '{folder}' lacks the {', the '.join(missing)}; root= is the folder "
            f"in which '{layout.folder}' lies"
        )
    names, items = read_members(layout, folder)
    if underscores == "spaces":
        names = [name.replace("_", " ") for name in names]
    classes = class_list(names, f"'{layout.files[0]}'", allow_duplicates=True)
    if check_files and not layout.from_folders:
        absent = absent_images(folder, items)
        if absent:
            raise DataError(
                f"'coop:{layout.name}': {len(absent)} images are missing, first {absent[0]!r} in '{folder}'"
            )
    hashes = {file: sha256(folder / file) for file in layout.files}
    meta: dict[str, Any] = {"format": "coop", "dataset": layout.name, "sha256": hashes, "underscores": underscores}
    twins = sorted({name for name in classes if classes.count(name) > 1}) if len(set(classes)) < len(classes) else []
    if twins:
        meta["duplicate_class_names"] = twins
    # CoOp's own instructions map image folders in by links, so those may point elsewhere; files in them may not.
    trusted = (folder / layout.images, *(folder / images for images in layout.image_folders))
    data = build(layout.title, classes, items, FolderSource(folder, trusted), root=folder, meta=meta)
    difference = differences(layout, data)
    if difference:
        data.meta["differs_from_published"] = difference
        if warn:
            warnings.warn(f"'coop:{layout.name}': not the published data set: {'; '.join(difference)}", stacklevel=2)
    if shots is None and seed is None:
        return data
    if shots is None or seed is None:
        raise DataError("shots, seed: give both, or neither")
    return read_coop_few_shot(folder / "split_fewshot" / f"shot_{shots}-seed_{seed}.pkl", data)


def missing_parts(layout: Layout, root: str | Path) -> list[str]:
    """Files and folders, relative to the data set's folder, that are not there."""
    folder = Path(root) / layout.folder
    missing = [f"file {file!r}" for file in layout.files if not (folder / file).is_file()]
    return missing + [f"folder {name!r}" for name in layout.image_folders if not (folder / name).is_dir()]


def absent_images(folder: Path, items: Items) -> list[str]:
    """Listed images that do not exist."""
    return [name for listed in items.values() for name, _ in listed if not (folder / name).is_file()]


def differences(layout: Layout, data: DataSet) -> list[str]:
    """How the classes, image counts and folders differ from the published data set, in words."""
    found = []
    if len(data.classes) != layout.classes:
        found.append(f"{len(data.classes):,} classes, expected {layout.classes:,}")
    for split, expected in zip(SPLITS, layout.counts, strict=True):
        images = data.splits().get(split)
        if expected is not None and (images is None or len(images) != expected):
            found.append(f"{0 if images is None else len(images):,} {split} images, expected {expected:,}")
        if layout.from_folders and expected and images is not None and len(empty := (images.counts == 0).nonzero()[0]):
            found.append(f"{len(empty):,} classes have no {split} image, first {data.classes[empty[0]]!r}")
    return found + (_mixed_folders(data) if layout.class_folders else [])


def _mixed_folders(data: DataSet) -> list[str]:
    """Class folders whose images have several labels: somebody changed the split file."""
    labels: dict[str, set[int]] = {}
    for images in data.splits().values():
        for name, label in zip(images.names, images.labels.tolist(), strict=True):
            labels.setdefault(name.rpartition("/")[0], set()).add(label)
    mixed = {folder: sorted(found) for folder, found in labels.items() if len(found) > 1}
    return [
        f"{len(mixed):,} class folders hold images of several classes, first {folder!r} "
        f"({', '.join(repr(data.classes[label]) for label in found)}); the split file was changed"
        for folder, found in list(mixed.items())[:1]
    ]
