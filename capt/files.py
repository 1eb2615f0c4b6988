"""Files that are either the old version or the new one, never half of each."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as _load_tensors
from safetensors.torch import save as _save_tensors

from capt.errors import DamagedFileError, DataError, ResourceError


@contextmanager
def _naming_full_disk(path: Path, size: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"'{path}': the disk is full; {size:,} bytes were to be written. "
                "The previous version of the file is untouched. Free some space and run again."
            ) from error
        raise


def write_bytes(path: str | Path, data: bytes) -> None:
    """Replace ``path`` by ``data`` atomically and durably.

    Temporary file in the same folder, fsync, rename, fsync of the folder: a killed process or a full
    disk leaves the previous content.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _naming_full_disk(path, len(data)):
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path: str | Path, value: Any) -> None:
    """Write ``value`` as indented UTF-8 JSON; NaN and Inf are refused."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def read_json(path: str | Path) -> Any:
    """Read JSON written by :func:`write_json`.

    Raises:
        DataError: the file does not exist.
        DamagedFileError: the file is not JSON; the message gives the line.
    """
    path = Path(path)
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"'{path}': no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"'{path}': expected JSON, found something else ({error})") from error


def sha256(path: str | Path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def save_tensors(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> str:
    """Save named tensors as safetensors, atomically; returns the SHA-256 of what was written."""
    data = _save_tensors({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
    write_bytes(path, data)
    return hashlib.sha256(data).hexdigest()


def load_tensors(path: str | Path, expected_sha256: str | None = None) -> dict[str, torch.Tensor]:
    """Load safetensors after checking the SHA-256 that the accompanying JSON recorded.

    Raises:
        DataError: the file does not exist.
        DamagedFileError: checksum or format is wrong.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"'{path}': no such file") from None
    if expected_sha256 is not None:
        found = hashlib.sha256(data).hexdigest()
        if found != expected_sha256:
            raise DamagedFileError(
                f"'{path}': SHA-256 is {found[:16]}..., expected {expected_sha256[:16]}...: "
                "the file was changed or damaged after it was written. Restore it or build it again."
            )
    try:
        return dict(_load_tensors(data))
    except SafetensorError as error:
        raise DamagedFileError(f"'{path}': not a safetensors file ({error})") from error
