"""The emoji set that ships with the package: one concept drawn by several vendors, split by vendor."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from capt.data.image_set import DataSet, build
from capt.data.names import class_list
from capt.data.readers.shards import read_shard
from capt.data.sources import ShardSource
from capt.errors import DamagedFileError, DataError
from capt.files import read_json, sha256

_VERSION = 1


def shipped_folder() -> Path:
    """Folder of the shipped set inside the installed package."""
    return Path(__file__).resolve().parents[2] / "assets" / "emoji"


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
    folder = shipped_folder() if folder is None else Path(folder)
    path = folder / "index.json"
    index = read_json(path)
    try:
        if index["version"] != _VERSION:
            raise DamagedFileError(f"'{path}': version {index['version']!r}, expected {_VERSION}")
        entries = index["classes"]
        expected = {(str(item["vendor"]), str(item["key"])): int(item["class"]) for item in index["images"]}
        vendors = [(str(item["name"]), str(item["split"]), str(item["sha256"])) for item in index["vendors"]]
        classes = class_list([entry["name"] for entry in entries], f"'{path}'")
        class_groups = [str(entry["group"]) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"'{path}': not an emoji index of this package ({error!r}); install it again") from error
    listed: dict[str, list[tuple[str, int]]] = {"train": [], "test": []}
    origins: dict[str, list[str]] = {"train": [], "test": []}
    members: dict[str, tuple[str, int, int]] = {}
    for vendor, split, checksum in vendors:
        shard = folder / f"{vendor}.tar"
        if split not in listed:
            raise DamagedFileError(f"'{path}': vendor {vendor!r} has the split {split!r}, expected 'train' or 'test'")
        if not shard.is_file() or (verify and sha256(shard) != checksum):
            raise DamagedFileError(f"'{shard.name}': missing or not the file the index was made for; install it again")
        for sample in read_shard(shard):
            key = sample.name.rpartition(".")[0]
            label = expected.pop((vendor, key), None)
            if label is None or label != sample.label:
                raise DamagedFileError(
                    f"'{shard.name}': {sample.name!r} has class {sample.label}, the index says {label}"
                )
            name = f"{vendor}/{sample.name}"
            members[name] = (str(shard), sample.offset, sample.size)
            listed[split].append((name, label))
            origins[split].append(vendor)
    if expected:
        vendor, key = next(iter(expected))
        raise DamagedFileError(f"'{vendor}.tar': lacks {key!r} and {len(expected) - 1} more images of the index")
    meta: dict[str, Any] = {
        "format": "emoji",
        "index_blake2b": hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),
        "vendors": [
            {key: item.get(key) for key in ("name", "split", "package", "version", "license")}
            for item in index["vendors"]
        ],
    }
    data = build("emoji", classes, listed, ShardSource(members), root=folder, meta=meta, sources=origins)
    if groups is None:
        return data
    known = sorted(set(class_groups))
    for group in groups:
        if group not in known:
            raise DataError(f"groups: no group is named {group!r}; there are {', '.join(known)}")
    return data.select_classes([n for n, g in enumerate(class_groups) if g in groups], meta={"groups": list(groups)})
