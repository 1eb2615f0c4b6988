"""The compositional set that ships with the package: (state, object) pairs drawn by several vendors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capt.data.compositional import CompositionalSet, Pair, build_compositional
from capt.data.image_set import SPLITS
from capt.data.readers.vendor_tars import read_index, read_vendor_tars, shipped_folder
from capt.errors import DamagedFileError


def read_emoji_pairs(folder: str | Path | None = None, *, verify: bool = True) -> CompositionalSet:
    """The shipped compositional set; ``index.json`` gives the split of every pair and of every image.

    The pairs of a split are those that its images show. An image is called "<vendor>/<key>.webp", and the vendor is
    its ``sources`` entry. Licences and versions are in ``meta``.

    Args:
        folder: another folder of the same format.
        verify: compare each vendor's tar with its SHA-256 first.

    Raises:
        DamagedFileError: a tar is missing, changed, or does not hold what the index says; an image of an unseen pair
            in another split than that of its pair.
    """
    folder = shipped_folder("emoji_pairs") if folder is None else Path(folder)
    path = folder / "index.json"

    def parse(index: Any) -> tuple[list[Pair], dict[tuple[str, str], str]]:
        pairs = [(str(entry["state"]), str(entry["object"])) for entry in index["classes"]]
        pair_splits = [str(entry["split"]) for entry in index["classes"]]
        for item in index["images"]:
            allowed = pair_splits[item["class"]]
            if item["split"] not in SPLITS or allowed not in ("train", item["split"]):
                raise DamagedFileError(
                    f"'{path}': the {item['split']} image {item['key']!r} by {item['vendor']} shows "
                    f"{' '.join(pairs[item['class']])!r}, a pair of {allowed!r}"
                )
        return pairs, {(item["vendor"], item["key"]): str(item["split"]) for item in index["images"]}

    _, (pairs, split_of) = read_index(path, parse)
    tars = read_vendor_tars(path, verify=verify)
    members: dict[str, list[tuple[str, Pair]]] = {split: [] for split in SPLITS}
    origins: dict[str, list[str]] = {split: [] for split in SPLITS}
    for vendor, key, name, label in tars.images:
        split = split_of[vendor, key]
        members[split].append((name, pairs[label]))
        origins[split].append(vendor)
    pair_lists = {split: sorted({pair for _, pair in items}) for split, items in members.items()}
    meta = {"format": "emoji pairs", **tars.meta}
    return build_compositional("emoji-pairs", pair_lists, members, tars.source, root=folder, meta=meta, sources=origins)
