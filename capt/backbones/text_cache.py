"""Features of texts that were encoded before, named by everything that they depend on."""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from capt.errors import DamagedFileError
from capt.files import load_tensors, write_bytes


class TextCache:
    """Least-recently-used features in memory, and optionally all of them in a folder.

    A key is a digest of the text tower's state together with the text, so a changed model can never be given
    features of the old one.

    Args:
        capacity: features kept in memory (2 KiB each at d = 512).
        folder: where features are kept between processes: a folder per model state, a checksummed file per batch.
    """

    def __init__(self, capacity: int = 32768, folder: str | Path | None = None) -> None:
        self.capacity = capacity
        self.folder = None if folder is None else Path(folder)
        self.hits = 0
        self.misses = 0
        self._rows: OrderedDict[str, Tensor] = OrderedDict()
        self._opened: set[str] = set()

    @staticmethod
    def key(state: str, text: str) -> str:
        """The name of one text's feature under one model state."""
        return hashlib.blake2b(f"{state}|{text}".encode(), digest_size=16).hexdigest()

    def get(self, state: str, texts: list[str]) -> dict[str, Tensor]:
        """Those of ``texts`` whose features [d] are known."""
        self._open(state)
        found = {}
        for text in texts:
            row = self._rows.get(key := self.key(state, text))
            if row is not None:
                self._rows.move_to_end(key)
                found[text] = row
        self.hits += len(found)
        self.misses += len(texts) - len(found)
        return found

    def put(self, state: str, rows: dict[str, Tensor]) -> None:
        """Keep features [d] by text."""
        keyed = {self.key(state, text): row.detach().clone() for text, row in rows.items()}
        self._keep(keyed)
        if self.folder is not None and keyed:
            data = save({key: row.cpu().contiguous() for key, row in keyed.items()})
            write_bytes(self.folder / state / f"{hashlib.sha256(data).hexdigest()}.safetensors", data)

    def _keep(self, rows: dict[str, Tensor]) -> None:
        self._rows.update(rows)
        while len(self._rows) > self.capacity:
            self._rows.popitem(last=False)

    def _open(self, state: str) -> None:
        if self.folder is None or state in self._opened:
            return
        self._opened.add(state)
        for path in sorted((self.folder / state).glob("*.safetensors")):
            try:
                self._keep(load_tensors(path, expected_sha256=path.stem))
            except DamagedFileError as error:
                warnings.warn(f"{error} Its texts are encoded again.", stacklevel=5)
                path.unlink()
