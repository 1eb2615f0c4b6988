"""Lists of images: CSV or TSV with the columns ``path,label[,split]``, or JSONL with these keys.

``read_rows`` serves every list of images, whatever its label columns are.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capt.data.image_set import DataSet, build
from capt.data.names import class_key, class_list, natural_key, safe_relative
from capt.data.sources import FolderSource
from capt.errors import DataError

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
_MAX_HEADER = 1 << 16
_SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val", "test": "test"}


@dataclass(frozen=True)
class Row:
    """One image of a list: line, path as a safe relative path, what its label columns say, split ("" if not given).

    Where one column holds several labels, ``labels`` are these.
    """

    line: int
    path: str
    labels: tuple[str | int, ...]
    split: str


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
    rows = read_rows(file, ("label",), folder=folder, check_files=check_files)
    classes, numbers = label_numbers(rows, class_names, file)
    listed: dict[str, list[tuple[str, int]]] = {}
    for row, (label,) in zip(rows, numbers, strict=True):
        listed.setdefault(row.split or "train", []).append((row.path, label))
    meta: dict[str, Any] = {"format": "table", "file": file.name}
    source = FolderSource(folder, follow_links=follow_links)
    return build(name or file.stem, classes, listed, source, root=folder, meta=meta)


def read_rows(
    file: Path, columns: Sequence[str], *, folder: Path, check_files: bool = True, separator: str = ""
) -> list[Row]:
    """The rows of a list of images, checked: at least one, no image twice, every image inside ``folder``.

    Args:
        file: UTF-8 ``.csv``, ``.tsv``, ``.jsonl`` or ``.ndjson``.
        columns: names of the label columns, which every row must have beside ``path``.
        folder: folder the paths are relative to.
        check_files: make sure now that every image file exists.
        separator: the one label column holds any number of labels: with this text between them, in JSON as a list.
            Empty ones are left out.

    Raises:
        DataError: names the line and what is wrong with it.
    """
    try:
        text = _decode(file)
    except OSError as error:
        raise DataError(f"'{file}': cannot be read ({error.strerror})") from error
    parse = _json_rows if file.suffix.lower() in (".jsonl", ".ndjson") else _csv_rows
    rows = list(parse(text, file, columns, separator))
    if not rows:
        raise DataError(f"'{file}': found no row after the header; expected one per image")
    line_of: dict[str, int] = {}
    missing: list[Row] = []
    for row in rows:
        if row.path in line_of:
            raise DataError(
                f"'{file}', line {row.line}: {row.path!r} is already listed in line {line_of[row.path]}; remove one"
            )
        line_of[row.path] = row.line
        if check_files and not (folder / row.path).is_file():
            missing.append(row)
    if missing:
        raise DataError(
            f"'{file}', line {missing[0].line}: no file {missing[0].path!r} in '{folder}' ({len(missing)} of "
            f"{len(rows)} rows have none); correct the paths or give root (--root)"
        )
    return rows


def has_columns(file: str | Path, *columns: str) -> bool:
    """Whether the first line of a list has these columns or keys; False for anything but a list."""
    file = Path(file)
    if file.suffix.lower() not in TABLES or not file.is_file():
        return False
    with file.open("rb") as stream:
        words = re.findall(rb"\w+", stream.readline(_MAX_HEADER).lower())
    return {column.encode() for column in columns} <= set(words)


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


def _csv_rows(text: str, file: Path, columns: Sequence[str], separator: str) -> Iterator[Row]:
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    try:
        for fields in reader:
            if not any(field.strip() for field in fields):
                continue
            if header is None:
                header = _header([field.strip().lower() for field in fields], file, columns)
                continue
            where = f"'{file}', line {reader.line_num}"
            if len(fields) != len(header):
                raise DataError(
                    f"{where}: found {len(fields)} fields, expected {len(header)} as in the header; a name with "
                    f"{delimiter!r} in it needs double quotes"
                )
            row = dict(zip(header, fields, strict=True))
            labels: tuple[str, ...] = tuple(row[column] for column in columns)
            if separator:
                labels = tuple(label for label in map(str.strip, labels[0].split(separator)) if label)
            yield Row(reader.line_num, safe_relative(row["path"], where), labels, _split(row.get("split"), where))
    except csv.Error as error:
        raise DataError(f"'{file}', line {reader.line_num}: not valid CSV ({error})") from error
    if header is None:
        raise DataError(f"'{file}': the file is empty; expected the header {_usage(columns)}")


def _usage(columns: Sequence[str]) -> str:
    return f"path,{','.join(columns)}[,split]"


def _header(names: list[str], file: Path, columns: Sequence[str]) -> list[str]:
    shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
    for needed in ("path", *columns):
        if needed not in names:
            raise DataError(f"'{file}', line 1: no column {needed!r}; found {shown}; expected {_usage(columns)}")
    twice = next((name for name in ("path", *columns, "split") if names.count(name) > 1), None)
    if twice:
        raise DataError(f"'{file}', line 1: the column {twice!r} is there twice; remove one")
    return names


def _json_rows(text: str, file: Path, columns: Sequence[str], separator: str) -> Iterator[Row]:
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
        for needed in ("path", *columns):
            if needed not in row:
                raise DataError(f"{where}: no key {needed!r}; expected the keys {_usage(columns)}")
        path, split = row["path"], row.get("split")
        labels = row[columns[0]] if separator else [row[column] for column in columns]
        if not isinstance(path, str) or type(labels) is not list or any(type(x) not in (str, int) for x in labels):
            wanted = "a list" if separator else f"a {', a '.join(columns)}"
            raise DataError(f"{where}: expected a path (text) and {wanted} (text or whole number)")
        labels = [label for label in labels if not separator or str(label).strip()]
        if split is not None and not isinstance(split, str):
            raise DataError(f"{where}: expected a split (text), found {split!r}")
        yield Row(line, safe_relative(path, where), tuple(labels), _split(split, where))


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a key is there twice")
    return result


def _split(text: str | None, where: str) -> str:
    if text is None:
        return ""
    split = _SPLITS.get(text.strip().lower())
    if split is None:
        raise DataError(f"{where}: the split {text!r} is none of train, val, test")
    return split


def label_numbers(
    rows: list[Row], class_names: Sequence[str] | None, file: Path
) -> tuple[tuple[str, ...], list[list[int]]]:
    """The classes of a list, and the positions in them of every row's labels.

    Args:
        rows: the list.
        class_names: the classes, in order, which labels may then name by their position; None: the labels in natural
            order.
        file: for messages.

    Raises:
        DataError: an empty or unknown label; names its line.
    """
    given = [(row.line, label, str(label).strip()) for row in rows for label in row.labels]
    if class_names is None:
        for line, _, text in given:
            if not text:
                raise DataError(f"'{file}', line {line}: the label is empty")
        # Twins that differ in Unicode form only are two spellings of two entries: class_list refuses them.
        class_names = sorted({text for _, _, text in given}, key=natural_key)
    classes = class_list(class_names, f"'{file}'")
    place = {class_key(text): number for number, text in enumerate(classes)}

    def number(line: int, label: str | int) -> int:
        text = str(label).strip()
        found = place.get(class_key(text))
        if found is None and (isinstance(label, int) or (text.isascii() and text.isdigit())) and len(text) < 10:
            found = int(text) if 0 <= int(text) < len(classes) else None
        if found is None:
            raise DataError(f"'{file}', line {line}: the label {label!r} is none of the {len(classes)} classes")
        return found

    return classes, [[number(row.line, label) for label in row.labels] for row in rows]
