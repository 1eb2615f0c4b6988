"""CoOp's layout of eleven data sets: its folders, its split files and its few-shot lists, read and never written."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from capt.data.decode import EXTENSIONS
from capt.data.image_set import SPLITS, DataSet, ImageSet, build
from capt.data.names import class_list, natural_key, safe_relative
from capt.data.readers.coop_pickle import Datum, read_coop_pickle
from capt.data.sources import FolderSource
from capt.errors import DataError
from capt.files import sha256

Items = dict[str, list[tuple[str, int]]]


@dataclass(frozen=True)
class Layout:
    """Where a data set lies below the common root, and how large the published version is.

    Attributes:
        name: key of :data:`LAYOUTS`.
        title: name used in papers.
        folder: its folder below the root.
        images: folder of the images below ``folder``; "" is the folder itself.
        files: files that must be there, the list of images first.
        classes: number of classes.
        counts: number of images of train, val and test; None where there is no such split.
        aliases: other names, compared without case and punctuation.
    """

    name: str
    title: str
    folder: str
    images: str
    files: tuple[str, ...]
    classes: int
    counts: tuple[int, int | None, int]
    aliases: tuple[str, ...] = ()


def _zhou(title: str) -> tuple[str, ...]:
    return (f"split_zhou_{title}.json",)


_FGVC_FILES = ("images_variant_train.txt", "images_variant_val.txt", "images_variant_test.txt", "variants.txt")

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        Layout("imagenet", "ImageNet", "imagenet", "images", ("classnames.txt",), 1000, (1_281_167, None, 50_000)),
        Layout(
            "caltech101",
            "Caltech101",
            "caltech-101",
            "101_ObjectCategories",
            _zhou("Caltech101"),
            100,
            (4_128, 1_649, 2_465),
            ("caltech",),
        ),
        Layout(
            "oxford_pets",
            "OxfordPets",
            "oxford_pets",
            "images",
            _zhou("OxfordPets"),
            37,
            (2_944, 736, 3_669),
            ("pets",),
        ),
        Layout(
            "stanford_cars",
            "StanfordCars",
            "stanford_cars",
            "",
            _zhou("StanfordCars"),
            196,
            (6_509, 1_635, 8_041),
            ("cars",),
        ),
        Layout(
            "oxford_flowers",
            "Flowers102",
            "oxford_flowers",
            "jpg",
            _zhou("OxfordFlowers"),
            102,
            (4_093, 1_633, 2_463),
            ("flowers", "flowers102", "oxfordflowers102"),
        ),
        Layout("food101", "Food101", "food-101", "images", _zhou("Food101"), 101, (50_500, 20_200, 30_300), ("food",)),
        Layout(
            "fgvc_aircraft",
            "FGVCAircraft",
            "fgvc_aircraft",
            "images",
            _FGVC_FILES,
            100,
            (3_334, 3_333, 3_333),
            ("aircraft", "fgvc"),
        ),
        Layout("sun397", "SUN397", "sun397", "SUN397", _zhou("SUN397"), 397, (15_880, 3_970, 19_850), ("sun",)),
        Layout(
            "dtd",
            "DTD",
            "dtd",
            "images",
            _zhou("DescribableTextures"),
            47,
            (2_820, 1_128, 1_692),
            ("describabletextures", "textures"),
        ),
        Layout("eurosat", "EuroSAT", "eurosat", "2750", _zhou("EuroSAT"), 10, (13_500, 5_400, 8_100)),
        Layout(
            "ucf101", "UCF101", "ucf101", "UCF-101-midframes", _zhou("UCF101"), 101, (7_639, 1_898, 3_783), ("ucf",)
        ),
    )
}


def layout_of(dataset: str) -> Layout:
    """The layout of a data set by any of its names.

    Raises:
        DataError: unknown name.
    """
    wanted = re.sub(r"[^a-z0-9]", "", dataset.lower())
    for layout in LAYOUTS.values():
        names = {re.sub(r"[^a-z0-9]", "", one.lower()) for one in (layout.name, layout.title, layout.folder)}
        if wanted in names or wanted in layout.aliases:
            return layout
    raise DataError(f"'coop:{dataset}': unknown data set; expected one of {', '.join(LAYOUTS)}")


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
    """One of the eleven data sets in CoOp's folder layout.

    Labels, order and membership are those of the split file. ImageNet's validation images are the test split.
    Classes whose published names are equal (two pairs in ImageNet) stay apart; ``meta`` lists them.

    Args:
        dataset: a key of :data:`LAYOUTS`, or another common name of the data set.
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
    read: Callable[[Layout, Path], tuple[list[str], Items]] = {
        "imagenet": _imagenet,
        "fgvc_aircraft": _fgvc,
    }.get(layout.name, _split_json)
    names, items = read(layout, folder)
    if underscores == "spaces":
        names = [name.replace("_", " ") for name in names]
    classes = class_list(names, f"'{layout.files[0]}'", allow_duplicates=True)
    if check_files and layout.name != "imagenet":
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
    trusted = (folder / layout.images, folder / layout.images / "train", folder / layout.images / "val")
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
    images = ["images/train", "images/val"] if layout.name == "imagenet" else [layout.images] if layout.images else []
    missing = [f"file {file!r}" for file in layout.files if not (folder / file).is_file()]
    return missing + [f"folder {name!r}" for name in images if not (folder / name).is_dir()]


