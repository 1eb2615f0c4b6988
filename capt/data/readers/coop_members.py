"""Which images a data set of CoOp's layout has, and their labels: from split files, or from class folders."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from capt.data.decode import EXTENSIONS
from capt.data.image_set import SPLITS
from capt.data.names import natural_key, safe_relative
from capt.data.readers.coop_layouts import Layout
from capt.errors import DataError

Items = dict[str, list[tuple[str, int]]]


def read_members(layout: Layout, folder: Path) -> tuple[list[str], Items]:
    """Class names, and (image name, label) lists by split.

    Args:
        layout: the data set.
        folder: its folder; image names are relative to it.

    Raises:
        DataError: a list does not have its form, or there are class folders of unknown classes.
    """
    return _READERS[layout.kind](layout, folder)


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
    name_of = _synset_names(folder)
    synsets = _class_folders(folder, "images/train")
    _require_named(synsets, name_of, "images/train")
    items: Items = {
        part: [
            (name, label)
            for label, synset in enumerate(synsets)
            for name in _images(folder, f"images/{place}/{synset}")
        ]
        for part, place in (("train", "train"), ("test", "val"))
    }
    return [name_of[synset] for synset in synsets], items


def _variant(layout: Layout, folder: Path) -> tuple[list[str], Items]:
    """ImageNetV2, -Sketch, -A and -R: test images in class folders, labels in the order of the synsets.

    A class of classnames.txt whose folder is missing keeps its label in the first two, so that those of the classes
    behind it do not move.
    """
    name_of = _synset_names(folder)
    synsets, present = sorted(name_of), _class_folders(folder, layout.images)
    if layout.kind == "numbered":
        places = {str(label): label for label in range(len(synsets))}
        _require_named(present, places, layout.images, f"numbers from 0 to {len(synsets) - 1}")
    else:
        _require_named(present, name_of, layout.images)
        synsets = present if layout.kind == "subset" else synsets
        places = {synset: label for label, synset in enumerate(synsets)}
    test = [(name, label) for place, label in places.items() for name in _images(folder, f"{layout.images}/{place}")]
    return [name_of[synset] for synset in synsets], {"test": test}


def _synset_names(folder: Path) -> dict[str, str]:
    """Class name by synset, of CoOp's classnames.txt: a synset, a space and a name in every line."""
    name_of: dict[str, str] = {}
    for number, line in enumerate(_lines(folder / "classnames.txt"), start=1):
        synset, _, name = line.partition(" ")
        if synset in name_of:
            raise DataError(f"'classnames.txt', line {number}: the synset {synset!r} is there twice; copy CoOp's file")
        name_of[synset] = name.strip()
    return name_of


def _class_folders(folder: Path, images: str) -> list[str]:
    """Names of the visible class folders; files beside them, such as a README.txt, do not matter."""
    return sorted(one.name for one in (folder / images).iterdir() if one.name[0] != "." and one.is_dir())


def _require_named(present: list[str], known: Mapping[str, object], where: str, expected: str = "") -> None:
    unknown = next((name for name in present if name not in known), None)
    if unknown or not present:
        found = f"the class folder {unknown!r}, which classnames.txt does not name" if unknown else "no class folder"
        expected = expected or "one folder per synset, as n01440764"
        raise DataError(f"'{where}': found {found}; expected {expected}")


def _images(folder: Path, inside: str) -> list[str]:
    """Images of one class folder, relative to ``folder``, in natural order; none if it is not there."""
    found = [path.name for path in (folder / inside).iterdir()] if (folder / inside).is_dir() else []
    kept = [name for name in found if name[0] != "." and Path(name).suffix.lower() in EXTENSIONS]
    return [f"{inside}/{name}" for name in sorted(kept, key=natural_key)]


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"'{path.name}': expected UTF-8 text ({error})") from error


_READERS: dict[str, Callable[[Layout, Path], tuple[list[str], Items]]] = {
    "split": _split_json,
    "fgvc": _fgvc,
    "imagenet": _imagenet,
    "numbered": _variant,
    "synsets": _variant,
    "subset": _variant,
}
