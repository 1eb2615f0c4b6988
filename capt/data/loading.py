"""Functions that open every format: of one label an image, of pairs, of any number of labels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from capt.data.compositional import CompositionalSet
from capt.data.few_shot import hold_out
from capt.data.image_set import DataSet
from capt.data.multi_label import MultiLabelSet
from capt.data.readers.clipart import read_clipart
from capt.data.readers.coop import read_coop
from capt.data.readers.czsl import read_czsl
from capt.data.readers.emoji import read_emoji
from capt.data.readers.emoji_pairs import read_emoji_pairs
from capt.data.readers.folder import read_folder
from capt.data.readers.label_table import read_label_table
from capt.data.readers.long_tail_lists import LAYOUTS, read_long_tail_lists
from capt.data.readers.pair_table import read_pair_table
from capt.data.readers.shards import read_shards
from capt.data.readers.table import TABLES, read_table
from capt.errors import DataError


@dataclass(frozen=True)
class _Kind:
    """A kind of data set: what it is, what opens it and takes it, the names and prefixes of its sets, all its forms."""

    what: str
    readers: str
    names: tuple[str, ...]
    forms: str


_SINGLE = _Kind(
    "data set of one label an image", "load, 'capt fit capt' and its like", ("emoji", "coop:"),
    "'emoji' (the shipped set), a folder with one sub-folder per class, a .csv, .tsv or .jsonl list, "
    "'coop:<data set>' with root (--root), or WebDataset shards (a pattern or list of .tar files)",
)  # fmt: skip
_COMPOSITIONAL = _Kind(
    "compositional data set", "load_compositional, 'capt fit msci' and 'capt fit csp'", ("emoji-pairs", "czsl:"),
    "'emoji-pairs' (the shipped set), 'czsl:mit-states', 'czsl:ut-zappos' or 'czsl:cgqa' with root (--root), "
    "or a .csv, .tsv or .jsonl list with the columns path, state, object and split",
)  # fmt: skip
_MULTI_LABEL = _Kind(
    "multi-label data set", "load_multi_label and 'capt fit cprfl'", ("clipart", *LAYOUTS),
    "'clipart' (the shipped set), 'coco-lt' or 'voc-lt' with root (--root), "
    "or a .csv, .tsv or .jsonl list with the columns path, labels and, if you like, split",
)  # fmt: skip
_Read = TypeVar("_Read", DataSet, CompositionalSet, MultiLabelSet)


def load(
    spec: str | Path | Sequence[str | Path] | DataSet,
    *,
    root: str | Path | None = None,
    test_fraction: float | None = None,
    split_seed: int = 0,
    **options: Any,
) -> DataSet:
    """Open a data set.

    Args:
        spec: what to open. "emoji": the shipped set (:func:`read_emoji`); a folder: :func:`read_folder`; a ``.csv``,
            ``.tsv`` or ``.jsonl`` file: :func:`read_table`; "coop:<data set>": :func:`read_coop`; a pattern or list
            of ``.tar`` files: :func:`read_shards`; a DataSet is returned as it is.
        root: for "coop:" the folder that holds all data sets; for a list of images the folder its paths start from.
        test_fraction: take this part of each class from the training images as test images, chosen by hash
            (:func:`capt.data.hold_out`). Only for data without test images; never done unless asked for.
        split_seed: seed of that choice.
        options: passed to the reader; see its documentation.

    Raises:
        DataError: nothing can be opened, or the data set is not usable; says what and what to do.
    """
    data = spec if isinstance(spec, DataSet) else _read(spec, root, options)
    if test_fraction is None:
        return data
    if data.test is not None:
        raise DataError(f"test_fraction: '{data.name}' has {len(data.test)} test images already; leave the option out")
    train, test = hold_out(data.train, test_fraction, split_seed)
    return data.with_splits({"train": train, "test": test}, meta=train.meta)


def _read(spec: str | Path | Sequence[str | Path], root: str | Path | None, options: dict[str, Any]) -> DataSet:
    text = str(spec) if isinstance(spec, (str, Path)) else ""
    _expect(text, _SINGLE)
    if text.startswith("coop:"):
        if root is None:
            raise DataError(f"'{text}': root (--root) is missing; give the folder that holds the data sets")
        return _call(read_coop, text, text.removeprefix("coop:"), root=root, **options)
    if text.lower().endswith(TABLES):
        return _call(read_table, text, text, root=root, **options)
    if root is not None:
        raise DataError(f"root (--root): only 'coop:<data set>' and lists of images take it, found '{text or spec}'")
    if text == "emoji":
        return _call(read_emoji, text, **options)
    if (not text and spec) or ".tar" in text:
        if text.lower().endswith((".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".tar.zst")):
            raise DataError(f"'{text}': compressed shards cannot be read in place; unpack them to .tar first")
        patterns = spec if text else list(spec)  # type: ignore[arg-type]
        return _call(read_shards, text or "shards", patterns, **options)
    if text and Path(text).is_dir():
        return _call(read_folder, text, text, **options)
    raise DataError(f"'{text}': no such folder or file. A data set is {_SINGLE.forms}")


def load_compositional(
    spec: str | Path | CompositionalSet, root: str | Path | None = None, **options: Any
) -> CompositionalSet:
    """Open a compositional data set.

    Args:
        spec: what to open. "emoji-pairs": the shipped set (:func:`read_emoji_pairs`); "czsl:mit-states",
            "czsl:ut-zappos" or "czsl:cgqa": :func:`read_czsl`; a ``.csv``, ``.tsv`` or ``.jsonl`` list of images with
            their state, object and split: :func:`read_pair_table`; a CompositionalSet is returned as it is.
        root: for "czsl:" the folder that holds the data sets, or the one of the data set; for a list of images the
            folder its paths start from.
        options: passed to the reader; see its documentation.

    Raises:
        DataError: nothing can be opened, or the data set is not usable; says what and what to do.
    """
    if isinstance(spec, CompositionalSet):
        return spec
    text = str(spec)
    _expect(text, _COMPOSITIONAL)
    if text.lower().endswith(TABLES):
        return _call(read_pair_table, text, text, root=root, **options)
    if text.startswith("czsl:"):
        if root is None:
            raise DataError(f"'{text}': root (--root) is missing; give the folder that holds the data set")
        return _call(read_czsl, text, text.removeprefix("czsl:"), root=root, **options)
    if root is not None:
        raise DataError(f"root (--root): only 'czsl:<data set>' and lists of images take it, found '{text}'")
    if text == "emoji-pairs":
        return _call(read_emoji_pairs, text, **options)
    raise DataError(f"'{text}': no compositional data set. One is {_COMPOSITIONAL.forms}")


def load_multi_label(
    spec: str | Path | MultiLabelSet,
    root: str | Path | None = None,
    *,
    val_fraction: float | None = None,
    split_seed: int = 0,
    **options: Any,
) -> MultiLabelSet:
    """Open a multi-label data set.

    Args:
        spec: what to open. "clipart": the shipped set (:func:`read_clipart`); "coco-lt" or "voc-lt":
            :func:`read_long_tail_lists`; a ``.csv``, ``.tsv`` or ``.jsonl`` list of images with their labels:
            :func:`read_label_table`; a MultiLabelSet is returned as it is.
        root: for "coco-lt" and "voc-lt" the folder that holds the data sets, or the one of the data set; for a list
            of images the folder its paths start from.
        val_fraction: take this part of each class from the training images as validation images, chosen by hash
            (:func:`capt.data.multi_label.hold_out`). Only for data without them; never done unless asked for, and
            never with test images.
        split_seed: seed of that choice.
        options: passed to the reader; see its documentation.

    Raises:
        DataError: nothing can be opened, or the data set is not usable; says what and what to do.
    """
    data = spec if isinstance(spec, MultiLabelSet) else _read_multi_label(str(spec), root, options)
    return data if val_fraction is None else data.hold_out(val_fraction, split_seed)


def _read_multi_label(spec: str, root: str | Path | None, options: dict[str, Any]) -> MultiLabelSet:
    _expect(spec, _MULTI_LABEL)
    if spec.lower().endswith(TABLES):
        return _call(read_label_table, spec, spec, root=root, **options)
    if spec in LAYOUTS:
        if root is None:
            raise DataError(f"'{spec}': root (--root) is missing; give the folder that holds the data set")
        return _call(read_long_tail_lists, spec, spec, root=root, **options)
    if root is not None:
        raise DataError(
            f"root (--root): only {', '.join(map(repr, LAYOUTS))} and lists of images take it, found '{spec}'"
        )
    if spec == "clipart":
        return _call(read_clipart, spec, **options)
    raise DataError(f"'{spec}': no multi-label data set. One is {_MULTI_LABEL.forms}")


def _expect(spec: str, kind: _Kind) -> None:
    """Raise if ``spec`` names a data set of another kind."""
    if kind is _SINGLE and Path(spec).is_dir():
        return  # a folder of images, called like a shipped set
    name = spec.split(":")[0] + ":" if ":" in spec else spec
    for other in (_SINGLE, _COMPOSITIONAL, _MULTI_LABEL):
        if other is not kind and name in other.names:
            raise DataError(
                f"'{spec}': no {kind.what} but a {other.what}, for {other.readers}; here a {kind.what} is needed: "
                f"{kind.forms}"
            )


def _call(reader: Callable[..., _Read], spec: str, *arguments: Any, **options: Any) -> _Read:
    known = inspect.signature(reader).parameters
    for option in options:
        if option not in known:
            names = [name for name, parameter in known.items() if parameter.kind is parameter.KEYWORD_ONLY]
            raise DataError(f"'{spec}': unknown option {option!r}; this format takes {', '.join(names)}")
    return reader(*arguments, **options)
