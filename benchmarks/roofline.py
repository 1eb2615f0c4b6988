"""Floors of an op, measured in the same process: what moving its bytes or doing its arithmetic costs at least."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

#: Bytes a floor moves at most: larger ops are compared by rate.
LARGEST = {"cpu": 128 << 20, "cuda": 2 << 30}
#: Side of the square matrices of the arithmetic floor.
GEMM_SIZE = {"cpu": 1024, "cuda": 8192}


@dataclass(frozen=True)
class Floor:
    """kind: copy, read or gemm. run: a call that moves, or computes, ``amount`` bytes or FLOP."""

    kind: str
    run: Callable[[], object]
    amount: int

    def milliseconds(self, amount: int, run_ms: float) -> float:
        """What ``amount`` bytes or FLOP cost at the rate that ``run`` reached in ``run_ms``."""
        return run_ms * amount / self.amount


def dtype_named(label: str) -> torch.dtype:
    """The dtype that a row's label starts with; float32 when it names none."""
    words = label.replace("-", " ").replace("/", " ").split()
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "half": "float16"}
    found = getattr(torch, short.get(words[0], words[0]), None) if words else None
    return found if isinstance(found, torch.dtype) else torch.float32


def copy_floor(n_bytes: int, device: str = "cpu") -> Floor:
    """Reads and writes ``n_bytes`` in total, into memory allocated anew as the ops do."""
    source = torch.rand(max(1, min(n_bytes, LARGEST[device]) // 8), device=device)
    return Floor("copy", source.clone, 8 * source.numel())


def read_floor(n_bytes: int, device: str = "cpu") -> Floor:
    """Reads ``n_bytes``: a matrix times a vector."""
    rows = max(1, min(n_bytes, LARGEST[device]) // 4096)
    matrix, vector = torch.rand(rows, 1024, device=device), torch.rand(1024, device=device)
    return Floor("read", lambda: torch.mv(matrix, vector), 4096 * rows)


def gemm_floor(dtype: torch.dtype, device: str = "cpu") -> Floor:
    """A square matrix product. float16 on a CPU is computed as bfloat16: torch has no fast float16 product there."""
    if device == "cpu" and dtype == torch.float16:
        dtype = torch.bfloat16
    size = GEMM_SIZE[device]
    left, right = torch.randn(size, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
    return Floor("gemm", lambda: left @ right, 2 * size**3)


def floor(kind: str, n_bytes: int, dtype: torch.dtype, device: str = "cpu") -> Floor:
    """The floor that a Comparison names."""
    if kind == "gemm":
        return gemm_floor(dtype, device)
    return {"copy": copy_floor, "read": read_floor}[kind](n_bytes, device)
