"""Few-shot lists that CoOp stored as pickles, read without ever importing or calling anything.

A pickle is a program. This reader runs only the few instructions that build text, whole numbers, lists, dicts and
records of one class; every other instruction ends it. The class is never looked up: a record becomes a dict.
"""

from __future__ import annotations

import io
import pickletools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
_MARK = object()
_CLASS = object()


@dataclass(frozen=True)
class Datum:
    """One image of a list: path as it was on the machine that wrote the list, label, class name."""

    path: str
    label: int
    class_name: str


class _Refused(Exception):
    pass


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
    try:
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise DataError(f"'{path.name}': {size:,} bytes, more than the limit {_MAX_BYTES:,} for a few-shot list")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"'{path.name}': cannot be read ({error.strerror})") from error
    try:
        return _lists(_Machine().run(data))
    except _Refused as error:
        raise DataError(
            f"'{path.name}': refused: {error}. Expected a few-shot list of CoOp: train and val lists of Datum records. "
            "Make a new list with capt.data.few_shot instead."
        ) from None
    except Exception as error:  # a damaged pickle can end in nearly any exception of its parser
        raise DataError(f"'{path.name}': damaged, or no pickle ({type(error).__name__}: {error})") from error


def _lists(value: Any) -> dict[str, list[Datum]]:
    if not isinstance(value, dict) or not {"train"} <= set(value) <= {"train", "val"}:
        raise _Refused("it is not a dict of 'train' and 'val'")
    result: dict[str, list[Datum]] = {}
    for split, items in value.items():
        if not isinstance(items, list):
            raise _Refused(f"{split!r} is not a list")
        result[split] = []
        for item in items:
            if not isinstance(item, _Record) or item.state is None:
                raise _Refused(f"{split!r} holds something that is no Datum record")
            state = item.state
            result[split].append(Datum(state["_impath"], state["_label"], state["_classname"]))
    return result


class _Record:
    """A Datum being built; only BUILD may fill it, once."""

    def __init__(self) -> None:
        self.state: dict[str, Any] | None = None

    def fill(self, state: Any) -> None:
        if self.state is not None or not isinstance(state, dict) or set(state) != set(_FIELDS):
            raise _Refused("a Datum record has other fields than impath, label, domain and classname")
        for field, kind in _FIELDS.items():
            if type(state[field]) is not kind:
                raise _Refused(f"the field {field} of a Datum record is not of type {kind.__name__}")
        self.state = dict(state)


class _Machine:
    """Stack machine for the instructions that plain lists of records are made of."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        stream = io.BytesIO(data)
        for operation, argument, _ in pickletools.genops(stream):
            name = operation.name
            if name == "STOP":
                if len(self.stack) != 1:
                    raise _Refused("values are left over at its end")
                if stream.read(1):
                    raise _Refused("something follows its end")
                return self.stack[0]
            if name in ("PROTO", "FRAME"):
                continue
            if name in ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2"):
                self.stack.append(argument)
                continue
            step = getattr(self, f"_{name.lower()}", None)
            if step is None:
                raise _Refused(f"it contains the instruction {name}" + (f" {argument!r:.80}" if argument else ""))
            step(argument)
        raise _Refused("it has no end")

    def _take(self, kind: Any = object) -> Any:
        value = self.stack.pop()
        if value is _MARK or not isinstance(value, kind):
            raise _Refused("its instructions do not fit together")
        return value

    def _peek(self, kind: Any) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise _Refused("its instructions do not fit together")
        return self.stack[-1]

    def _since_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def _empty_list(self, _: Any) -> None:
        self.stack.append([])

    def _empty_dict(self, _: Any) -> None:
        self.stack.append({})

    def _empty_tuple(self, _: Any) -> None:
        self.stack.append(())

    def _append(self, _: Any) -> None:
        value = self._take()
        self._peek(list).append(value)

    def _appends(self, _: Any) -> None:
        values = self._since_mark()
        self._peek(list).extend(values)

    def _setitem(self, _: Any) -> None:
        value, key = self._take(), self._take(str)
        self._peek(dict)[key] = value

    def _setitems(self, _: Any) -> None:
        values = self._since_mark()
        target = self._peek(dict)
        keys = values[::2]
        if len(values) % 2 or not all(isinstance(key, str) for key in keys):
            raise _Refused("its instructions do not fit together")
        target.update(zip(keys, values[1::2], strict=True))

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _long_binput = _binput
    _long_binget = _binget

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._named(module, name)

    def _stack_global(self, _: Any) -> None:
        name, module = self._take(str), self._take(str)
        self._named(module, name)

    def _named(self, module: str, name: str) -> None:
        if (module, name) not in _RECORD_CLASSES:
            raise _Refused(f"it asks for {f'{module}.{name}'!r:.80}")
        self.stack.append(_CLASS)

    def _newobj(self, _: Any) -> None:
        arguments, what = self._take(), self._take()
        if arguments != () or what is not _CLASS:
            raise _Refused("it makes an object that is no Datum record")
        self.stack.append(_Record())

    def _build(self, _: Any) -> None:
        state = self._take()
        self._peek(_Record).fill(state)
