"""An image tower's first and last layer maps, and its feature, with bottleneck adapters in between."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.backbones.base import TokenGrid, TokenTower
from capt.backbones.towers_open_clip import FeatureMapTower
from capt.errors import CaptError
from capt.modules.bottleneck_adapter import BottleneckAdapter

LARGEST_GRID = 14  # of maps of convolutional stages; larger ones are averaged down


class LayerMaps(NamedTuple):
    """What is seen of a batch of images, float32 whatever the tower computes in.

    Attributes:
        feature: [B, d], un-normalised.
        low: [B, L, W], maps of the first layers side by side; None where there are none.
        high: [B, L', W'], maps of the last layers.
    """

    feature: Tensor
    low: Tensor | None
    high: Tensor | None


class LayerTap(nn.Module):
    """Reads :class:`LayerMaps` from a frozen tower.

    Attributes:
        n_low, n_high: layers of each group.
        low_width, high_width: W and W', 0 without maps.
        input_kind: equal for taps of one tower whose :meth:`inputs` are equal.
    """

    low_width: int
    high_width: int
    input_kind: Hashable

    def __init__(self, depth: int, unit: str, n_low: int | None, n_high: int | None) -> None:
        """``depth``: layers of the tower, called ``unit``.

        Raises:
            CaptError: the groups overlap, or the tower is not as deep.
        """
        super().__init__()
        low, high = (max(1, min(3, depth // 2)) if n is None else n for n in (n_low, n_high))
        if min(low, high) < 0 or low + high > depth:
            raise CaptError(
                f"layer maps: n_low={low} and n_high={high} are {low + high} different layers, but this image tower "
                f"has {depth} {unit}; take fewer of them, or one stage alone (stages='low' or 'high')"
            )
        self.n_low, self.n_high = low, high

    @abstractmethod
    def inputs(self, images: Tensor) -> Tensor:
        """What :meth:`forward` takes, of transformed images [B, 3, H, W]: frozen, so it may be cached."""

    @abstractmethod
    def forward(self, inputs: Tensor) -> LayerMaps:
        """Maps with gradients to the adapters."""


class BlockTap(LayerTap):
    """A tower of transformer blocks: two adapters a block, beside attention and beside feed-forward.

    A map is all tokens after a block, prefix included, each through the frozen final norm and projection.

    Source: MSCI's published code.
    """

    def __init__(
        self, tower: TokenTower, n_low: int | None = None, n_high: int | None = None, *, adapter_width: int = 64,
        adapter_dropout: float = 0.1,
    ) -> None:  # fmt: skip
        """See :func:`layer_tap`."""
        n = len(tower.blocks)
        super().__init__(n, "blocks", n_low, n_high)
        self.tower, self.input_kind = tower, "tokens"
        self.low_depths, self.high_depths = range(1, self.n_low + 1), range(n - self.n_high + 1, n + 1)
        self.low_width, self.high_width = self.n_low * tower.dim, self.n_high * tower.dim
        self.adapters = nn.ModuleList(
            BottleneckAdapter(tower.width, adapter_width, dropout=adapter_dropout)
            for _ in range(2 * n if adapter_width else 0)
        )

    def inputs(self, images: Tensor) -> Tensor:
        """Tokens that enter block 0, [B, L, D]."""
        with torch.no_grad():
            return self.tower.embed(images)

    def forward(self, inputs: Tensor) -> LayerMaps:
        """Maps of tokens [B, L, D]."""
        x, maps = inputs, {}
        for index, block in enumerate(self.tower.blocks):
            for half, part in enumerate((block.attend, block.feed_forward)):
                x = part(x) + self.adapters[2 * index + half](x) if self.adapters else part(x)
            if index + 1 in self.low_depths or index + 1 in self.high_depths:
                maps[index + 1] = self.tower.project_tokens(x)
        low, high = ([maps[depth] for depth in depths] for depths in (self.low_depths, self.high_depths))
        return LayerMaps(self.tower.project(x).float(), _side_by_side(low), _side_by_side(high))


class PyramidTap(LayerTap):
    """A tower whose layers are convolutional stages: maps of the first and last of them, one adapter after the last.

    The maps of a group are averaged down to the coarsest grid among them, at most 14 x 14; in place of the deepest
    stage stand the final tokens, each through the frozen projection. All before the adapter is frozen, so
    :meth:`inputs` holds final tokens and maps in one row an image.

    Source: ours (MSCI knows vision transformers only).
    """

    def __init__(
        self, tower: FeatureMapTower, n_low: int | None = None, n_high: int | None = None, *, adapter_width: int = 64,
        adapter_dropout: float = 0.1,
    ) -> None:  # fmt: skip
        """See :func:`layer_tap`."""
        blank = next(tower.visual.parameters()).new_zeros(1, 3, *tower.image_hw)
        with torch.no_grad():
            tokens, stages = tower.run_stages(blank)
        super().__init__(len(stages), "stages", n_low, n_high)
        self.tower, self.input_kind = tower, ("stages", self.n_low, self.n_high)
        low, high = self._groups(stages)
        self.grids = _common_grid(low), _common_grid([*high, TokenGrid("final", tokens, tower.grid)])
        widths = [sum(stage.tokens.shape[2] for stage in group) for group in (low, high)]
        self.low_width, self.high_width = widths[0], widths[1] + tower.dim if self.n_high else 0
        maps = (torch.Size((math.prod(grid), width)) for grid, width in zip(self.grids, widths, strict=True))
        self._shapes = [tokens.shape[1:], *maps]
        self.adapter = BottleneckAdapter(tower.width, adapter_width, dropout=adapter_dropout) if adapter_width else None

    def _groups(self, stages: Sequence[TokenGrid]) -> tuple[Sequence[TokenGrid], Sequence[TokenGrid]]:
        """The first stages, and the last ones but the deepest."""
        return stages[: self.n_low], stages[len(stages) - self.n_high : -1]

    def inputs(self, images: Tensor) -> Tensor:
        """Final tokens and stage maps, [B, all of their numbers]."""
        with torch.no_grad():
            tokens, stages = self.tower.run_stages(images)
            maps = [
                torch.cat([_pooled(stage, grid) for stage in group], dim=-1).flatten(1)
                for group, grid in zip(self._groups(stages), self.grids, strict=True)
                if group
            ]
            return torch.cat([tokens.flatten(1), *maps], dim=1)

    def forward(self, inputs: Tensor) -> LayerMaps:
        """Maps of :meth:`inputs`."""
        parts = inputs.split([math.prod(shape) for shape in self._shapes], dim=1)
        tokens, low, high = (part.reshape(len(inputs), *shape) for part, shape in zip(parts, self._shapes, strict=True))
        if self.adapter is not None:
            tokens = tokens + self.adapter(tokens)
        if self.n_high:
            final = TokenGrid("final", self.tower.project_tokens(self.tower.patches(tokens)), self.tower.grid)
            high = torch.cat([high, _pooled(final, self.grids[1])], dim=-1)
        return LayerMaps(
            self.tower.project(tokens).float(),
            low.float() if self.n_low else None,
            high.float() if self.n_high else None,
        )


def layer_tap(
    tower: TokenTower, n_low: int | None = None, n_high: int | None = None, *, adapter_width: int = 64,
    adapter_dropout: float = 0.1,
) -> LayerTap:  # fmt: skip
    """The tap that fits a tower.

    Args:
        n_low, n_high: layers of each group; default: 3, or half of the tower's depth where that is less.
        adapter_width, adapter_dropout: of the bottleneck adapters; width 0: none.

    Raises:
        CaptError: the groups overlap, or the tower is not as deep.
    """
    if isinstance(tower, FeatureMapTower):
        return PyramidTap(tower, n_low, n_high, adapter_width=adapter_width, adapter_dropout=adapter_dropout)
    return BlockTap(tower, n_low, n_high, adapter_width=adapter_width, adapter_dropout=adapter_dropout)


def _common_grid(stages: Sequence[TokenGrid]) -> tuple[int, int]:
    """The coarsest grid, at most ``LARGEST_GRID`` a side; (0, 0) for no stage."""
    if not stages:
        return 0, 0
    height, width = (min(min(stage.grid[side] for stage in stages), LARGEST_GRID) for side in (0, 1))
    return height, width


def _pooled(stage: TokenGrid, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, L, C] of a stage averaged down to ``grid``."""
    if stage.grid == grid:
        return stage.tokens
    maps = stage.tokens.transpose(1, 2).unflatten(2, stage.grid)
    return F.adaptive_avg_pool2d(maps, grid).flatten(2).transpose(1, 2)


def _side_by_side(maps: Sequence[Tensor]) -> Tensor | None:
    return torch.cat(list(maps), dim=-1).float() if maps else None
