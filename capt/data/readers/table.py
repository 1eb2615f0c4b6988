"""Lists of images: CSV or TSV with the columns ``path,label[,split]``, or JSONL with these keys."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from capt.data.image_set import DataSet, build
from capt.data.names import class_key, class_list, natural_key, safe_relative
from capt.data.sources import FolderSource
from capt.errors import DataError

_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}
_NEEDED = ("path", "label")

Row = tuple[int, str, str | int, str]  # line, path, label, split


def read_table(
    file: str | Path,
    *,
    root: str | Path | None = None,
    class_names: Sequence[str] | None = None,
    check_files: bool = True,
    follow_links: bool = False,
    name: str | None = None,
) -> DataSet:
    """A data set from a list of images.

    Labels are class names; with ``class_names``, whole numbers are positions in it. Without it the classes are
    the labels in natural order. Rows without a split are training images. Further columns are ignored.

    Args:
        file: UTF-8 ``.csv``, ``.tsv``, ``.jsonl`` or ``.ndjson``.
        root: folder the paths are relative to; default: the file's folder. Paths may not leave it.
        class_names: the classes, in order.
        check_files: make sure now that every image file exists.
        follow_links: accept links that lead out of ``root``.
        name: what to call the data set; default: the file's name.

    Raises:
        DataError: names the line and what is wrong with it.
    """
    file = Path(file)
    folder = file.parent if root is None else Path(root)
    try:
        text = _decode(file)
    except OSError as error:
        raise DataError(f"'{file}': cannot be read ({error.strerror})") from error
    rows = list(_json_rows(text, file) if file.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows(text, file))
    if not rows:
        raise DataError(f"'{file}': found no row after the header; expected one per image")
    classes, labels = _labels(rows, class_names, file)
    listed: dict[str, list[tuple[str, int]]] = {}
    line_of: dict[str, int] = {}
    missing: list[tuple[int, str]] = []
    for (line, given, _, split), label in zip(rows, labels, strict=True):
        path = safe_relative(given, f"'{file}', line {line}")
        if path in line_of:
            raise DataError(f"'{file}', line {line}: {path!r} is already listed in line {line_of[path]}; remove one")
        line_of[path] = line
        if check_files and not (folder / path).is_file():
            missing.append((line, path))
        listed.setdefault(split, []).append((path, label))
    if missing:
        line, path = missing[0]
        raise DataError(
            f"'{file}', line {line}: no file {path!r} in '{folder}' ({len(missing)} of {len(rows)} rows have none); "
            "correct the paths or pass root="
        )
    meta: dict[str, Any] = {"format": "table", "file": file.name}
    source = FolderSource(folder, follow_links=follow_links)
    return build(name or file.stem, classes, listed, source, root=folder, meta=meta)


def _decode(file: Path) -> str:
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"'{file}', line {line}: found bytes that are not UTF-8; save the file as UTF-8") from None
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"'{file}', line {line}: found a NUL character; expected a text file")
    return text


def _csv_rows(text: str, file: Path) -> Iterator[Row]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            if not fields:
                continue
            if header is None:
                header = _header([field.strip().lower() for field in fields], file)
                continue
            where = f"'{file}', line {reader.line_num}"
            if len(fields) != len(header):
                raise DataError(
                    f"{where}: found {len(fields)} fields, expected {len(header)} as in the header; a name with "
                    f"{delimiter!r} in it needs double quotes"
                )
            row = dict(zip(header, fields, strict=True))
            yield reader.line_num, row["path"], row["label"], _split(row.get("split"), where)
    except csv.Error as error:
        raise DataError(f"'{file}', line {reader.line_num}: not valid CSV ({error})") from error
    if header is None:
        raise DataError(f"'{file}': the file is empty; expected the header path,label[,split]")


def _header(names: list[str], file: Path) -> list[str]:
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    for needed in _NEEDED:
        if needed not in names:
            raise DataError(f"'{file}', line 1: no column {needed!r}; found {shown}; expected path,label[,split]")
    twice = next((name for name in (*_NEEDED, "split") if names.count(name) > 1), None)
    if twice:
        raise DataError(f"'{file}', line 1: the column {twice!r} is there twice; remove one")
    return names


def _json_rows(text: str, file: Path) -> Iterator[Row]:
    # Not splitlines(): class names may hold U+2028 and its like, which JSON does not count as line ends.
    for line, content in enumerate(text.split("\n"), start=1):
        if not content.strip():
            continue
        where = f"'{file}', line {line}"
        try:
            row = json.loads(content, object_pairs_hook=_without_twins)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: expected one JSON object per line ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{where}: expected a JSON object, found {type(row).__name__}")
        for needed in _NEEDED:
            if needed not in row:
                raise DataError(f"{where}: no key {needed!r}; expected path, label and, if wanted, split")
        path, label, split = row["path"], row["label"], row.get("split")
        if not isinstance(path, str) or isinstance(label, bool) or not isinstance(label, (str, int)):
            raise DataError(f"{where}: expected a path (text) and a label (text or whole number)")
        if split is not None and not isinstance(split, str):
            raise DataError(f"{where}: expected a split (text), found {split!r}")
        yield line, path, label, _split(split, where)


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is there twice")
    return result


def _split(text: str | None, where: str) -> str:
    if text is None:
        return "train"
    split = _SPLITS.get(text.strip().lower())
    if split is None:
        raise DataError(f"{where}: the split {text!r} is none of train, val, test")
    return split


def _labels(rows: list[Row], class_names: Sequence[str] | None, file: Path) -> tuple[tuple[str, ...], list[int]]:
    texts = [label.strip() if isinstance(label, str) else str(label) for _, _, label, _ in rows]
    if class_names is None:
        for (line, *_), text in zip(rows, texts, strict=True):
            if not text:
                raise DataError(f"'{file}', line {line}: the label is empty")
        # Twins that differ in Unicode form only are two spellings of two entries: class_list refuses them.
        class_names = sorted(set(texts), key=natural_key)
    classes = class_list(class_names, f"'{file}'")
    place = {class_key(text): number for number, text in enumerate(classes)}
    labels = []
    for (line, _, given, _), text in zip(rows, texts, strict=True):
        number = place.get(class_key(text))
        if number is None and (isinstance(given, int) or (text.isascii() and text.isdigit())) and len(text) < 10:
            number = int(text) if 0 <= int(text) < len(classes) else None
        if number is None:
            raise DataError(f"'{file}', line {line}: the label {given!r} is none of the {len(classes)} classes")
        labels.append(number)
    return classes, labels
