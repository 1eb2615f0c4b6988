"""Digests of model state: strong ones to name things by, cheap ones to notice every change."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

_ROW = 512


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def strong_digest(tensors: Iterable[tuple[str, Tensor]], extra: Any = None) -> str:
    """SHA-256 over names, shapes, dtypes and every byte of the tensors, and over JSON of ``extra``."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}|{tuple(tensor.shape)}|{tensor.dtype}|".encode())
        digest.update(_bytes(tensor).cpu().numpy().data)
    digest.update(json.dumps(extra, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def quick_digest(tensors: Iterable[tuple[str, Tensor]]) -> bytes:
    """A digest of tensor contents at memory speed, for noticing changes within one process.

    Per tensor: place, version counter, and sums of its bytes taken as 64-bit integers, one sum per 4 KiB.
    The sums are what catches writes through ``.data``, which leave no trace in the version counter.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in tensors:
        # Tensors made under inference_mode count no versions; their sums still tell.
        version = -1 if tensor.is_inference() else tensor._version
        digest.update(f"{name}|{tensor.data_ptr()}|{version}|{tuple(tensor.shape)}|{tensor.dtype}".encode())
        flat = _bytes(tensor)
        whole = flat.numel() // (8 * _ROW) * (8 * _ROW)
        if whole and flat.storage_offset() % 8 == 0:
            digest.update(flat[:whole].view(torch.int64).view(-1, _ROW).sum(dim=1).cpu().numpy().data)
        else:
            whole = 0
        digest.update(flat[whole:].cpu().numpy().data)
    return digest.digest()


class StateDigest:
    """The strong digest of some state, computed again only when the quick one has changed.

    Args:
        module: whose parameters and buffers are looked at.
        leaving_out: beginnings of the names that do not count.
    """

    def __init__(self, module: nn.Module, leaving_out: tuple[str, ...] = ()) -> None:
        self.module = module
        self.leaving_out = leaving_out
        self._quick: tuple[bytes, str] | None = None
        self._strong = ""

    def covers(self, name: str) -> bool:
        """Whether a parameter, buffer or module of that name counts."""
        return not name.startswith(self.leaving_out)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        found = [*self.module.named_parameters(), *self.module.named_buffers()]
        return [(name, tensor) for name, tensor in found if self.covers(name)]

    def _structure(self) -> str:
        return ",".join(type(m).__qualname__ for name, m in self.module.named_modules() if self.covers(name))

    def hooked(self) -> bool:
        """Whether someone put forward hooks on the modules: then the state is more than their tensors."""
        return any(
            m._forward_hooks or m._forward_pre_hooks for name, m in self.module.named_modules() if self.covers(name)
        )

    def __call__(self, extra: Any) -> str:
        """The strong digest, hexadecimal, of the present state and of ``extra``, any JSON-able data."""
        tensors = self._tensors()
        structure = self._structure()
        quick = (quick_digest(tensors), json.dumps([extra, structure], sort_keys=True, default=str))
        if quick != self._quick:
            self._strong = strong_digest(tensors, [extra, structure])
            self._quick = quick
        return self._strong
