"""What ``pair_frontier`` means, in plain PyTorch; the other ops are in ``capt.reference``."""

from __future__ import annotations

import torch
from torch import Tensor

from capt.reference import accumulate_dtype, own_precision


@own_precision
def pair_frontier(
    scores: Tensor,
    group: Tensor,
    start: int,
    n_groups: int,
    state: Tensor | None = None,
    object: Tensor | None = None,
    pairs: Tensor | None = None,
    previous: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Best score and lowest pair id per (image, group), earlier chunks included; see ``capt.ops.pair_frontier``.

    scores [B, K], group int64 [K] in [-1, n_groups) (-1: no group) -> fp [B, n_groups], int64 [B, n_groups].
    """
    if state is not None and object is not None and pairs is not None:
        accumulate = accumulate_dtype(scores.dtype)
        term = state.to(accumulate)[:, pairs[:, 0]] * object.to(accumulate)[:, pairs[:, 1]]
        scores = scores.to(accumulate) + term  # two roundings
    batch = scores.shape[0]
    usable = (group >= 0).expand_as(scores) & (scores > float("-inf"))
    slot = group.clamp_min(0).expand_as(scores)
    scores = scores.masked_fill(~usable, float("-inf"))
    best = scores.new_full((batch, n_groups), float("-inf")).scatter_reduce(1, slot, scores, "amax")
    pair = torch.arange(start, start + scores.shape[1], device=scores.device).expand_as(slot)
    none = torch.iinfo(torch.int64).max
    pair = pair.masked_fill(~usable | (scores != best.gather(1, slot)), none)
    index = torch.full_like(best, none, dtype=torch.int64).scatter_reduce(1, slot, pair, "amin")
    if previous is not None:
        score, earlier = previous[0], previous[1].masked_fill(previous[1] < 0, none)
        older = (score > best) | ((score == best) & (earlier < index))
        best, index = torch.where(older, score, best), torch.where(older, earlier, index)
    return best + 0.0, index.masked_fill(index == none, -1)  # -0.0 becomes 0.0
