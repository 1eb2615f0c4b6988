"""confusion_pairs: every dtype, with and without statistics, short and long lists."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from capt.kernels import confusion_pairs as k


def variants(mock: Any) -> Iterator[tuple[str, Any]]:
    """1000 classes."""
    longs, floats = mock(torch.int64), mock(torch.float32)
    for dtype, counted, n_best in [
        (torch.float32, False, 5),
        (torch.float32, True, 100),
        (torch.float32, True, 5),
        (torch.float16, True, 5),
        (torch.bfloat16, True, 5),
    ]:
        compiled = k._pairs_kernel.warmup(
            mock(dtype), longs, longs, floats, longs, longs, floats, 1000, 1000, n_best,
            HAS_COUNTS=counted, BLOCK=k.MAX_BLOCK, LIST=8 if n_best == 5 else k.MAX_LIST, CHUNK=k.CHUNK,
            num_warps=k.NUM_WARPS, grid=(1,),
        )  # fmt: skip
        yield f"{str(dtype).removeprefix('torch.')} statistics={counted} k={n_best}", compiled
