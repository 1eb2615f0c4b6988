"""The floor of a memory-bound op: its compulsory bytes at the bandwidth a plain copy reaches in the same process."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def copy_function(n_bytes: int, device: str) -> Callable[[], object]:
    """A copy that reads and writes ``n_bytes`` in total, into memory allocated anew as the ops do."""
    source: Tensor = torch.zeros(max(1, n_bytes // 8), dtype=torch.float32, device=device)
    return source.clone


def bandwidth(n_bytes: int, copy_ms: float) -> float:
    """GB/s of a copy that moved ``n_bytes`` in total."""
    return n_bytes / copy_ms / 1e6


def share_of_floor(n_bytes: int, op_ms: float, copy_bytes: int, copy_ms: float) -> float:
    """1 = the op is as fast as a copy of its compulsory bytes; small inputs pay call overheads and stay below."""
    return (n_bytes / op_ms) / (copy_bytes / copy_ms)
