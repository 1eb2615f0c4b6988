"""The multi-label set that ships with the package: public-domain clip art with what it shows, long-tailed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from capt.data.image_set import SPLITS
from capt.data.multi_label import MultiLabelSet, build_multi_label
from capt.data.names import class_list
from capt.data.readers.shards import members as tar_members
from capt.data.readers.vendor_tars import check_shard, read_index, shipped_folder
from capt.data.sources import ShardSource
from capt.errors import DamagedFileError


def read_clipart(folder: str | Path | None = None, *, verify: bool = True) -> MultiLabelSet:
    """The shipped multi-label set: one tar a split; ``index.json`` gives the classes of every picture.

    An image is called "<split>/<place in Open Clip Art>.webp". Package, version and licence are in ``meta``.

    Args:
        folder: another folder of the same format.
        verify: compare each tar with its SHA-256 first.

    Raises:
        DamagedFileError: a tar is missing, changed, or does not hold what the index says.
    """
    folder = shipped_folder("clipart") if folder is None else Path(folder)
    path = folder / "index.json"

    def parse(index: Any) -> tuple[tuple[str, ...], dict[str, str], dict[tuple[str, str], list[int]]]:
        classes = class_list(index["classes"], f"'{path}'")
        checksums = {str(item["name"]): str(item["sha256"]) for item in index["tars"]}
        expected = {
            (str(item["split"]), str(item["key"])): [int(n) for n in item["labels"]] for item in index["images"]
        }
        for labels in expected.values():
            if not 0 <= min(labels) <= max(labels) < len(classes):
                raise ValueError(f"labels {labels} of {len(classes)} classes")
        return classes, {split: checksums[split] for split in SPLITS}, expected

    index, (classes, checksums, expected) = read_index(path, parse)
    members: dict[str, list[tuple[str, list[int]]]] = {}
    places: dict[str, tuple[str, int, int]] = {}
    for split, checksum in checksums.items():
        members[split] = []
        shard = folder / f"{split}.tar"
        check_shard(shard, checksum, verify=verify)
        for member, _ in tar_members(shard):
            labels = expected.pop((split, member.name.removesuffix(".webp")), None)
            if labels is None:
                raise DamagedFileError(f"'{shard.name}': {member.name!r} is no {split} image of the index")
            name = f"{split}/{member.name}"
            members[split].append((name, labels))
            places[name] = (str(shard), member.offset_data, member.size)
    if expected:
        split, key = next(iter(expected))
        raise DamagedFileError(f"'{split}.tar': lacks {key!r} and {len(expected) - 1} more images of the index")
    meta = {
        "format": "clipart",
        "index_blake2b": hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),
        **{key: index["package"].get(key) for key in ("package", "version", "license")},
    }
    return build_multi_label("clipart", classes, members, ShardSource(places), root=folder, meta=meta)
