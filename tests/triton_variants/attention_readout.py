"""attention_readout: every dtype and width, one bias and many, with and without a bias."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from capt.kernels import attention_readout as k


def variants(mock: Any) -> Iterator[tuple[str, Any]]:
    """32 images of 197 tokens, 12 heads, 3 groups."""
    floats, longs = mock(torch.float32), mock(torch.int64)
    for dtype, head_dim, n_biases in [
        (torch.float32, 32, 50),
        (torch.float32, 64, 1),
        (torch.float32, 64, 16),
        (torch.float32, 64, 50),
        (torch.float32, 128, 50),
        (torch.float32, 256, 50),
        (torch.float16, 64, 50),
        (torch.bfloat16, 64, 1),
        (torch.bfloat16, 64, 50),
    ]:
        data, width = mock(dtype), 12 * head_dim
        compiled = k._readout_kernel.warmup(
            data, data, data, longs, longs, floats, floats, floats, 32, 197, 12, head_dim, 3, n_biases,
            width, head_dim, 197 * width, width, head_dim, 197 * width, width, head_dim, 0, 0, 197, 0, 0.125,
            HAS_BIAS=n_biases > 1, **k.blocks(head_dim, n_biases), grid=(1, 1),
        )  # fmt: skip
        yield f"{str(dtype).removeprefix('torch.')} dh={head_dim} M={n_biases}", compiled
