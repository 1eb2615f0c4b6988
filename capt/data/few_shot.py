"""Few-shot lists, held-out fractions and the base/novel split: all of them deterministic and recorded."""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from capt.data.image_set import DataSet, ImageSet
from capt.data.names import class_key
from capt.errors import DamagedFileError, DataError
from capt.files import read_json, write_json

_FORMAT = "capt.few_shot"
_VERSION = 1


def few_shot(image_set: ImageSet, shots: int, seed: int) -> ImageSet:
    """``shots`` images of each class.

    Every image of a class gets a BLAKE2b hash of (seed, class name, image name), and the ``shots`` smallest are
    taken. So the choice for a class depends on nothing but those: not on the order of the images, other classes,
    the platform or any library's random numbers; and 4 shots are part of 8 shots of the same seed. A class with
    fewer images gives all it has, once; ``meta["few_shot"]["short_classes"]`` records it. Source: ours.

    Args:
        image_set: images to choose from, normally a training split.
        shots: images of each class, at least 1.
        seed: any whole number; 0 is a seed like any other.

    Returns:
        the chosen images, class by class, with their ids.
    """
    if isinstance(shots, bool) or not isinstance(shots, (int, np.integer)) or shots < 1:
        raise DataError(f"shots: found {shots!r}, expected a whole number of at least 1")
    chosen: list[int] = []
    short: dict[str, int] = {}
    for name, ranked in zip(image_set.classes, _ranked(image_set, seed, "few-shot"), strict=True):
        chosen.extend(ranked[:shots])
        if len(ranked) < shots:
            short[name] = len(ranked)
    record = {"shots": int(shots), "seed": int(seed), "short_classes": short}
    return image_set.subset(np.array(chosen, dtype=np.int64), meta={"few_shot": record})


