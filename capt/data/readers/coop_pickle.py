"""Few-shot lists that CoOp stored as pickles, read without ever importing or calling anything.

To the plain data of :mod:`capt.data.readers.plain_pickle` this adds records of one class. The class is never looked up:
a record becomes a dict.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capt.data.readers.plain_pickle import PlainMachine, Refused, read_limited
from capt.errors import DataError

_MAX_BYTES = 64 << 20
_RECORD_CLASSES = frozenset(
    (module, "Datum")
    for module in (
        "dassl.data.datasets.base_dataset",
        "dassl.data.datasets",
        "Dassl.dassl.data.datasets.base_dataset",
    )
)
_FIELDS = {"_impath": str, "_label": int, "_domain": int, "_classname": str}
_CLASS = object()


@dataclass(frozen=True)
class Datum:
    """One image of a list: path as it was on the machine that wrote the list, label, class name."""

    path: str
    label: int
    class_name: str


def read_coop_pickle(path: str | Path) -> dict[str, list[Datum]]:
    """The lists of one ``shot_{k}-seed_{s}.pkl``.

    Args:
        path: the file.

    Returns:
        "train" and, if the file has it, "val".

    Raises:
        DataError: the file is missing, larger than 64 MiB, damaged, or anything but a dict of lists of records.
    """
    path = Path(path)
    data = read_limited(path, _MAX_BYTES, "a few-shot list")
    try:
        stream = io.BytesIO(data)
        value = _DatumMachine().run(stream)
        if stream.read(1):
            raise Refused("something follows its end")
        return _lists(value)
    except Refused as error:
        raise DataError(
            f"'{path.name}': refused: {error}. Expected a few-shot list of CoOp: train and val lists of Datum records. "
            "Make a new list with capt.data.few_shot instead."
        ) from None
    except Exception as error:  # a damaged pickle can end in nearly any exception of its parser
        raise DataError(f"'{path.name}': damaged, or no pickle ({type(error).__name__}: {error})") from error


def _lists(value: Any) -> dict[str, list[Datum]]:
    if not isinstance(value, dict) or not {"train"} <= set(value) <= {"train", "val"}:
        raise Refused("it is not a dict of 'train' and 'val'")
    result: dict[str, list[Datum]] = {}
    for split, items in value.items():
        if not isinstance(items, list):
            raise Refused(f"{split!r} is not a list")
        result[split] = []
        for item in items:
            if not isinstance(item, _Record) or item.state is None:
                raise Refused(f"{split!r} holds something that is no Datum record")
            state = item.state
            result[split].append(Datum(state["_impath"], state["_label"], state["_classname"]))
    return result


class _Record:
    """A Datum being built; only BUILD may fill it, once."""

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None

    def fill(self, state: Any) -> None:
        if self.state is not None or not isinstance(state, dict) or set(state) != set(_FIELDS):
            raise Refused("a Datum record has other fields than impath, label, domain and classname")
        for field, kind in _FIELDS.items():
            if type(state[field]) is not kind:
                raise Refused(f"the field {field} of a Datum record is not of type {kind.__name__}")
        self.state = dict(state)


class _DatumMachine(PlainMachine):
    """Adds the instructions that make a Datum record."""

    def _empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._named(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._take(str), self._take(str)
        self._named(module, name)

    def _named(self, module: str, name: str) -> None:
        if (module, name) not in _RECORD_CLASSES:
            raise Refused(f"it asks for {f'{module}.{name}'!r:.80}")
        self.stack.append(_CLASS)

    def _newobj(self, _: Any) -> None:
        arguments, what = self._take(), self._take()
        if arguments != () or what is not _CLASS:
            raise Refused("it makes an object that is no Datum record")
        self.stack.append(_Record())

    def _build(self, _: Any) -> None:
        state = self._take()
        self._peek(_Record).fill(state)
