"""pair_frontier: every dtype, with and without the primitive term, few groups, many, and more than the table holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton

from capt.kernels import pair_frontier as k


def variants(mock: Any) -> Iterator[tuple[str, Any]]:
    """8192 pairs of 413 states and 674 objects."""
    longs, floats = mock(torch.int64), mock(torch.float32)
    for dtype, term, n_groups in [
        (torch.float32, False, 2),
        (torch.float32, True, 2),
        (torch.float32, True, 51),
        (torch.float32, True, 5000),
        (torch.float16, True, 2),
        (torch.bfloat16, False, 2),
    ]:
        compiled = k._fold_kernel.warmup(
            mock(dtype), longs, floats, floats, longs, longs, 8192, n_groups, 413, 674, 8192, 0,
            HAS_TERM=term, IN_TABLE=n_groups <= k.MAX_TABLE, SPAN=k.SPAN, BLOCK=k.MAX_BLOCK,
            TABLE=min(k.MAX_TABLE, triton.next_power_of_2(n_groups)), num_warps=k.NUM_WARPS, enable_fp_fusion=False,
            grid=(1, 1),
        )  # fmt: skip
        assert "fma" not in compiled.asm["ptx"], "a product and a sum were fused"
        yield f"{str(dtype).removeprefix('torch.')} term={term} G={n_groups}", compiled
    for previous in (False, True):
        compiled = k._start_kernel.warmup(
            floats, longs, longs, 128, HAS_PREVIOUS=previous, BLOCK=k.MAX_SLOTS, grid=(1,)
        )
        yield f"start previous={previous}", compiled
    yield "finish", k._finish_kernel.warmup(longs, floats, longs, 128, BLOCK=k.MAX_SLOTS, grid=(1,))
