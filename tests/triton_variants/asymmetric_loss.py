"""asymmetric_loss: every dtype of logits, both kinds of targets, whole and other exponents, with and without margin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from capt.kernels import asymmetric_loss as k


def variants(mock: Any) -> Iterator[tuple[str, Any]]:
    """A batch of 16 x 5000."""
    floats = mock(torch.float32)
    for dtype, targets, gammas, margin, keep in [
        (torch.float32, torch.uint8, (0, 4), True, False),
        (torch.float32, torch.float32, (1, 2.5), True, True),
        (torch.float16, torch.uint8, (0, 4), True, False),
        (torch.bfloat16, torch.uint8, (0, 0), False, False),
    ]:
        compiled = k._loss_kernel.warmup(
            mock(dtype), mock(targets), floats, floats, floats, 80_000, -18.42, -2.94, float("inf"), -18.42, 0.05,
            1.25e-5, GAMMA_POS=gammas[0], WHOLE_POS=isinstance(gammas[0], int), GAMMA_NEG=gammas[1],
            WHOLE_NEG=isinstance(gammas[1], int), HAS_MARGIN=margin, KEEP=keep, BLOCK=k.BLOCK, num_warps=k.NUM_WARPS,
            grid=(1,),
        )  # fmt: skip
        label = f"{str(dtype)[6:]} targets={str(targets)[6:]} gammas={gammas} margin={margin} none={keep}"
        yield label, compiled
