"""grid_adapter: both kernels in every dtype, forward and mirrored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from capt.kernels import grid_adapter as k


def variants(mock: Any) -> Iterator[tuple[str, Any]]:
    """Sizes of 32 ViT-B/16 images."""
    blocks = {"BLOCK_P": k.BLOCK_P, "BLOCK_C": k.BLOCK_C, "num_warps": k.NUM_WARPS, "grid": (1,)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        tokens, floats = mock(dtype), mock(torch.float32)
        for transpose in (False, True):
            sizes = (197, 768, 14, 14, 1, 197 * 768, 768, 1, 0.5)
            yield (
                f"forward {name} transpose={transpose}",
                k._adapter_kernel.warmup(
                    tokens, floats, floats, tokens, *sizes, TRANSPOSE=transpose, HAS_ALPHA=True, **blocks
                ),
            )
        sizes = (768, 14, 14, 1, 197 * 768, 768, 197 * 768, 768)
        yield f"correlate {name}", k._correlate_kernel.warmup(tokens, tokens, floats, *sizes, **blocks)
