"""WebDataset shards: uncompressed tar files read in place, one image with its label files per key."""

from __future__ import annotations

import glob
import json
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capt.data.decode import EXTENSIONS
from capt.data.image_set import DataSet, build
from capt.data.names import class_key, class_list, natural_key, safe_relative
from capt.data.sources import ShardSource
from capt.errors import DataError

_LABELS = (".cls", ".txt", ".json")
_MAX_LABEL_BYTES = 1 << 20
_MAX_CLASSES = 1_000_000
_BLOCK = 512
_BRACES = re.compile(r"\{([^{}]*)\}")
_NUMBER = re.compile(r"^-?[0-9]+$")
_RANGE = re.compile(r"^(\d+)\.\.(\d+)$")


@dataclass(frozen=True)
class Sample:
    """One image of a shard: member name, label as written, byte range."""

    name: str
    label: int | str
    offset: int
    size: int


def read_shard(path: Path) -> list[Sample]:
    """Index one shard; reads headers and label files, not the images.

    Raises:
        DataError: cut short or damaged; links, devices, sparse or outside members; compressed; an image without a
            label, a label without an image, a key used twice.
    """
    samples: list[Sample] = []
    images: dict[str, tuple[str, int, int]] = {}
    labels: dict[str, int | str] = {}
    for member, content in members(path):
        folder, _, base = member.name.rpartition("/")
        stem, dot, extension = base.partition(".")
        key, extension = f"{folder}/{stem}".lstrip("/"), (dot + extension).lower()
        where = f"shard '{path.name}', member {member.name!r}"
        if extension in EXTENSIONS:
            if key in images:
                raise DataError(f"{where}: a second image with the key {key!r}; keys must be unique in a shard")
            images[key] = (member.name, member.offset_data, member.size)
        elif extension in _LABELS:
            label = _label(content, extension, where)
            if label is not None and labels.setdefault(key, label) != label and extension == ".cls":
                labels[key] = label  # the class number is exact; .txt and .json may hold a caption as well
    for key, (name, offset, size) in images.items():
        if key not in labels:
            raise DataError(
                f"shard '{path.name}': the image {name!r} has no label; add {key + '.cls'!r} with its class"
            )
        samples.append(Sample(name, labels[key], offset, size))
    alone = next((key for key in labels if key not in images), None)
    if alone is not None:
        raise DataError(f"shard '{path.name}': the label of key {alone!r} has no image beside it")
    return samples


