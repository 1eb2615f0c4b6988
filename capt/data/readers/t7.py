"""Plain data that ``torch.save`` wrote (metadata files called ``.t7``), read without unpickling.

Both formats: the zip archive, and the row of pickles that came before it. Tensors are refused like everything else that
is no text, number, list or dict.
"""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

from capt.data.readers.plain_pickle import PlainMachine, Refused, read_limited
from capt.errors import DataError

_MAX_BYTES = 128 << 20
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def read_t7(path: str | Path) -> Any:
    """The value of a file written by ``torch.save``: text, numbers, None, lists and dicts with text keys.

    Args:
        path: the file.

    Raises:
        DataError: the file is missing, larger than 128 MiB, damaged, or holds anything else; nothing of it is run.
    """
    path = Path(path)
    data = read_limited(path, _MAX_BYTES, "metadata")
    try:
        return _zipped(data) if data.startswith(b"PK\3\4") else _legacy(data)
    except Refused as error:
        raise DataError(
            f"'{path.name}': refused: {error}. Expected a list of plain records as torch.save writes it; "
            "take the file of the published split"
        ) from None
    except Exception as error:  # a damaged pickle or archive can end in nearly any exception of its parser
        raise DataError(
            f"'{path.name}': damaged, or no file of torch.save ({type(error).__name__}: {error})"
        ) from error


class _TorchMachine(PlainMachine):
    """Adds long whole numbers: the mark at the start of the older format is one."""

    def _long1(self, value: int) -> None:
        self.stack.append(value)


def _zipped(data: bytes) -> Any:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
        if any("/data/" in f"/{name}" for name in names):
            raise Refused("it holds tensors")
        pickles = [name for name in names if f"/{name}".endswith("/data.pkl")]
        if len(pickles) != 1:
            raise Refused(f"it holds {len(pickles)} files called data.pkl instead of one")
        with archive.open(pickles[0]) as member:  # what the archive says about sizes may be a lie
            content = member.read(_MAX_BYTES + 1)
    if len(content) > _MAX_BYTES:
        raise Refused(f"its pickle unpacks to more than {_MAX_BYTES:,} bytes")
    stream = io.BytesIO(content)
    value = _TorchMachine().run(stream)
    return _ended(stream, value)


def _legacy(data: bytes) -> Any:
    stream = io.BytesIO(data)
    for what, expected in (("mark", _MAGIC), ("version", _PROTOCOL)):
        found = _TorchMachine().run(stream)
        if type(found) is not int or found != expected:
            raise Refused(f"its {what} is not that of torch.save")
    if not isinstance(_TorchMachine().run(stream), dict):  # describes the machine that wrote the file
        raise Refused("its header is not that of torch.save")
    value = _TorchMachine().run(stream)
    if _TorchMachine().run(stream) != []:
        raise Refused("it holds tensors")
    return _ended(stream, value)


def _ended(stream: io.BytesIO, value: Any) -> Any:
    if stream.read(1):
        raise Refused("something follows its end")
    return value
