"""Where pooling rows look: masses, radii and entropies of their weights on the patch grid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from capt.backbones.attention import AttentionParts
from capt.backbones.pooling import Pooling
from capt.errors import CaptError
from capt.modules.key_groups import patch_positions, sink_mask

N_RINGS = 4


class AttentionRows(NamedTuple):
    """Pooling rows of images; of a class token in every block, else (layers = 1) in the last aggregation.

    Attributes:
        patches: [B, layers, H, N], weights of the patches, each row of them sums to 1.
        prefix: [B, layers, H], weight of class token and registers before that.
        value_norms: [B, layers, H, N], length of what each patch would write, alone and with weight 1, in front of any
            norm behind the heads.
        sinks: bool [B, layers, N], tokens of outlying norm at the input of the layer.
    """

    patches: Tensor
    prefix: Tensor
    value_norms: Tensor
    sinks: Tensor

    def value_weighted(self) -> Tensor:
        """Weights times lengths of values, rows sum to 1: what is written, where raw weights say what is read."""
        return _normalised(self.patches * self.value_norms)

    def without_sinks(self) -> Tensor:
        """Weights of the patches that are no sinks, rows sum to 1."""
        return _normalised(self.patches.masked_fill(self.sinks[:, :, None], 0.0))

    def sink_mass(self) -> Tensor:
        """Weight of the sinks among the patches, [B, layers, H]."""
        return (self.patches * self.sinks[:, :, None]).sum(-1)


def attention_rows(pooling: Pooling, images: Tensor, stream: Sequence[Tensor] | None = None) -> AttentionRows:
    """Pooling rows of images [B, 3, height, width]; only rows are kept, never an L x L map.

    Args:
        stream: the images' :meth:`~capt.backbones.base.TokenTower.stream`, if it is known: saves the pass.
    """
    if pooling.kind != "class token":
        inputs = pooling.inputs(images) if stream is None else stream[pooling.depth]
        values = pooling.values(inputs)
        found = [_row(pooling, pooling.attention, pooling.weights(inputs), values, pooling.tower.patches(inputs))]
        return AttentionRows(*(torch.stack(part, dim=1) for part in zip(*found, strict=True)))
    found = []
    for block, x in zip(pooling.tower.blocks, stream or pooling.tower.stream(images), strict=False):
        parts = block.attention()
        y = parts.before(x)
        scores = torch.einsum("bhc,blhc->bhl", parts.queries(y[:, 0]), parts.keys(y)) * parts.scale
        found.append(_row(pooling, parts, scores.softmax(-1), parts.values(y), x[:, -pooling.n_patches :]))
    return AttentionRows(*(torch.stack(part, dim=1) for part in zip(*found, strict=True)))


def center_mass(rows: Tensor, grid: tuple[int, int], radius: float = 0.5) -> Tensor:
    """Weight of the patches within ``radius`` (square radius) of rows [..., N], [...]."""
    return (rows * _center(rows, grid, radius)).sum(-1)


def center_ratio(rows: Tensor, grid: tuple[int, int], radius: float = 0.5) -> Tensor:
    """Centre mass over the centre's part of the patches, [...]: 1 is no preference."""
    return center_mass(rows, grid, radius) / _center(rows, grid, radius).float().mean()


def mean_radius(rows: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean radius under rows [..., N], [...]; ``patch_positions(grid).radius.mean()`` is that of an even row."""
    return rows @ patch_positions(grid, rows.device).radius.to(rows)


def radial_profile(rows: Tensor, grid: tuple[int, int], n_rings: int = N_RINGS) -> Tensor:
    """Weight of square rings of equal width over their part of the patches, [..., n_rings]; nan for an empty ring."""
    member = ring_members(grid, n_rings, rows.device).to(rows)
    return (rows @ member) / (member.sum(0) / member.shape[0])


def ring_members(grid: tuple[int, int], n_rings: int, device: torch.device | str | None = None) -> Tensor:
    """bool [N, n_rings]: the ring of each patch, by its square radius."""
    ring = (patch_positions(grid, device).square_radius * n_rings).long().clamp_max(n_rings - 1)
    return ring[:, None] == torch.arange(n_rings, device=device)


def object_gain(rows: Tensor, objects: Tensor) -> Tensor:
    """Weight of an object's patches over their part of all, [B, ...]: 1 is no preference.

    Args:
        rows: [B, ..., N].
        objects: bool [B, N] or [N].
    """
    member = objects.to(rows)
    member = member if member.ndim == 1 else member.view(len(member), *[1] * (rows.ndim - 2), -1)
    return (rows * member).sum(-1) / member.mean(-1)


def entropy(rows: Tensor) -> Tensor:
    """Entropy of rows [..., N] over that of an even row, [...]."""
    found: Tensor = -torch.special.xlogy(rows, rows).sum(-1) / math.log(rows.shape[-1])
    return found


def position_share(rows: Tensor) -> Tensor:
    """Part of the variance of log weights that the position alone explains, whatever the picture: [layers, H].

    NaN where all weights are equal and nothing is left to explain.

    Args:
        rows: [B, layers, H, N] of at least two images.
    """
    if len(rows) < 2:
        raise CaptError(f"position share: needs at least two images, found {len(rows)}")
    logs = rows.clamp_min(1e-30).log()
    between = logs.mean(0).var(-1, correction=0)
    total = logs.movedim(0, -2).flatten(-2).var(-1, correction=0)
    # Logs of equal weights differ by rounding.
    rounding = (8 * torch.finfo(logs.dtype).eps * logs.abs().amax()) ** 2
    return torch.where(total > rounding, between / total, torch.nan)


def _center(rows: Tensor, grid: tuple[int, int], radius: float) -> Tensor:
    center: Tensor = patch_positions(grid, rows.device).square_radius <= radius + 1e-6
    return center


def _row(
    pooling: Pooling, parts: AttentionParts | None, weights: Tensor, values: Tensor, patches: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Parts of :class:`AttentionRows` of one layer."""
    n, values = pooling.n_patches, values[:, -pooling.n_patches :].transpose(1, 2)  # [B, H, N, dh]
    if parts is not None:
        maps = parts.head_maps()
        # |W v| by the dh x dh product W'W: no [B, H, N, D].
        norms = torch.einsum("bhnd,hde,bhne->bhn", values, maps.mT @ maps, values).clamp_min(0).sqrt()
    else:
        norms = values.norm(dim=-1)
    return _normalised(weights[..., -n:]), weights[..., :-n].sum(-1), norms, sink_mask(patches)


def _normalised(rows: Tensor) -> Tensor:
    return rows / rows.sum(-1, keepdim=True).clamp_min(1e-30)