def absent_images(folder: Path, items: Items) -> list[str]:
    """Listed images that do not exist."""
    return [name for listed in items.values() for name, _ in listed if not (folder / name).is_file()]


def differences(layout: Layout, data: DataSet) -> list[str]:
    """How class and image counts differ from the published data set, in words."""
    found = []
    if len(data.classes) != layout.classes:
        found.append(f"{len(data.classes):,} classes, expected {layout.classes:,}")
    for split, expected in zip(SPLITS, layout.counts, strict=True):
        images = data.splits().get(split)
        if expected is not None and (images is None or len(images) != expected):
            found.append(f"{0 if images is None else len(images):,} {split} images, expected {expected:,}")
    return found


def _split_json(layout: Layout, folder: Path) -> tuple[list[str], Items]:
    file = layout.files[0]
    try:
        split = json.loads((folder / file).read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"'{file}': not valid JSON ({error}); copy the split file again") from error
    if not isinstance(split, dict) or not all(isinstance(split.get(part), list) for part in SPLITS):
        raise DataError(f"'{file}': expected an object with the lists train, val and test")
    items: Items = {}
    name_of: dict[int, str] = {}
    for part in SPLITS:
        items[part] = []
        for position, entry in enumerate(split[part]):
            where = f"'{file}', {part}[{position}]"
            match entry:
                case [str(path), int(label), str(name)] if not isinstance(label, bool):
                    path = safe_relative(path, where)
                case _:
                    raise DataError(f"{where}: expected [path, label, class name], found {str(entry)[:80]!r}")
            if name_of.setdefault(label, name) != name:
                raise DataError(f"{where}: label {label} is {name!r} here but {name_of[label]!r} before")
            items[part].append((f"{layout.images}/{path}" if layout.images else path, label))
    if sorted(name_of) != list(range(len(name_of))):
        raise DataError(f"'{file}': labels are not numbered 0 to {len(name_of) - 1} without gaps")
    return [name_of[label] for label in range(len(name_of))], items


def _fgvc(layout: Layout, folder: Path) -> tuple[list[str], Items]:
    names = _lines(folder / "variants.txt")
    label_of = {name: label for label, name in enumerate(names)}
    items: Items = {}
    for part in SPLITS:
        file = f"images_variant_{part}.txt"
        items[part] = []
        for number, line in enumerate(_lines(folder / file), start=1):
            image, _, name = line.partition(" ")
            if name not in label_of:
                raise DataError(f"'{file}', line {number}: the variant {name!r} is not in variants.txt")
            path = safe_relative(f"{image}.jpg", f"'{file}', line {number}")
            items[part].append((f"{layout.images}/{path}", label_of[name]))
    return names, items


def _imagenet(layout: Layout, folder: Path) -> tuple[list[str], Items]:
    name_of = {}
    for line in _lines(folder / "classnames.txt"):
        synset, _, name = line.partition(" ")
        name_of[synset] = name.strip()
    images = folder / layout.images
    synsets = sorted(entry.name for entry in (images / "train").iterdir() if entry.is_dir() and entry.name[0] != ".")
    unnamed = next((synset for synset in synsets if synset not in name_of), None)
    if unnamed or not synsets:
        found = f"the class folder {unnamed!r}, which classnames.txt does not name" if unnamed else "no class folder"
        raise DataError(f"'images/train': found {found}; expected one folder per synset, as n01440764")
    items: Items = {"train": [], "test": []}
    for part, place in (("train", "train"), ("test", "val")):
        for label, synset in enumerate(synsets):
            inside = images / place / synset
            found_names = [path.name for path in inside.iterdir()] if inside.is_dir() else []
            kept = [one for one in found_names if one[0] != "." and Path(one).suffix.lower() in EXTENSIONS]
            prefix = f"{layout.images}/{place}/{synset}"
            items[part].extend((f"{prefix}/{one}", label) for one in sorted(kept, key=natural_key))
    return [name_of[synset] for synset in synsets], items


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"'{path.name}': expected UTF-8 text ({error})") from error


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
