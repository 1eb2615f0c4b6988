"""Lists of multi-label images: CSV or TSV with the columns ``path,labels[,split]``, or JSONL with these keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from capt.data.multi_label import MultiLabelSet, build_multi_label
from capt.data.readers.table import has_columns, label_numbers, read_rows
from capt.data.sources import FolderSource

SEPARATOR = ";"


def read_label_table(
    file: str | Path,
    *,
    root: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    check_files: bool = True,
    follow_links: bool = False,
    name: str | None = None,
) -> MultiLabelSet:
    """A multi-label data set from a list of images.

    ``labels`` are class names with ";" between them, in JSONL a list of names; an image may have none. With
    ``class_names``, whole numbers are positions in it. Without it the classes are the labels of all splits in natural
    order. Rows without a split are training images. Further columns are ignored.

    Args:
        file: UTF-8 ``.csv``, ``.tsv``, ``.jsonl`` or ``.ndjson``.
        root: folder the paths are relative to; default: the file's folder. Paths may not leave it.
        class_names: the classes, in order; the list may then lack some of them.
        check_files: make sure now that every image file exists.
        follow_links: accept links that lead out of ``root``.
        name: what to call the data set; default: the file's name.

    Raises:
        DataError: names the line and what is wrong with it.
    """
    file = Path(file)
    folder = file.parent if root is None else Path(root)
    rows = read_rows(file, ("labels",), folder=folder, check_files=check_files, separator=SEPARATOR)
    classes, numbers = label_numbers(rows, class_names, file)
    listed: dict[str, list[tuple[str, list[int]]]] = {}
    for row, labels in zip(rows, numbers, strict=True):
        listed.setdefault(row.split or "train", []).append((row.path, labels))
    meta: dict[str, Any] = {"format": "label table", "file": file.name}
    source = FolderSource(folder, follow_links=follow_links)
    return build_multi_label(name or file.stem, classes, listed, source, root=folder, meta=meta)


def is_label_table(file: str | Path) -> bool:
    """Whether the images of a list have any number of labels rather than one, by its first line."""
    return has_columns(file, "path", "labels")
