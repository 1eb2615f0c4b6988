"""bank_topk: scans of the whole bank and of ranges in every dtype, the merge, short and long lists, later walks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

from capt.kernels import bank_topk as k


def _with_wide_products(compiled: Any) -> Any:
    """A kernel whose addresses are products of int64: row_step * (d - 1) of a column-major bank passes 2^31."""
    products = re.findall(r"arith\.muli [^\n]*: (tensor<[^>]*>)", compiled.asm["ttir"])
    assert products and all(kind.endswith("xi64>") for kind in products), products
    return compiled


def variants(mock: Any) -> Iterator[tuple[str, Any]]:
    """64 queries, 100,000 rows of 512 features."""
    longs, floats = mock(torch.int64), mock(torch.float32)
    whole = {"BLOCK_Q": k.BLOCK_Q, "BLOCK_N": k.BLOCK_N, "UPCAST": False, "num_warps": k.NUM_WARPS}
    ranges = {"BLOCK_N": k.RANGE_N, "num_warps": k.RANGE_WARPS, "maxnreg": k.RANGE_REGISTERS}
    for dtype, exclude, width in [
        (torch.float32, True, 16),
        (torch.float16, True, 16),
        (torch.bfloat16, False, 16),
        (torch.bfloat16, True, 16),
        (torch.bfloat16, True, k.MAX_LIST),
    ]:
        features = mock(dtype)
        name = f"{str(dtype).removeprefix('torch.')} exclude={exclude} list={width}"
        options = {
            "EXCLUDE": exclude,
            "LIMITED": width == k.MAX_LIST,
            "LIST": width,
            "BLOCK_D": k.BLOCK_D,
            "grid": (1,),
        }
        sizes = (100_000, 512, 512, 1, 32)
        scan = k._scan_kernel.warmup(features, features, *[longs] * 4, 64, *sizes, **whole, **options)
        yield f"whole {name}", scan
        scan = k._scan_ranges_kernel.warmup(features, features, *[longs] * 5, 5, 2, *sizes, **ranges, **options)
        yield f"ranges {name}", scan
        options["BLOCK_D"] = k.STRIDED_D
        sizes = (3_000_001, 768, 1, 3_000_001, 32)
        scan = k._scan_strided_kernel.warmup(features, features, *[longs] * 4, 64, *sizes, **whole, **options)
        yield f"whole strided {name}", _with_wide_products(scan)
        scan = k._scan_ranges_strided_kernel.warmup(features, features, *[longs] * 5, 5, 2, *sizes, **ranges, **options)
        yield f"ranges strided {name}", _with_wide_products(scan)
    for width in (16, k.MAX_LIST):
        compiled = k._merge_kernel.warmup(
            longs, longs, floats, longs, 32 * width, width, 0, width,
            LIST=width, BLOCK_M=k.BLOCK_M, num_warps=k.NUM_WARPS, grid=(1,),
        )  # fmt: skip
        yield f"merge list={width}", compiled