def members(path: Path) -> Iterator[tuple[tarfile.TarInfo, bytes]]:
    """Regular members with the content of label files (empty for others), after checks.

    Raises:
        DataError: cut short or damaged; links, devices, sparse or outside members; compressed.
    """
    shard = f"shard '{path.name}'"
    try:
        with open(path, "rb") as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
            for member in archive:
                where = f"{shard}, member {member.name!r}"
                if member.isdir():
                    continue
                if not member.isreg() or member.sparse is not None:
                    raise DataError(f"{where}: links, devices and sparse files are refused; store plain files only")
                safe_relative(member.name, shard)
                content = b""
                if member.name.lower().endswith(_LABELS):
                    if member.size > _MAX_LABEL_BYTES:
                        raise DataError(f"{where}: {member.size:,} bytes are too many for a label")
                    stream = archive.extractfile(member)
                    content = stream.read() if stream else b""
                yield member, content
            _check_end(raw, archive.offset, shard)
    except tarfile.TarError as error:
        raise DataError(f"{shard}: not an uncompressed tar file, or cut short ({error})") from error
    except (OSError, ValueError, OverflowError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{shard}: cannot be read ({error})") from error


def _check_end(raw: Any, offset: int, shard: str) -> None:
    # tarfile takes a damaged header in the middle, or a file cut between two members, for the end.
    raw.seek(offset)
    first = raw.read(_BLOCK)
    if len(first) < _BLOCK:
        raise DataError(f"{shard}: cut short, the end mark of the archive is missing; copy the file again")
    block = first
    while block:
        if block.strip(b"\0"):
            raise DataError(f"{shard}: damaged at byte {offset:,} or later: found data where the archive should end")
        block = raw.read(1 << 20)


def _label(content: bytes, extension: str, where: str) -> int | str | None:
    try:
        text = content.decode("utf-8-sig").strip()
        if extension == ".json":
            value = json.loads(text)
            value = next((value[key] for key in ("label", "cls", "class") if key in value), None)
            if value is None:
                return None
            if isinstance(value, bool) or not isinstance(value, (int, str)):
                raise DataError(f"{where}: expected a class number or name as label, found {value!r}")
            return value
        if extension == ".txt":
            return text
        if not _NUMBER.match(text):
            raise ValueError("not a whole number")
        return int(text)
    except DataError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{where}: expected a label, found {content[:40]!r} ({error})") from error


def expand(patterns: str | Path | Sequence[str | Path]) -> list[Path]:
    """Shard files a pattern or list of patterns names: ``{000..012}``, ``{a,b}``, ``*`` and ``?``; natural order.

    Raises:
        DataError: a pattern that names no file.
    """
    if isinstance(patterns, (str, Path)):
        patterns = [patterns]
    found: dict[str, Path] = {}
    for pattern in patterns:
        for name in sorted(set(_braces(str(pattern))), key=natural_key):
            matches = sorted(glob.glob(name), key=natural_key) if glob.has_magic(name) else [name]
            files = [match for match in matches if os.path.isfile(match)]
            if not files:
                raise DataError(f"no shard matches '{name}'; expected tar files")
            found.update((file, Path(file)) for file in files)
    return list(found.values())


def _braces(pattern: str) -> list[str]:
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    span = _RANGE.match(match[1])
    if span:
        first, last = span.groups()
        if int(last) - int(first) > 100_000:
            raise DataError(f"'{pattern}': the range names more than 100,000 shards")
        options = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        options = match[1].split(",")
    return [name for option in options for name in _braces(pattern[: match.start()] + option + pattern[match.end() :])]


def read_shards(
    train: str | Path | Sequence[str | Path],
    *,
    val: str | Path | Sequence[str | Path] | None = None,
    test: str | Path | Sequence[str | Path] | None = None,
    class_names: Sequence[str] | None = None,
    name: str = "shards",
) -> DataSet:
    """A data set from WebDataset shards, indexed in one pass and never extracted.

    An image is called "<shard without .tar>/<member>", the shard relative to the folder all shards share.

    Args:
        train, val, test: shard patterns (see :func:`expand`).
        class_names: names for the class numbers. Without it: ``classnames.txt``, one name per line, beside the
            training shards or in the folder above; else the labels themselves (text), or their numbers.
        name: what to call the data set.
    """
    shards = {split: expand(given) for split, given in (("train", train), ("val", val), ("test", test)) if given}
    files = [path for paths in shards.values() for path in paths]
    # Not resolved: download caches keep shards as links to files with meaningless names.
    root = Path(os.path.commonpath([os.path.abspath(path.parent) for path in files]))
    samples: dict[str, list[tuple[str, Sample]]] = {}
    members: dict[str, tuple[str, int, int]] = {}
    for split, paths in shards.items():
        samples[split] = []
        for path in paths:
            prefix = Path(os.path.abspath(path)).relative_to(root).as_posix().removesuffix(".tar")
            for sample in read_shard(path):
                image_name = f"{prefix}/{sample.name}"
                if image_name in members:
                    raise DataError(f"shard '{path.name}' is given for two splits, or twice; give each shard once")
                members[image_name] = (str(path), sample.offset, sample.size)
                samples[split].append((image_name, sample))
    labels = [sample.label for found in samples.values() for _, sample in found]
    if class_names is None:
        class_names = _classnames_file(files[0])
    classes, number = _numbering(labels, class_names, files[0].name)
    listed = {split: [(image, number(sample.label)) for image, sample in found] for split, found in samples.items()}
    meta = {"format": "webdataset", "shards": {split: len(paths) for split, paths in shards.items()}}
    return build(name, classes, listed, ShardSource(members), root=root, meta=meta)


def _classnames_file(shard: Path) -> list[str] | None:
    for folder in (shard.parent, shard.parent.parent):
        path = folder / "classnames.txt"
        if path.is_file():
            try:
                return [line for line in path.read_text("utf-8-sig").splitlines() if line.strip()]
            except UnicodeDecodeError as error:
                raise DataError(f"'{path}': expected UTF-8 text ({error})") from error
    return None


def _numbering(
    labels: Sequence[int | str], class_names: Sequence[str] | None, where: str
) -> tuple[tuple[str, ...], Any]:
    if class_names is None:
        texts = sorted({str(label) for label in labels}, key=natural_key)
        if labels and all(isinstance(label, int) for label in labels):
            smallest, largest = min(map(int, labels)), max(map(int, labels))
            if smallest < 0 or largest >= _MAX_CLASSES:
                wrong = smallest if smallest < 0 else largest
                raise DataError(f"'{where}': found the class number {wrong}, expected 0 to {_MAX_CLASSES - 1:,}")
            texts = [str(number) for number in range(largest + 1)]
        class_names = texts
    classes = class_list(class_names, where)
    place = {class_key(text): number for number, text in enumerate(classes)}

    def number(label: int | str) -> int:
        found = label if isinstance(label, int) else place.get(class_key(label), -1)
        if not 0 <= found < len(classes):
            raise DataError(f"'{where}': the label {label!r} is none of the {len(classes)} classes")
        return found

    return classes, number
