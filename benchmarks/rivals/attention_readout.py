"""What one would write without the op. Each rival takes (query, keys, values, groups, n_groups, bias, scale).

Groups are [L], the same for every image, bias [M, 1, L]; results as those of the op, for groups that are not empty.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

Result = tuple[Tensor, Tensor]


def scores_of(query: Tensor, keys: Tensor, scale: float) -> Tensor:
    """[B, H, L]: a matrix product reads the keys as they lie, which is faster than an einsum that moves them."""
    query = query.expand(len(keys), -1, -1)
    return (keys.transpose(1, 2) @ query[..., None])[..., 0] * scale


def masked(
    query: Tensor, keys: Tensor, values: Tensor, groups: Tensor, n_groups: int, bias: Tensor, scale: float
) -> Result:
    """Scores once, M x G softmaxes over all keys with the others masked, one batched product."""
    x = scores_of(query, keys, scale)[:, :, None] + bias[:, 0]  # [B, H, M, L]
    member = F.one_hot(groups, n_groups).T.bool()
    split = x[:, :, :, None].masked_fill(~member, -torch.inf)  # [B, H, M, G, L]
    mean = split.softmax(-1).flatten(2, 3) @ values.transpose(1, 2)
    shape = (*x.shape[:3], n_groups)
    return mean.view(*shape, -1).permute(2, 0, 1, 3, 4), split.logsumexp(-1).permute(2, 0, 1, 3)


def product(
    query: Tensor, keys: Tensor, values: Tensor, groups: Tensor, n_groups: int, bias: Tensor, scale: float
) -> Result:
    """One exponential a key and variant, groups as columns of a second product; one maximum, so not as accurate."""
    x = scores_of(query, keys, scale)[:, :, None] + bias[:, 0]
    top = x.amax(-1, keepdim=True)
    weight = (x - top).exp_()
    member = F.one_hot(groups, n_groups).to(x.dtype)
    mass = weight @ member  # [B, H, M, G]
    sums = (weight[:, :, :, None] * member.T).flatten(2, 3) @ values.transpose(1, 2)
    mean = sums.view(*mass.shape, -1) / mass[..., None]
    return mean.permute(2, 0, 1, 3, 4), (mass.log() + top).permute(2, 0, 1, 3)


def by_group(
    query: Tensor, keys: Tensor, values: Tensor, groups: Tensor, n_groups: int, bias: Tensor, scale: float
) -> Result:
    """Scores once; a softmax and a product for each group, over its own keys only: no multiplication is wasted."""
    x = scores_of(query, keys, scale)[:, :, None] + bias[:, 0]
    moved = values.transpose(1, 2)
    means, masses = [], []
    for g in range(n_groups):
        index = (groups == g).nonzero()[:, 0]
        part = x[..., index]
        means.append(part.softmax(-1) @ moved[:, :, index])
        masses.append(part.logsumexp(-1))
    return torch.stack(means, -2).permute(2, 0, 1, 3, 4), torch.stack(masses, -1).permute(2, 0, 1, 3)


def sdpa(
    query: Tensor, keys: Tensor, values: Tensor, groups: Tensor, n_groups: int, bias: Tensor, scale: float
) -> Result:
    """torch's attention with a query row for each variant and group; scores once more for the masses."""
    batch, length, n_heads, _ = keys.shape
    variants = len(bias)
    member = F.one_hot(groups, n_groups).T.bool()
    mask = bias[:, 0, None].masked_fill(~member, -torch.inf).view(variants * n_groups, length)
    rows = query.expand(batch, -1, -1)[:, :, None].expand(-1, -1, len(mask), -1)
    mean = F.scaled_dot_product_attention(rows, keys.transpose(1, 2), values.transpose(1, 2), mask, scale=scale)
    mass = (scores_of(query, keys, scale)[:, :, None] + mask).logsumexp(-1)
    shape = (batch, n_heads, variants, n_groups)
    return mean.view(*shape, -1).permute(2, 0, 1, 3, 4), mass.view(shape).permute(2, 0, 1, 3)


def merged(
    query: Tensor, keys: Tensor, values: Tensor, groups: Tensor, n_groups: int, bias: Tensor, scale: float
) -> Result:
    """The op's own idea: keys of one group with equal biases are added up before the variants are formed.

    One maximum for all groups and no way out where scores and biases are far apart, so not as accurate.
    """
    pairs = torch.cat([groups[None].to(bias.dtype), bias[:, 0]])
    columns, column = pairs.unique(dim=1, return_inverse=True)
    score = scores_of(query, keys, scale)
    top = score.amax(-1, keepdim=True)
    spread = F.one_hot(column, columns.shape[1]).T * (score - top).exp_()[:, :, None]  # [B, H, C, L]
    sums = torch.cat([spread @ values.transpose(1, 2), spread.sum(-1, keepdim=True)], -1)
    factor = columns[1:].exp()
    means, masses = [], []
    for g in range(n_groups):
        index = (columns[0] == g).nonzero()[:, 0]
        found = factor[:, index] @ sums[:, :, index]
        means.append(found[..., :-1] / found[..., -1:])
        masses.append(found[..., -1].log() + top)
    return torch.stack(means, -2).permute(2, 0, 1, 3, 4), torch.stack(masses, -1).permute(2, 0, 1, 3)


RIVALS: dict[str, Callable[..., Result]] = {
    "masked": masked,
    "product": product,
    "by_group": by_group,
    "sdpa": sdpa,
    "merged": merged,
}
