"""An image tower, and a backbone, whose pooling row is re-weighted: everything else sees a tower like any other."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from capt.backbones.backbone import Backbone
from capt.backbones.base import TokenBlock, TokenTower, WrappedBlock
from capt.backbones.pooling import Pooling, plain_pooling, with_feature
from capt.errors import CaptError
from capt.modules.key_groups import CenterGroups, Grouping
from capt.modules.redistributed_row import mixed_values
from capt.modules.redistribution import Redistribution


class RedistributedBlock(WrappedBlock):
    """A block whose class token attends by another row; what the other tokens get is as it was, bit for bit."""

    def __init__(self, block: TokenBlock, tower: TokenTower, rule: Redistribution, grouping: Grouping) -> None:
        super().__init__(block)
        self.tower, self.rule, self.grouping = tower, rule, grouping

    def attend(self, x: Tensor) -> Tensor:
        """``x + MHSA(LN1 x)``, [B, L, D], row 0 re-weighted."""
        attended = self.block.attend(x)
        parts = self.block.attention()
        row = Pooling("class token", self.tower, 0, parts.before, parts, residual=True)
        mixed = mixed_values(row, x, [self.rule], self.grouping)[0]
        return torch.cat([row.row(mixed, x)[:, None], attended[:, 1:]], dim=1)


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
    pooling, grouping = plain_pooling(backbone.tower), grouping or CenterGroups()
    plain = pooling.tower
    if pooling.kind != "class token" and layers != 1:
        raise CaptError(
            f"layers: {layers}, but this tower pools by {pooling.kind}, so the only pooling row is in its last "
            "aggregation; use layers=1, or key_bias for the blocks before"
        )
    made = with_feature(plain, project=partial(_project, plain, rule, grouping))
    if pooling.kind == "class token" and not rule.neutral:
        first = len(plain.blocks) - _checked_layers(layers, len(plain.blocks))
        changed = (RedistributedBlock(block, plain, rule, grouping) for block in plain.blocks[first:])
        made.blocks = [*plain.blocks[:first], *changed]
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
