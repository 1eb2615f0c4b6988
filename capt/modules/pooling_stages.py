"""Where in the last aggregation a concept is still there: read-outs of an image before, beside and after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.backbones.base import TokenTower
from capt.backbones.pooling import Pooling
from capt.errors import CaptError
from capt.modules.key_groups import KeyGroups, RegionGroups
from capt.ops import attention_readout


class PoolingStages(NamedTuple):
    """Un-normalised vectors in the joint space; the later ones are what the earlier ones became.

    Attributes:
        tokens: [B, N, d], each final patch token as if it alone were pooled ("logit lens": a probe, not trained for).
        values: [B, N, d], what each patch offers to the pooling row, alone: no mixing, no residual.
        single: [B, N, d], the pooling row with all its weight on one patch.
        mean: [B, d], the mean of the final patch tokens, pooled.
        even: [B, d], the pooling row with the same weight on every patch.
        oracle: [B, d], the pooling row restricted to the object's patches; None without a mask.
        final: [B, d], the feature.

    Source: value path after MaskCLIP (arXiv 2112.01071); the row of stages: ours.
    """

    tokens: Tensor
    values: Tensor
    single: Tensor
    mean: Tensor
    even: Tensor
    oracle: Tensor | None
    final: Tensor


def pooling_stages(pooling: Pooling, inputs: Tensor, objects: Tensor | None = None) -> PoolingStages:
    """All stages of images that enter the pooling as ``inputs`` [B, L', D].

    Args:
        objects: bool [B, N] or [N], patches of the object (:func:`patch_mask`).

    Raises:
        CaptError: an image without a patch of the object.
    """
    tower = pooling.tower
    done = tower.advance(inputs, start=pooling.depth)
    patches = tower.patches(done)
    return PoolingStages(
        tokens=tower.project_tokens(patches),
        values=value_tokens(pooling, inputs),
        single=single_patch(pooling, inputs),
        mean=tower.project_tokens(patches.mean(1, keepdim=True))[:, 0],
        even=even_row(pooling, inputs),
        oracle=None if objects is None else oracle(pooling, inputs, objects),
        final=tower.project(done),
    )


def value_tokens(pooling: Pooling, inputs: Tensor) -> Tensor:
    """Projected value of each patch, [B, N, d]: through output map, final norm and projection alone."""
    return pooling.head(pooling.merge(pooling.values(inputs)[:, -pooling.n_patches :]))


def single_patch(pooling: Pooling, inputs: Tensor) -> Tensor:
    """Features [B, N, d] with the whole pooling row on one patch."""
    values = pooling.values(inputs)[:, -pooling.n_patches :]
    return pooling.features(values.movedim(1, 0), inputs).movedim(0, 1)


def even_row(pooling: Pooling, inputs: Tensor) -> Tensor:
    """Features [B, d] with the same weight of the pooling row on every patch: no weight depends on a place."""
    return pooling.features(pooling.values(inputs)[:, -pooling.n_patches :].mean(1), inputs)


def oracle(pooling: Pooling, inputs: Tensor, objects: Tensor) -> Tensor:
    """Features [B, d] with the pooling row restricted to the patches of an object, bool [B, N] or [N]."""
    values = pooling.values(inputs)
    groups = RegionGroups(objects).of(pooling.grid, values.shape[1], inputs)
    return pooling.features(group_means(pooling, inputs, groups)[..., 1, :], inputs)


def group_means(pooling: Pooling, inputs: Tensor, groups: KeyGroups) -> Tensor:
    """Values mixed within each group of keys by the pooling row, [B, H, G, dh] (zeros for an empty group)."""
    if pooling.attention is None:
        values = pooling.values(inputs)
        query, keys = values.new_zeros(values.shape[2:]), torch.zeros_like(values)
    else:
        query, keys, values = pooling.heads(inputs)
    read = attention_readout(
        query, keys, values, groups=groups.labels, n_groups=len(groups.names), scale=pooling.scale
    )  # fmt: skip
    return read.mean[0]


def row_by_block(tower: TokenTower, images: Tensor, stream: Sequence[Tensor] | None = None) -> Tensor:
    """What the class token would give after each block, [B, blocks + 1, d]; the first is that of its embedding.

    Args:
        stream: the images' :meth:`~capt.backbones.base.TokenTower.stream`, if it is known: saves the pass.

    Raises:
        CaptError: a tower that does not pool by its first token.
    """
    if not tower.pools_first:
        raise CaptError("row by block: this tower's feature is not its first token's")
    return torch.stack([tower.project(x) for x in stream or tower.stream(images)], dim=1)


def patch_mask(alpha: Tensor, grid: tuple[int, int], share: float = 0.5) -> Tensor:
    """Patches of an object: bool [..., N] of its opacity [..., height, width] in [0, 1].

    A patch counts if at least ``share`` of its area is covered; if none is, the one that is covered most.

    Raises:
        CaptError: an object without any opacity.
    """
    area = F.adaptive_avg_pool2d(alpha.float().reshape(-1, 1, *alpha.shape[-2:]), grid).flatten(1)
    if not bool((area > 0).any(-1).all()):
        raise CaptError("alpha: an object that is transparent everywhere has no patches")
    most = area == area.amax(-1, keepdim=True)
    covered = area >= share
    return torch.where(covered.any(-1, keepdim=True), covered, most).reshape(*alpha.shape[:-2], -1)
