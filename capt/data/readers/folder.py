"""Folder per class: ``root/<class>/image`` or ``root/{train,val,test}/<class>/image``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from capt.data.decode import EXTENSIONS
from capt.data.image_set import DataSet, build
from capt.data.names import class_key, class_list, is_inside, natural_key, safe_relative
from capt.data.sources import FolderSource
from capt.errors import DataError

_SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_MAX_DEPTH = 32


def read_folder(
    root: str | Path,
    *,
    layout: Literal["auto", "splits", "plain"] = "auto",
    follow_links: bool = False,
    name: str | None = None,
) -> DataSet:
    """A data set from folders named after the classes.

    Classes and images are in natural order ("2" before "10"). Hidden files and files that are no images are
    ignored; images in sub-folders of a class belong to it. Nothing is ever written.

    Args:
        root: folder with one folder per class, or with ``train`` and, if wanted, ``val`` and ``test``.
        layout: "auto" takes split folders for what they are when there is nothing beside them; "plain" says they
            are classes with such names, "splits" that everything beside them is to be ignored.
        follow_links: accept links that lead out of ``root``.
        name: what to call the data set; default: the folder's name.

    Raises:
        DataError: no class folder; a class without images; two class names that are the same text; a link out of
            the folder; a class that only val or test has.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"'{root}': expected a folder with one sub-folder per class, found no such folder")
    scan = _Scan(root, follow_links)
    folders = scan.folders("")
    if not folders:
        raise DataError(f"'{root}': found no sub-folder; expected one per class, as in {root.name or '.'}/cat/1.jpg")
    split_of = {folder: _SPLIT_NAMES[folder] for folder in folders if folder in _SPLIT_NAMES}
    with_classes = [folder for folder in split_of if scan.folders(folder)]
    if layout == "auto":
        others = [folder for folder in folders if folder not in split_of]
        if others and with_classes:
            raise DataError(
                f"'{root}': {with_classes[0]!r} looks like a split but {others[0]!r} stands beside it; pass "
                "layout='splits' to ignore what is no split, or layout='plain' if all of them are classes"
            )
        layout = "splits" if with_classes else "plain"
    if layout == "plain":
        split_folders = {"train": ""}
    else:
        if len(set(split_of.values())) < len(split_of):
            raise DataError(f"'{root}': two of the folders {sorted(split_of)} mean the same split; rename one")
        split_folders = {split_of[folder]: folder for folder in split_of}
        if not split_folders:
            raise DataError(f"'{root}': found no folder named train, val or test; use layout='plain'")
    found = {split: scan.classes(folder, str(root)) for split, folder in split_folders.items()}
    main = "train" if "train" in found else next(iter(found))
    names = list(found[main])
    if main != "train" and len(found) > 1:
        names = sorted({one for classes in found.values() for one in classes}, key=natural_key)
    classes = class_list(names, f"'{root}'")
    label_of = {class_key(one): label for label, one in enumerate(classes)}
    listed: dict[str, list[tuple[str, int]]] = {}
    for split, members in found.items():
        listed[split] = []
        for folder, images in members.items():
            label = label_of.get(class_key(folder))
            if label is None:
                raise DataError(
                    f"'{root}': the class {folder!r} is in {split_folders[split]!r} but not in "
                    f"{split_folders[main]!r}; add training images or remove it"
                )
            listed[split].extend((image, label) for image in images)
    meta: dict[str, Any] = {"format": "folder", "layout": layout, "ignored_files": scan.ignored}
    source = FolderSource(root, follow_links=follow_links)
    return build(name or root.resolve().name, classes, listed, source, root=root, meta=meta)


class _Scan:
    """Walks a folder without leaving it; paths are relative, with forward slashes."""

    def __init__(self, root: Path, follow_links: bool) -> None:
        self.root = root
        self.follow_links = follow_links
        self.ignored = 0
        self._real = (os.path.realpath(root),)

    def _entries(self, relative: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(self.root / relative) as entries:
                visible = [entry for entry in entries if not entry.name.startswith(".")]
        except OSError as error:
            raise DataError(f"'{relative or self.root}': cannot be listed ({error.strerror})") from error
        for entry in visible:
            safe_relative(entry.name, f"'{self.root}'")  # undecodable names
            if entry.is_symlink() and not self.follow_links and not is_inside(entry.path, self._real):
                raise DataError(
                    f"'{self.root}': {_join(relative, entry.name)!r} is a link that leads out of the folder; replace "
                    "it by what it points to, or pass follow_links=True"
                )
        return sorted(visible, key=lambda entry: natural_key(entry.name))

    def folders(self, relative: str) -> list[str]:
        """Names of the visible folders."""
        return [entry.name for entry in self._entries(relative) if entry.is_dir()]

    def classes(self, relative: str, where: str) -> dict[str, list[str]]:
        """Class folder -> its images."""
        names = self.folders(relative)
        if not names:
            raise DataError(f"{where}: {relative!r} holds no class folder; expected one sub-folder per class")
        class_list(names, f"'{_join(where, relative)}'")
        result = {}
        for folder in names:
            path = _join(relative, folder)
            before = self.ignored
            images = self._images(path, 0)
            if not images:
                others = self.ignored - before
                hint = f" ({others} other files there)" if others else ""
                raise DataError(f"'{path}': the class {folder!r} has no image{hint}; add some or remove the folder")
            result[folder] = images
        return result

    def _images(self, relative: str, depth: int) -> list[str]:
        if depth > _MAX_DEPTH:
            raise DataError(f"'{relative}': more than {_MAX_DEPTH} folders deep; is there a link to a folder above?")
        images = []
        for entry in self._entries(relative):
            path = _join(relative, entry.name)
            if entry.is_dir():
                images.extend(self._images(path, depth + 1))
            elif entry.is_file() and os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                images.append(path)
            else:
                self.ignored += 1
        return images


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder and name else folder or name
