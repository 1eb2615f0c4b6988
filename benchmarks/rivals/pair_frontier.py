"""What one would write without the op: the best pair of each group by torch.max, or by scatter_reduce.

Each rival takes (scores, groups) and returns (score, pair). Groups are prepared once, in the form the rival likes best.
Which of equal scores wins is left open, which costs nothing and which the rivals may use. ``with_term`` forms the
scores for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

NONE = float("-inf")


def with_term(scores: Tensor, state: Tensor, object: Tensor, pairs: tuple[Tensor, ...]) -> Tensor:
    """scores + state * object of each pair; pairs (states, objects)."""
    return torch.addcmul(scores, state.index_select(1, pairs[0]), object.index_select(1, pairs[1]))


def masked(scores: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    """outside bool [G, K]: the pairs that do not belong to a group; a masked copy and a maximum for each group."""
    best = [scores.masked_fill(others, NONE).max(dim=1) for others in outside]
    return torch.stack([one.values for one in best], 1), torch.stack([one.indices for one in best], 1)


def by_group(scores: Tensor, groups: tuple[Tensor, list[int]]) -> tuple[Tensor, Tensor]:
    """groups (pairs sorted by group, number in each group): one gathered copy, a maximum over each part of it."""
    order, sizes = groups
    best = [part.max(dim=1) for part in scores.index_select(1, order).split(sizes, 1)]
    pairs = [own[one.indices] for one, own in zip(best, order.split(sizes), strict=True)]
    return torch.stack([one.values for one in best], 1), torch.stack(pairs, 1)


def scatter(scores: Tensor, groups: tuple[Tensor, Tensor, int]) -> tuple[Tensor, Tensor]:
    """groups (pairs [K'], their groups [K'], G), candidates alone: two scattered reductions, as in the reference."""
    pairs, group, n_groups = groups
    scores = scores.index_select(1, pairs)
    group, pairs = group.expand_as(scores), pairs.expand_as(scores)
    best = scores.new_full((len(scores), n_groups), NONE).scatter_reduce(1, group, scores, "amax")
    pair = pairs.masked_fill(scores != best.gather(1, group), torch.iinfo(torch.int64).max)
    return best, torch.full_like(best, -1, dtype=torch.int64).scatter_reduce(1, group, pair, "amin", include_self=False)


RIVALS = {"masked": masked, "by_group": by_group, "scatter": scatter}
