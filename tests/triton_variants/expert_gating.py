"""expert_gating: every kernel in every dtype, the products in every configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from capt.kernels import expert_gating as k


def variants(mock: Any) -> Iterator[tuple[str, Any]]:
    """Sizes of 32 ViT-B/16 images."""
    tokens, dim, width = 32 * 197, 768, 3072
    floats = mock(torch.float32)
    words = {"low": 5, "high": 7, "threshold": 9, "scale": 1.25, "HAS_DROPOUT": True}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        name, values = str(dtype).removeprefix("torch."), mock(dtype)
        for experts in (3, 16) if dtype == torch.float32 else (3,):
            blocks = k.router_blocks(experts)
            yield (
                f"router {name} experts={experts}",
                k._router_kernel.warmup(values, values, floats, floats, tokens, dim, experts, 2, **blocks, grid=(1,)),
            )
            rows = (floats, floats, floats, floats, floats, values, values, tokens, dim, experts)
            yield (
                f"router_backward {name} experts={experts}",
                k._router_backward_kernel.warmup(*rows, NEED_X=True, **blocks, grid=(1,)),
            )
        sizes = (tokens, dim, width, 3)
        for few in (True, False):
            config = k.CONFIGS[dtype.itemsize, few]
            yield (
                f"hidden {name} few={few}",
                k._hidden_kernel.warmup(values, floats, values, values, values, *sizes, **words, **config, grid=(1,)),
            )
            yield (
                f"output {name} few={few}",
                k._output_kernel.warmup(values, floats, values, values, values, *sizes, **config, grid=(1,)),
            )
        rows = (values, values, floats, values, values, values, floats)
        yield (
            f"hidden_backward {name}",
            k._hidden_backward_kernel.warmup(*rows, *sizes, **words, **k.HIDDEN_CONFIG, grid=(1,)),
        )
