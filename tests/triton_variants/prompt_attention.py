"""prompt_attention: every kernel and every listed configuration in every dtype."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from capt.kernels import prompt_attention as g
from capt.kernels import prompt_attention_shared as s

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def variants(mock: Any) -> Iterator[tuple[str, Any]]:
    """Sizes of 100 images with 3 pairs of 5 prompts, and of 100 classes with 4 prompts over ViT-B/16 tokens."""
    floats, indices = mock(torch.float32), mock(torch.int64)
    for dtype in DTYPES:
        name, x = str(dtype).removeprefix("torch."), mock(dtype)
        blocks = {"BLOCK_R": g.BLOCK_R, "BLOCK_D": g.BLOCK_D, "grid": (1,), "num_warps": g.NUM_WARPS}
        sizes = (3, 5, 7, 50, 60, 768, 0.5)
        for prior in (False, True):
            yield (
                f"gathered forward {name} prior={prior}",
                g._gathered_kernel.warmup(
                    x, x, x, indices, indices, floats, x, x, floats, floats, *sizes, HAS_PRIOR=prior, **blocks
                ),
            )
        given = (x, x, x, x, indices, indices, floats, floats, floats, floats, x, floats)
        for query, prior in ((True, False), (True, True), (False, True)):
            yield (
                f"gathered backward {name} query={query} prior={prior}",
                g._gathered_backward_kernel.warmup(*given, *sizes, NEED_QUERY=query, NEED_PRIOR=prior, **blocks),
            )
        yield (
            f"gathered tables {name}",
            g._table_kernel.warmup(
                x, x, floats, floats, indices, indices, x, 3, 5, 768, 0.5, BLOCK_D=g.BLOCK_D, grid=(1,), num_warps=1
            ),
        )
        yield (
            f"shared delta {name}",
            s._delta_kernel.warmup(
                x,
                x,
                floats,
                floats,
                13,
                400,
                8,
                64,
                BLOCK_M=s.DELTA_ROWS,
                BLOCK_C=s.DELTA_WIDTH,
                grid=(1,),
                num_warps=4,
            ),
        )
        yield from _shared(name, x, floats, dtype.itemsize)


def _shared(name: str, x: Any, floats: Any, itemsize: int) -> Iterator[tuple[str, Any]]:
    """The three passes at the widest head of each configuration; float32 products without tensor cores compile slowly,
    so that of the flags only the two extremes are taken.
    """
    for head in s.CONFIGS["forward", itemsize]:
        width = 8 * head
        strides = (197 * width, width, 197 * width, width, 0.125)
        sizes = (7, 400, 300, 400 * width, 197, 8, head, 0, 0, *strides)
        options = s.blocks("forward", itemsize, head)
        yield (
            f"shared forward {name} head={head}",
            s._forward_kernel.warmup(x, x, x, x, x, x, floats, floats, *sizes, **options, grid=(1,)),
        )
        options = s.blocks("keys", itemsize, head)
        for keys in (True, False):
            yield (
                f"shared keys {name} head={head} keys={keys} values=True",
                s._keys_kernel.warmup(
                    x, x, x, x, x, x, floats, floats, floats, floats, x, x, *sizes,
                    NEED_KEYS=keys, NEED_VALUES=True, **options, grid=(1,),
                ),
            )  # fmt: skip
        options = s.blocks("query", itemsize, head)
        yield (
            f"shared query {name} head={head}",
            s._query_kernel.warmup(
                x, x, x, x, floats, floats, x, 7, 32, 400, 197, 8, head, *strides,
                PER_IMAGE=head == 64, **options, grid=(1,),
            ),
        )  # fmt: skip
