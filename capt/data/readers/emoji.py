"""The emoji set that ships with the package: one concept drawn by several vendors, split by vendor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capt.data.image_set import DataSet, build
from capt.data.names import class_list
from capt.data.readers.vendor_tars import read_index, read_vendor_tars, shipped_folder
from capt.errors import DamagedFileError, DataError


def read_emoji(folder: str | Path | None = None, *, groups: list[str] | None = None, verify: bool = True) -> DataSet:
    """The shipped emoji: vendors marked "train" and "test" in ``index.json`` are the splits.

    An image is called "<vendor>/<key>.webp", and the vendor is its ``sources`` entry. Licences, versions and
    groups are in ``meta``.

    Args:
        folder: another folder of the same format.
        groups: only the classes of these groups.
        verify: compare each vendor's tar with its SHA-256 first.

    Raises:
        DamagedFileError: a tar is missing, changed, or does not hold what the index says.
    """
    folder = shipped_folder("emoji") if folder is None else Path(folder)
    path = folder / "index.json"

    def parse(index: Any) -> tuple[tuple[str, ...], list[str], dict[str, str]]:
        classes = class_list([entry["name"] for entry in index["classes"]], f"'{path}'")
        class_groups = [str(entry["group"]) for entry in index["classes"]]
        return classes, class_groups, {str(item["name"]): str(item["split"]) for item in index["vendors"]}

    _, (classes, class_groups, split_of) = read_index(path, parse)
    listed: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    origins: dict[str, list[str]] = {"train": [], "test": []}
    for vendor, split in split_of.items():
        if split not in listed:
            raise DamagedFileError(f"'{path}': vendor {vendor!r} has the split {split!r}, expected 'train' or 'test'")
    tars = read_vendor_tars(path, verify=verify, describe=("split",))
    for vendor, _, name, label in tars.images:
        listed[split_of[vendor]].append((name, label))
        origins[split_of[vendor]].append(vendor)
    meta = {"format": "emoji", **tars.meta}
    data = build("emoji", classes, listed, tars.source, root=folder, meta=meta, sources=origins)
    if groups is None:
        return data
    known = sorted(set(class_groups))
    for group in groups:
        if group not in known:
            raise DataError(f"groups: no group is named {group!r}; there are {', '.join(known)}")
    return data.select_classes([n for n, g in enumerate(class_groups) if g in groups], meta={"groups": list(groups)})
