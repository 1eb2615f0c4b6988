"""Shipped image sets: an index with checksums beside one uncompressed tar for each vendor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from capt.data.readers.shards import read_shard
from capt.data.sources import ShardSource
from capt.errors import DamagedFileError
from capt.files import read_json, sha256

_VERSION = 1
_Parsed = TypeVar("_Parsed")


@dataclass(frozen=True)
class VendorTars:
    """Images of a shipped set: where they are, and (vendor, key, image name, class number), vendor by vendor."""

    source: ShardSource
    images: list[tuple[str, str, str, int]]
    meta: dict[str, Any]


def shipped_folder(name: str) -> Path:
    """Folder of a shipped set inside the installed package."""
    return Path(__file__).resolve().parents[2] / "assets" / name


def read_index(path: Path, parse: Callable[[Any], _Parsed]) -> tuple[Any, _Parsed]:
    """The index as it is, and what ``parse`` makes of it.

    Raises:
        DamagedFileError: another version, or ``parse`` does not find what it looks for.
    """
    index = read_json(path)
    try:
        if index["version"] != _VERSION:
            raise DamagedFileError(f"'{path}': version {index['version']!r}, expected {_VERSION}")
        return index, parse(index)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        if isinstance(error, DamagedFileError):
            raise
        raise DamagedFileError(f"'{path}': not an index of this package ({error!r}); install it again") from error


def check_shard(shard: Path, checksum: str, *, verify: bool) -> None:
    """Make sure that a shipped tar is there and, with ``verify``, that its SHA-256 is ``checksum``.

    Raises:
        DamagedFileError: it is not.
    """
    if not shard.is_file() or (verify and sha256(shard) != checksum):
        raise DamagedFileError(f"'{shard.name}': missing or not the file the index was made for; install it again")


def read_vendor_tars(path: Path, *, verify: bool, describe: tuple[str, ...] = ()) -> VendorTars:
    """The images that an index lists, each called "<vendor>/<key>.webp".

    Args:
        path: the index; its tars lie beside it.
        verify: compare each tar with its SHA-256 first.
        describe: what else of a vendor's entry to keep in ``meta`` beside package, version and licence.

    Raises:
        DamagedFileError: a tar is missing, changed, or does not hold what the index says.
    """

    def parse(index: Any) -> tuple[dict[tuple[str, str], int], list[tuple[str, str]]]:
        expected = {(str(item["vendor"]), str(item["key"])): int(item["class"]) for item in index["images"]}
        return expected, [(str(item["name"]), str(item["sha256"])) for item in index["vendors"]]

    index, (expected, vendors) = read_index(path, parse)
    members: dict[str, tuple[str, int, int]] = {}
    images: list[tuple[str, str, str, int]] = []
    for vendor, checksum in vendors:
        shard = path.parent / f"{vendor}.tar"
        check_shard(shard, checksum, verify=verify)
        for sample in read_shard(shard):
            key = sample.name.rpartition(".")[0]
            label = expected.pop((vendor, key), None)
            if label is None or label != sample.label:
                raise DamagedFileError(
                    f"'{shard.name}': {sample.name!r} has class {sample.label}, the index says {label}"
                )
            name = f"{vendor}/{sample.name}"
            members[name] = (str(shard), sample.offset, sample.size)
            images.append((vendor, key, name, label))
    if expected:
        vendor, key = next(iter(expected))
        raise DamagedFileError(f"'{vendor}.tar': lacks {key!r} and {len(expected) - 1} more images of the index")
    return VendorTars(ShardSource(members), images, _meta(index, path, describe))


def _meta(index: Mapping[str, Any], path: Path, describe: tuple[str, ...]) -> dict[str, Any]:
    kept = ("name", *describe, "package", "version", "license")
    return {
        "index_blake2b": hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),
        "vendors": [{key: item.get(key) for key in kept} for item in index["vendors"]],
    }
