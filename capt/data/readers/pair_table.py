"""Lists of compositional images: CSV or TSV with the columns ``path,state,object,split``, or JSONL with these keys."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from capt.data.compositional import CompositionalSet, Pair, build_compositional
from capt.data.image_set import SPLITS
from capt.data.names import normal_class_name
from capt.data.readers.table import has_columns, read_rows
from capt.data.sources import FolderSource
from capt.errors import DataError


def read_pair_table(
    file: str | Path,
    *,
    root: str | Path | None = None,
    check_files: bool = True,
    follow_links: bool = False,
    name: str | None = None,
) -> CompositionalSet:
    """A compositional data set from a list of images.

    The pairs of a split are those that its images show, sorted; a pair without training image is unseen. Every row
    needs a split.

    Args:
        file: UTF-8 ``.csv``, ``.tsv``, ``.jsonl`` or ``.ndjson``.
        root: folder the paths are relative to; default: the file's folder. Paths may not leave it.
        check_files: make sure now that every image file exists.
        follow_links: accept links that lead out of ``root``.
        name: what to call the data set; default: the file's name.

    Raises:
        DataError: names the line and what is wrong with it; or as :func:`build_compositional`.
    """
    file = Path(file)
    folder = file.parent if root is None else Path(root)
    members: dict[str, list[tuple[str, Pair]]] = {split: [] for split in SPLITS}
    for row in read_rows(file, ("state", "object"), folder=folder, check_files=check_files):
        where = f"'{file}', line {row.line}"
        if not row.split:
            raise DataError(f"{where}: no split; compositional lists need train, val or test in every row")
        state, thing = (normal_class_name(str(label), where) for label in row.labels)
        members[row.split].append((row.path, (state, thing)))
    pair_lists = {split: sorted({pair for _, pair in items}) for split, items in members.items()}
    meta: dict[str, Any] = {"format": "pair table", "file": file.name}
    source = FolderSource(folder, follow_links=follow_links)
    return build_compositional(name or file.stem, pair_lists, members, source, root=folder, meta=meta)


def is_pair_table(file: str | Path) -> bool:
    """Whether a list of images has a state and an object rather than a label, by its first line."""
    return has_columns(file, "path", "state", "object")
