"""COCO-LT and VOC-LT as long-tailed multi-label learning stores them; only read, and never a pickle."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capt.data.multi_label import MultiLabelSet, build_multi_label
from capt.data.names import class_list, safe_relative
from capt.data.sources import FolderSource
from capt.errors import DataError
from capt.files import sha256

_MISSING_SHOWN = 3


@dataclass(frozen=True)
class ListLayout:
    """A published data set: where its lists and images lie, and what they hold.

    Attributes:
        folder: folder of the data set below that of all.
        images: folder below ``folder`` that the paths of the lists start from.
        train, test: images of each list.
        frequency: training images of each class.
    """

    title: str
    folder: str
    images: str
    train: int
    test: int
    frequency: tuple[int, ...]

    @property
    def files(self) -> dict[str, str]:
        """The lists by what they are, below ``folder``."""
        lists = {split: f"{self.folder}_lt_{split}.txt" for split in ("train", "test")}
        return {**lists, "labels": f"{self.folder}_labels.txt"}


LAYOUTS = {
    "coco-lt": ListLayout("COCO-LT", "coco", "data", 1909, 5000, (
        1128, 37, 276, 32, 9, 41, 18, 87, 20, 50, 11, 13, 8, 97, 19, 49, 70, 17, 7, 10,
        8, 6, 7, 7, 100, 39, 189, 31, 24, 11, 12, 8, 35, 10, 25, 21, 17, 10, 20, 460,
        84, 498, 126, 207, 173, 366, 39, 35, 44, 36, 29, 25, 14, 45, 16, 73, 585, 153, 164, 44,
        624, 25, 200, 137, 70, 89, 73, 127, 91, 175, 9, 237, 119, 292, 87, 113, 15, 21, 6, 11,
    )),
    "voc-lt": ListLayout("VOC-LT", "voc", "", 1142, 4952, (
        6, 34, 8, 14, 154, 17, 249, 29, 479, 4, 240, 48, 11, 20, 775, 100, 5, 82, 7, 64,
    )),
}  # fmt: skip


def read_long_tail_lists(
    dataset: str, *, root: str | Path, check_files: bool = True, follow_links: bool = False, warn: bool = True
) -> MultiLabelSet:
    """One of the two published data sets.

    A list has an image a line: a path and the numbers of its classes, in any order, none, or some twice. The class
    file has "name number" a line; the name may have spaces. Class frequencies are counted in the training list; the
    pickle that comes with the lists is not needed and not read. There is no validation split: hold one out of the
    training images (``val_fraction`` of :func:`capt.data.load_multi_label`).

    Args:
        dataset: "coco-lt" or "voc-lt".
        root: folder that holds ``coco`` and ``voc``, or the folder of the data set itself.
        check_files: make sure now that every image exists.
        follow_links: accept links to anywhere, not only below the image folder.
        warn: warn if images or class frequencies are not as published.

    Raises:
        DataError: a file is missing or a line is wrong, which is named; images are missing.
    """
    layout = LAYOUTS.get(dataset)
    if layout is None:
        raise DataError(f"'{dataset}': unknown data set; there are {', '.join(LAYOUTS)}")
    folder = _folder(dataset, layout, Path(root))
    classes = read_class_file(folder / layout.files["labels"])
    members = {split: read_image_list(folder / layout.files[split], len(classes)) for split in ("train", "test")}
    images = folder / layout.images
    if check_files:
        listed = [path for items in members.values() for path, _ in items]
        missing = [path for path in listed if not (images / path).is_file()]
        if missing:
            shown = ", ".join(map(repr, missing[:_MISSING_SHOWN])) + (" ..." if len(missing) > _MISSING_SHOWN else "")
            raise DataError(
                f"'{dataset}': {len(missing):,} of {len(listed):,} images are missing in '{images}': {shown}"
            )
    meta: dict[str, Any] = {
        "format": "long-tail lists",
        "dataset": dataset,
        "sha256": {file: sha256(folder / file) for file in layout.files.values()},
    }
    source = FolderSource(images, follow_links=follow_links)
    data = build_multi_label(layout.title, classes, members, source, root=folder, meta=meta)
    difference = _differences(layout, data)
    if difference:
        data.meta["differs_from_published"] = difference
        if warn:
            warnings.warn(f"'{dataset}': not the published data set: {'; '.join(difference)}", stacklevel=2)
    return data


def read_class_file(path: Path) -> tuple[str, ...]:
    """Class names by number, from lines "name number": the last word is the number, the rest is the name.

    Raises:
        DataError: no number; a number that is given twice or left out; an unusable name.
    """
    names: dict[int, str] = {}
    for line, text in _lines(path):
        name, _, last = text.rpartition(" ")
        if not name.strip() or not (last.isascii() and last.isdigit()):
            raise DataError(f"'{path}', line {line}: expected a class name and its number, found {text!r:.80}")
        if int(last) in names:
            raise DataError(f"'{path}', line {line}: the number {last} is given to {names[int(last)]!r} already")
        names[int(last)] = name.strip()
    missing = next((number for number in range(len(names)) if number not in names), None)
    if missing is not None:
        raise DataError(f"'{path}': no class has the number {missing}; expected 0 to {len(names) - 1}, each once")
    return class_list([names[number] for number in range(len(names))], f"'{path}'")


def read_image_list(path: Path, n_classes: int) -> list[tuple[str, list[int]]]:
    """(path of the image, class numbers) a line; blank lines are nothing.

    Raises:
        DataError: a class number that is none; an image that is listed twice.
    """
    items = []
    line_of: dict[str, int] = {}
    for line, text in _lines(path):
        where = f"'{path}', line {line}"
        image, *words = text.split()
        for word in words:
            if not (word.isascii() and word.isdigit() and len(word) < 10 and int(word) < n_classes):
                raise DataError(f"{where}: the class number {word!r} is none of 0 to {n_classes - 1}")
        image = safe_relative(image, where)
        if image in line_of:
            raise DataError(f"{where}: {image!r} is already listed in line {line_of[image]}; remove one")
        line_of[image] = line
        items.append((image, [int(word) for word in words]))
    return items


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"'{path}': cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}': expected UTF-8 text ({error})") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    if not lines:
        raise DataError(f"'{path}': the file is empty")
    return lines


def _folder(dataset: str, layout: ListLayout, root: Path) -> Path:
    folder = root / layout.folder if (root / layout.folder).is_dir() else root
    missing = [file for file in layout.files.values() if not (folder / file).is_file()]
    if missing:
        raise DataError(
            f"'{dataset}': '{folder}' lacks {', '.join(map(repr, missing))}; root= is the folder in which "
            f"'{layout.folder}' lies, or that folder itself"
        )
    return folder


def _differences(layout: ListLayout, data: MultiLabelSet) -> list[str]:
    assert data.test is not None
    sizes = (("training", len(data.train), layout.train), ("test", len(data.test), layout.test))
    found = [f"{count:,} {what} images, expected {wanted:,}" for what, count, wanted in sizes if count != wanted]
    if len(data.classes) != len(layout.frequency):
        return [*found, f"{len(data.classes)} classes, expected {len(layout.frequency)}"]
    other = [c for c, wanted in enumerate(layout.frequency) if data.frequency[c] != wanted]
    if other:
        first = other[0]
        found.append(
            f"{len(other)} classes have other training frequencies, first {data.classes[first]!r}: "
            f"{data.frequency[first]}, expected {layout.frequency[first]}"
        )
    return found
