"""An image tower, and a backbone, whose pooling row is re-weighted: everything else sees a tower like any other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from capt.backbones.attention import AttentionParts
from capt.backbones.backbone import Backbone
from capt.backbones.base import BlockParts, FeedForward, TokenBlock, TokenGrid, TokenTower
from capt.backbones.pooling import Pooling, plain_pooling
from capt.backbones.towers_open_clip import FeatureMapTower
from capt.errors import CaptError
from capt.modules.key_groups import CenterGroups, Grouping
from capt.modules.redistributed_row import mixed_values
from capt.modules.redistribution import Redistribution


class RedistributedBlock(TokenBlock):
    """A block whose class token attends by another row; what the other tokens get is as it was, bit for bit."""

    def __init__(self, block: TokenBlock, tower: TokenTower, rule: Redistribution, grouping: Grouping) -> None:
        self.block, self.tower, self.rule, self.grouping = block, tower, rule, grouping

    def attend(self, x: Tensor) -> Tensor:
        """``x + MHSA(LN1 x)``, [B, L, D], row 0 re-weighted."""
        attended = self.block.attend(x)
        parts = self.block.attention()
        row = Pooling("class token", self.tower, 0, parts.before, parts, residual=True)
        mixed = mixed_values(row, x, [self.rule], self.grouping)[0]
        return torch.cat([row.row(mixed, x)[:, None], attended[:, 1:]], dim=1)

    def feed_forward(self, x: Tensor) -> Tensor:
        """``x + MLP(LN2 x)``, [B, L, D]."""
        return self.block.feed_forward(x)

    def feed_forward_weights(self) -> FeedForward | None:
        """Those of the wrapped block."""
        return self.block.feed_forward_weights()

    def inner(self) -> BlockParts | None:
        """That of the wrapped block."""
        return self.block.inner()

    def attention(self) -> AttentionParts:
        """That of the wrapped block: the parts are the same, only the row's weights are not."""
        return self.block.attention()


class RedistributedTower(TokenTower):
    """A tower of blocks with a re-weighted pooling row.

    Attributes:
        plain: the tower below.
        rule, grouping: how it is re-weighted.

    Source: ours.
    """

    def __init__(self, plain: TokenTower, rule: Redistribution, grouping: Grouping, layers: int | None = 1) -> None:
        """See :func:`redistributed`."""
        kind = plain.pooling().kind
        if kind != "class token" and layers != 1:
            raise CaptError(
                f"layers: {layers}, but this tower pools by {kind}, so the only pooling row is in its last "
                "aggregation; use layers=1, or key_bias for the blocks before"
            )
        self.plain, self.rule, self.grouping = plain, rule, grouping
        self.image_hw, self.grid, self.width, self.dim = plain.image_hw, plain.grid, plain.width, plain.dim
        self.n_prefix, self.activation, self.pools_first = plain.n_prefix, plain.activation, plain.pools_first
        self.blocks = list(plain.blocks)
        if kind == "class token" and not rule.neutral:
            first = len(self.blocks) - _checked_layers(layers, len(self.blocks))
            self.blocks[first:] = [RedistributedBlock(b, plain, rule, grouping) for b in self.blocks[first:]]

    def _embed(self, images: Tensor) -> Tensor:
        return self.plain._embed(images)

    def project(self, tokens: Tensor) -> Tensor:
        """Re-weighted pooling and projection: [B, n_prefix+H*W, D] to [B, d]."""
        return _project(self.plain, self.rule, self.grouping, tokens)

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """Every token as if it alone were pooled: as in the plain tower."""
        return self.plain.project_tokens(tokens)

    def pooling(self) -> Pooling:
        """That of the plain tower."""
        return self.plain.pooling()


class RedistributedMapTower(FeatureMapTower):
    """A tower whose tokens are a feature map, with re-weighted attention or average pooling.

    Attributes:
        plain: the tower below.
        rule, grouping: how it is re-weighted.

    Source: ours.
    """

    def __init__(self, plain: FeatureMapTower, rule: Redistribution, grouping: Grouping) -> None:
        """See :func:`redistributed`."""
        plain.pooling()
        self.plain, self.rule, self.grouping = plain, rule, grouping
        self.image_hw, self.grid, self.width, self.dim = plain.image_hw, plain.grid, plain.width, plain.dim
        self.n_prefix, self.activation, self.visual = plain.n_prefix, plain.activation, plain.visual

    def _features(self, images: Tensor) -> Tensor:
        return self.plain._features(images)

    def project(self, tokens: Tensor) -> Tensor:
        """Re-weighted pooling and projection: [B, n_prefix+H*W, D] to [B, d]."""
        return _project(self.plain, self.rule, self.grouping, tokens)

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """Every token as if it alone were pooled: as in the plain tower."""
        return self.plain.project_tokens(tokens)

    def run_stages(self, images: Tensor) -> tuple[Tensor, list[TokenGrid]]:
        """Those of the plain tower."""
        return self.plain.run_stages(images)

    def stages(self, images: Tensor, depths: Sequence[int] | None = None) -> list[TokenGrid]:
        """Those of the plain tower."""
        return self.plain.stages(images, depths)

    def pooling(self) -> Pooling:
        """That of the plain tower."""
        return self.plain.pooling()


def redistributed(
    backbone: Backbone, rule: Redistribution, grouping: Grouping | None = None, *, layers: int | None = 1
) -> Backbone:
    """The same model with its pooling row re-weighted: a backbone for everything that takes one.

    A neutral rule takes the model's own path, so its features are those of ``backbone`` bit for bit.

    Args:
        backbone: left as it is; weights and text features are shared.
        rule: such as ``MassTransfer(0.6)``.
        grouping: groups that the rule speaks of; default: centre and off-centre patches.
        layers: of a class token, in how many of the last blocks its row is re-weighted; None: in all.

    Raises:
        CaptError: a pooling that cannot be taken apart, or one that is changed already.
    """
    tower, grouping = plain_pooling(backbone.tower).tower, grouping or CenterGroups()
    made: TokenTower
    if isinstance(tower, FeatureMapTower):
        if layers != 1:
            raise CaptError(f"layers: {layers}, but a tower without blocks has one aggregation; use layers=1")
        made = RedistributedMapTower(tower, rule, grouping)
    else:
        made = RedistributedTower(tower, rule, grouping, layers)
    record = {} if rule.neutral else {"pooling": {**rule.record(), "groups": grouping.record(), "layers": layers}}
    return backbone.with_tower(made, record)


def _project(plain: TokenTower, rule: Redistribution, grouping: Grouping, tokens: Tensor) -> Tensor:
    pooling = plain.pooling()
    if rule.neutral or pooling.kind == "class token":  # whose row was re-weighted in the block
        return plain.project(tokens)
    return pooling.features(mixed_values(pooling, tokens, [rule], grouping)[0], tokens)


def _checked_layers(layers: int | None, depth: int) -> int:
    if layers is None:
        return depth
    if not 1 <= layers <= depth:
        raise CaptError(f"layers: {layers}, but the tower has {depth} blocks; use 1 to {depth}, or None for all")
    return layers
