"""MIT-States, UT-Zappos and C-GQA as compositional zero-shot learning stores them; only read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capt.data.compositional import CompositionalSet, Pair, build_compositional
from capt.data.image_set import SPLITS
from capt.data.names import safe_relative
from capt.data.readers.t7 import read_t7
from capt.data.sources import FolderSource
from capt.errors import DataError
from capt.files import sha256

METADATA = "metadata_compositional-split-natural.t7"
PAIR_FILES = {split: f"compositional-split-natural/{split}_pairs.txt" for split in SPLITS}
_MISSING_SHOWN = 3


@dataclass(frozen=True)
class PairLayout:
    """A published data set: its folder, and its states, objects and training pairs."""

    folder: str
    title: str
    states: int
    objects: int
    seen_pairs: int


LAYOUTS = {
    layout.folder: layout
    for layout in (
        PairLayout("mit-states", "MIT-States", 115, 245, 1262),
        PairLayout("ut-zappos", "UT-Zappos", 16, 12, 83),
        PairLayout("cgqa", "C-GQA", 413, 674, 5592),
    )
}


@dataclass(frozen=True)
class _Record:
    paths: tuple[str, ...]  # where the image may lie, best first
    pair: Pair
    split: str


def read_czsl(
    dataset: str, *, root: str | Path, check_files: bool = True, follow_links: bool = False, warn: bool = True
) -> CompositionalSet:
    """One of the three published data sets, with the natural split.

    The split of an image is the ``set`` field of its record: "train", "val", or anything else for test. Images are
    never filtered by the pair file of their split, which would drop or move some; how many images show a pair that
    their split's file lacks is in ``meta``. Left out, and counted there: records whose state or set is "NA", records
    whose pair is in no pair file, and records that repeat an earlier one. An image lies at ``images/<image>``, with
    underscores or spaces in its folder's name, or where ``_image`` says, the place in the archive of UT-Zappos.

    Args:
        dataset: "mit-states", "ut-zappos" or "cgqa".
        root: folder that holds the data sets' folders, or the folder of the data set itself.
        check_files: make sure now that every image exists; else the first place it may lie at is taken.
        follow_links: accept links to anywhere, not only below the image folder.
        warn: warn if states, objects or training pairs are not as many as published.

    Raises:
        DataError: a file is missing or does not have its form; images are missing; or as :func:`build_compositional`.
    """
    layout = LAYOUTS.get(dataset)
    if layout is None:
        raise DataError(f"'czsl:{dataset}': unknown data set; there are {', '.join(LAYOUTS)}")
    folder = _folder(layout, Path(root))
    pair_lists = {split: read_pair_file(folder / file) for split, file in PAIR_FILES.items()}
    known = {pair for listed in pair_lists.values() for pair in listed}
    records, skipped = _kept(folder / METADATA, known)
    members = _members(layout, folder, records, check_files)
    listed = {split: frozenset(pairs) for split, pairs in pair_lists.items()}
    unlisted = {split: sum(pair not in listed[split] for _, pair in members[split]) for split in SPLITS}
    meta: dict[str, Any] = {
        "format": "czsl",
        "dataset": layout.folder,
        "sha256": {file: sha256(folder / file) for file in (METADATA, *PAIR_FILES.values())},
        "skipped_records": skipped,
        "images_of_pairs_their_split_does_not_list": unlisted,
    }
    source = FolderSource(folder, (folder / "images", folder / "_images"), follow_links=follow_links)
    data = build_compositional(layout.title, pair_lists, members, source, root=folder, meta=meta)
    difference = _differences(layout, data)
    if difference:
        data.data.meta["differs_from_published"] = difference
        if warn:
            warnings.warn(f"'czsl:{dataset}': not the published data set: {'; '.join(difference)}", stacklevel=2)
    return data


def read_pair_file(path: Path) -> list[Pair]:
    """The pairs of ``{train,val,test}_pairs.txt``, "state object" a line, in their order; blank last lines are fine.

    Raises:
        DataError: no such file; a line that is not two words; not UTF-8.
    """
    try:
        lines = path.read_text("utf-8").rstrip().splitlines()
    except OSError as error:
        raise DataError(f"'{path}': cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}': expected UTF-8 text ({error})") from error
    pairs = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if len(words) != 2:
            raise DataError(f"'{path}', line {number}: expected a state and an object, two words, found {line!r:.80}")
        pairs.append((words[0], words[1]))
    return pairs


def _folder(layout: PairLayout, root: Path) -> Path:
    folder = root / layout.folder if (root / layout.folder).is_dir() else root
    missing = [name for name in (METADATA, *PAIR_FILES.values()) if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"'czsl:{layout.folder}': '{folder}' lacks the file {', '.join(repr(name) for name in missing)}; "
            f"root= is the folder in which '{layout.folder}' lies, or that folder itself"
        )
    return folder


def _kept(path: Path, known: set[Pair]) -> tuple[list[_Record], dict[str, int]]:
    """The records that count, and how many do not, by reason."""
    value = read_t7(path)
    if not isinstance(value, list) or not value:
        raise DataError(f"'{path}': expected a list of records, found {type(value).__name__}")
    skipped = {"not_annotated": 0, "pair_in_no_list": 0, "repeated": 0}
    records: dict[str, _Record] = {}
    for number, entry in enumerate(value):
        where = f"'{path}', record {number}"
        image, state, thing, split = _texts(entry, where)
        if "NA" in (state, split):
            skipped["not_annotated"] += 1
        elif (state, thing) not in known:
            skipped["pair_in_no_list"] += 1
        else:
            original = entry.get("_image")
            paths = tuple(_places(image, original if isinstance(original, str) else None, where))
            record = _Record(paths, (state, thing), split if split in ("train", "val") else "test")
            if records.setdefault(paths[0], record) is not record:
                if records[paths[0]] != record:
                    raise DataError(f"{where}: the image {image!r} is listed before with another pair or set")
                skipped["repeated"] += 1
    return list(records.values()), skipped


def _texts(entry: Any, where: str) -> list[str]:
    fields = [entry.get(name) for name in ("image", "attr", "obj", "set")] if isinstance(entry, dict) else [None]
    texts = [field for field in fields if isinstance(field, str)]
    if len(texts) != 4:
        raise DataError(f"{where}: expected the texts image, attr, obj and set")
    return texts


def _places(image: str, original: str | None, where: str) -> Iterable[str]:
    path = safe_relative(image, where)
    folder, _, base = path.rpartition("/")
    names = [path, *(f"{re.sub(*change, folder)}/{base}" for change in ((" ", "_"), ("_", " ")) if folder)]
    yield from dict.fromkeys(f"images/{name}" for name in names)
    if original is not None:
        for place in ("images", "_images"):
            yield f"{place}/{safe_relative(original, where)}"


def _members(
    layout: PairLayout, folder: Path, records: list[_Record], check_files: bool
) -> dict[str, list[tuple[str, Pair]]]:
    members: dict[str, list[tuple[str, Pair]]] = {split: [] for split in SPLITS}
    missing = []
    for record in records:
        path = record.paths[0]
        if check_files:
            path = next((place for place in record.paths if (folder / place).is_file()), "")
            if not path:
                missing.append(record.paths[0])
                continue
        members[record.split].append((path, record.pair))
    if missing:
        shown = ", ".join(repr(path) for path in missing[:_MISSING_SHOWN])
        raise DataError(
            f"'czsl:{layout.folder}': {len(missing):,} of {len(records):,} images are missing in '{folder}': {shown}"
            + (" ..." if len(missing) > _MISSING_SHOWN else "")
        )
    return members


def _differences(layout: PairLayout, data: CompositionalSet) -> list[str]:
    counts = (
        ("states", len(data.states), layout.states),
        ("objects", len(data.objects), layout.objects),
        ("training pairs", len(data.split_pairs["train"]), layout.seen_pairs),
    )
    return [f"{found:,} {what}, expected {expected:,}" for what, found, expected in counts if found != expected]