def hold_out(image_set: ImageSet, fraction: float, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Split a set in two, class by class, by the same kind of hash as :func:`few_shot`.

    Args:
        image_set: the images.
        fraction: part of each class to hold out, rounded to the nearest count; at least one image and at most all
            but one. A class with a single image keeps it.
        seed: any whole number.

    Returns:
        (kept, held out), each in the order of ``image_set``.
    """
    if not 0 < fraction < 1:
        raise DataError(f"test_fraction: found {fraction}, expected a number between 0 and 1")
    held = np.zeros(len(image_set), dtype=np.bool_)
    for ranked in _ranked(image_set, seed, "hold-out"):
        if len(ranked) > 1:
            held[ranked[: min(max(1, math.floor(len(ranked) * fraction + 0.5)), len(ranked) - 1)]] = True
    record = {"hold_out": {"fraction": fraction, "seed": int(seed)}}
    return image_set.subset(~held, meta=record), image_set.subset(held, meta=record)


def _ranked(image_set: ImageSet, seed: int, purpose: str) -> list[list[int]]:
    """Positions of the images of each class, by hash."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise DataError(f"seed: found {seed!r}, expected a whole number")
    ranked: list[list[tuple[bytes, str, int]]] = [[] for _ in image_set.classes]
    prefixes = [f"{purpose}\0{int(seed)}\0{class_key(name)}\0".encode() for name in image_set.classes]
    for position, (label, name) in enumerate(zip(image_set.labels.tolist(), image_set.names, strict=True)):
        # NFC: some file systems hand back another spelling of the same file name.
        text = unicodedata.normalize("NFC", name)
        digest = hashlib.blake2b(prefixes[label] + text.encode(), digest_size=16).digest()
        ranked[label].append((digest, text, position))
    return [[position for _, _, position in sorted(one)] for one in ranked]


def save_few_shot(path: str | Path, image_set: ImageSet) -> str:
    """Write which images a few-shot set has: names, ids and labels, never an absolute path.

    Args:
        path: JSON file to write, atomically.
        image_set: what :func:`few_shot` returned.

    Returns:
        the BLAKE2b hash stored in the file; the same list has the same hash on every machine.
    """
    record: dict[str, Any] = {
        "format": _FORMAT,
        "version": _VERSION,
        # The hash of a list that was loaded is no part of the list.
        **{key: value for key, value in image_set.meta.get("few_shot", {}).items() if key != "blake2b"},
        "classes": list(image_set.classes),
        "images": [
            {"name": unicodedata.normalize("NFC", name), "id": identity, "label": label}
            for name, identity, label in zip(
                image_set.names, image_set.ids.tolist(), image_set.labels.tolist(), strict=True
            )
        ],
    }
    record["blake2b"] = _hash(record)
    write_json(path, record)
    return str(record["blake2b"])


def load_few_shot(path: str | Path, image_set: ImageSet) -> ImageSet:
    """The images of ``image_set`` that a file of :func:`save_few_shot` lists, in its order.

    Raises:
        DamagedFileError: the file was changed after it was written, or is no such file.
        DataError: it belongs to other data: class names, image names, labels or ids differ.
    """
    record = read_json(path)
    if not isinstance(record, dict) or record.get("format") != _FORMAT or record.get("version") != _VERSION:
        raise DamagedFileError(
            f"'{path}': expected a {_FORMAT} file of version {_VERSION}; write it with save_few_shot"
        )
    stored = record.pop("blake2b", None)
    if stored != _hash(record):
        raise DamagedFileError(
            f"'{path}': the list does not match its own hash; it was changed after it was written. "
            "Restore it or make it again with save_few_shot."
        )
    try:
        classes, items = (
            tuple(record["classes"]),
            [(item["name"], item["label"], item["id"]) for item in record["images"]],
        )
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"'{path}': lacks a part of a {_FORMAT} file ({error!r}); make it again") from error
    if classes != image_set.classes:
        raise DataError(
            f"'{path}': lists images of {len(classes)} classes, but this data set has other class names "
            f"({len(image_set.classes)}); use the data set the list was made from"
        )
    place = {unicodedata.normalize("NFC", name): position for position, name in enumerate(image_set.names)}
    chosen = []
    for name, label, identity in items:
        position = place.get(name)
        if position is None:
            raise DataError(f"'{path}': the image {name!r} is not in this data set")
        if (image_set.labels[position], image_set.ids[position]) != (label, identity):
            raise DataError(
                f"'{path}': the image {name!r} has label {label} and id {identity} in the list, "
                f"but {image_set.labels[position]} and {image_set.ids[position]} here; files were added or moved"
            )
        chosen.append(position)
    meta = {key: value for key, value in record.items() if key not in ("format", "version", "classes", "images")}
    return image_set.subset(np.array(chosen, dtype=np.int64), meta={"few_shot": {**meta, "blake2b": stored}})


def _hash(record: dict[str, Any]) -> str:
    text = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def base_novel(data: DataSet, base: Sequence[str] | None = None) -> tuple[DataSet, DataSet]:
    """Base and novel classes of the base-to-novel protocol.

    The first ceil(n / 2) classes are base, so an odd one goes to base; the rest is novel. Novel labels are
    numbered from 0 again; image ids stay. Source: CoOp's base-to-new protocol (CAPT, section "Experiments").

    Args:
        data: a data set with at least two classes.
        base: names of the base classes instead, in the order their labels shall have.

    Returns:
        (base, novel).
    """
    n_classes = len(data.classes)
    if base is None:
        base_ids = list(range((n_classes + 1) // 2))
    else:
        place = {class_key(name): label for label, name in enumerate(data.classes)}
        unknown = [name for name in base if class_key(name) not in place]
        if unknown:
            raise DataError(f"base: no class is named {unknown[0]!r}; expected names from the data set's class list")
        base_ids = [place[class_key(name)] for name in base]
    chosen = set(base_ids)
    novel_ids = [label for label in range(n_classes) if label not in chosen]
    if not base_ids or not novel_ids:
        raise DataError(
            f"'{data.name}': {n_classes} classes cannot be split into base and novel; both need one or more"
        )
    base_half, novel_half = (
        data.select_classes(ids, meta={"classes_used": which}).with_splits({}, name=f"{data.name} ({which})")
        for which, ids in (("base", base_ids), ("novel", novel_ids))
    )
    return base_half, novel_half
