"""Pickles of plain data, read without ever importing or calling anything.

A pickle is a program. This machine runs only the few instructions that build text, numbers, lists and dicts with text
keys; every other instruction ends it.
"""

from __future__ import annotations

import pickletools
from pathlib import Path
from typing import Any, BinaryIO

from capt.errors import DataError

_MARK = object()
_MAX_INSTRUCTIONS = 10_000_000
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = frozenset(("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BININT", "BININT1", "BININT2", "BINFLOAT"))


class Refused(Exception):
    """The pickle is more than the plain data it is read for; says what."""


def read_limited(path: Path, limit: int, what: str) -> bytes:
    """The bytes of a file that holds ``what``.

    Raises:
        DataError: the file is missing or larger than ``limit`` bytes.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise DataError(f"'{path.name}': {size:,} bytes, more than the limit {limit:,} for {what}")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"'{path.name}': cannot be read ({error.strerror})") from error


class PlainMachine:
    """Stack machine for the instructions that plain data is made of; subclasses may add some.

    A damaged pickle can end in nearly any exception of its parser, not only in :class:`Refused`.
    """

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, stream: BinaryIO) -> Any:
        """The value that the pickle at the stream's position builds; the stream then stands behind the pickle."""
        for count, (operation, argument, _) in enumerate(pickletools.genops(stream)):
            name = operation.name
            if count == _MAX_INSTRUCTIONS:
                raise Refused(f"it has more than {_MAX_INSTRUCTIONS:,} instructions")
            if name == "STOP":
                if len(self.stack) != 1:
                    raise Refused("values are left over at its end")
                return self._take()
            if name in ("PROTO", "FRAME"):
                continue
            if name in _VALUES:
                self.stack.append(argument)
                continue
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
                continue
            step = getattr(self, f"_{name.lower()}", None)
            if step is None:
                raise Refused(f"it contains the instruction {name}" + (f" {argument!r:.80}" if argument else ""))
            step(argument)
        raise Refused("it has no end")

    def _take(self, kind: Any = object) -> Any:
        value = self.stack.pop()
        if value is _MARK or not isinstance(value, kind):
            raise Refused("its instructions do not fit together")
        return value

    def _peek(self, kind: Any) -> Any:
        if not self.stack or type(self.stack[-1]) is not kind:
            raise Refused("its instructions do not fit together")
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
            raise Refused("its instructions do not fit together")
        target.update(zip(keys, values[1::2], strict=True))

    def _binstring(self, text: str) -> None:
        self.stack.append(text.encode("latin-1").decode())  # text of Python 2; pickletools reads bytes as Latin-1

    _short_binstring = _binstring

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _long_binput = _binput
    _long_binget = _binget
