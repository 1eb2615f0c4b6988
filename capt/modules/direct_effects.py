"""The feature as an exact sum: what each layer, head and token wrote into the pooled row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from capt.backbones.attention import AttentionParts, unchanged
from capt.backbones.pooling import Pooling
from capt.errors import CaptError

Split = Literal["own", "uniform"]


@dataclass(frozen=True)
class FrozenMap:
    """A linear map whose norms are frozen at what they saw: ``scale[b] * (matrix @ u)``.

    matrix [E, D]; scale [B], of each image.
    """

    matrix: Tensor
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[B, ..., D] to [B, ..., E]."""
        return (x @ self.matrix.T) * self.scale.view(-1, *[1] * (x.ndim - 1))


@dataclass(frozen=True)
class RowLayer:
    """What one attention layer, and the feed-forward part behind it, wrote into the pooled row.

    Attributes:
        weights: [B, H, L], attention of the row.
        values: [B, L, H, dh].
        out: from the heads side by side, H * dh, into the stream; norms between are frozen.
        bias: [B, D], what the layer adds whatever the values are.
        feed_forward: [B, D], what the feed-forward part added; None without one.
    """

    weights: Tensor
    values: Tensor
    out: FrozenMap
    bias: Tensor
    feed_forward: Tensor | None


@dataclass(frozen=True)
class DirectEffects:
    """Parts of the un-normalised feature in the joint space; all of them together are the feature.

    Only what goes straight into the pooled row is counted, not what a token does through keys and values of later
    layers. Norms are frozen at what they saw, which makes them linear; every part is centred by its own mean.

    Attributes:
        layers: of a class token all blocks, else the one pooling layer.
        start: [B, D], the row before them; None where there is no residual.
        into: from the stream into the joint space, final norm frozen.
        constant: [B, E], offsets of the final norm and of the projection.
        row: [B, D], the pooled row in front of the final norm.
        level: [B, E], what a row of ones would give if it were not centred; zeros where nothing is centred.

    Source: direct effects of arXiv 2310.05916 for class tokens; attention pools, averages and frozen inner norms: ours.
    """

    layers: tuple[RowLayer, ...]
    start: Tensor | None
    into: FrozenMap
    constant: Tensor
    row: Tensor
    level: Tensor

    def total(self) -> Tensor:
        """The sum of all parts, the feature, [B, E]."""
        return self.components().sum(1)

    def contributions(self, layer: int) -> Tensor:
        """Of each head and token of one layer, [B, H, L, E]: large, see :meth:`concept_scores`."""
        one = self.layers[layer]
        mixed = one.weights[..., None] * one.values.transpose(1, 2)  # [B, H, L, dh]
        spread = mixed.new_zeros(*mixed.shape[:3], mixed.shape[1], mixed.shape[3])
        index = torch.arange(mixed.shape[1], device=mixed.device)
        spread[:, index, :, index] = mixed.movedim(1, 0)
        return self.into(one.out(spread.flatten(-2)))

    def heads(self) -> Tensor:
        """Of each layer and head, tokens summed, [B, layers, H, E]."""
        return torch.stack([self._by_head(one) for one in self.layers], dim=1)

    def tokens(self) -> Tensor:
        """Of each key, layers and heads summed, [B, L, E]."""
        parts = [one.out((one.weights.movedim(1, 2)[..., None] * one.values).flatten(2)) for one in self.layers]
        return self.into(torch.stack(parts).sum(0))

    def components(self, split: Split = "own") -> Tensor:
        """Of each component, [B, components, E]: start, attention of every layer, its bias, feed-forward, constant.

        ``split="uniform"``: every component is centred by an even part of the row's mean, and biases and constants are
        spread over the attention layers, as in public code of the decomposition: start, attention of every layer,
        feed-forward of every layer. The sum is the same, the parts differ.
        """
        start = torch.zeros_like(self.row) if self.start is None else self.start
        attention = [one.out(self._mixed(one)) for one in self.layers]
        feeding = [one.feed_forward for one in self.layers if one.feed_forward is not None]
        if split == "own":
            parts = [start, *attention, *(one.bias for one in self.layers), *feeding]
            return torch.cat([self.into(torch.stack(parts, dim=1)), self.constant[:, None]], dim=1)
        if split != "uniform":
            raise CaptError(f"split: 'own' or 'uniform', found {split!r}")
        parts = [start, *(a + one.bias for a, one in zip(attention, self.layers, strict=True)), *feeding]
        stack = torch.stack(parts, dim=1)
        # What the own mean took from each part is given back, and an even part of the row's mean taken instead.
        means = stack.mean(-1, keepdim=True)
        moved = self.level[:, None] * (means - means.mean(1, keepdim=True))
        return self.into(stack) + moved + self.constant[:, None] / len(parts)

    def concept_scores(self, concepts: Tensor) -> Tensor:
        """Inner product of every contribution with C directions, [B, layers, H, L, C]; nothing of width D or E is made.

        Args:
            concepts: [C, E], such as unit-norm texts. Divide by the feature's norm for shares of the cosine.

        Source: the order of the products is ours.
        """
        scores = []
        for one in self.layers:
            through = (concepts @ self.into.matrix) @ one.out.matrix  # [C, H * dh]
            through = through.unflatten(-1, (one.values.shape[2], -1))
            score = torch.einsum("blhd,chd->bhlc", one.values, through) * one.weights[..., None]
            scores.append(score * (self.into.scale * one.out.scale).view(-1, 1, 1, 1))
        return torch.stack(scores, dim=1)

    def _mixed(self, one: RowLayer) -> Tensor:
        return torch.einsum("bhl,blhd->bhd", one.weights, one.values).flatten(1)

    def _by_head(self, one: RowLayer) -> Tensor:
        mixed = torch.einsum("bhl,blhd->bhd", one.weights, one.values)
        alone = torch.diag_embed(torch.ones_like(mixed[..., 0]))[..., None] * mixed[:, None]  # [B, H, H, dh]
        return self.into(one.out(alone.flatten(-2)))


def direct_effects(pooling: Pooling, images: Tensor, stream: Sequence[Tensor] | None = None) -> DirectEffects:
    """Take features of images [B, 3, height, width] apart.

    With a class token the parts are those of all blocks; with attention or average pooling those of the pooling alone
    (its feed-forward part, not being linear, is one component).

    Args:
        stream: the images' :meth:`~capt.backbones.base.TokenTower.stream`, if it is known: saves the pass.

    Raises:
        CaptError: a projection or a norm that is not linear once it is frozen.
    """
    through = _through_blocks if pooling.kind == "class token" else _last_only
    start, layers, row = through(pooling, images, stream)
    into, constant, level = _frozen_tail(pooling, row)
    return DirectEffects(tuple(layers), start, into, constant, row, level)


def _through_blocks(
    pooling: Pooling, images: Tensor, stream: Sequence[Tensor] | None
) -> tuple[Tensor | None, list[RowLayer], Tensor]:
    rows, layers = [], []
    for block, (x, after) in zip(pooling.tower.blocks, pairwise(stream or pooling.tower.stream(images)), strict=True):
        parts = block.attention()
        y = parts.before(x)
        scores = torch.einsum("bhc,blhc->bhl", parts.queries(y[:, 0]), parts.keys(y)) * parts.scale
        layer = _row_layer(parts, scores.softmax(-1), parts.values(y), None)
        attended = layer.out(torch.einsum("bhl,blhc->bhc", layer.weights, layer.values).flatten(1)) + layer.bias
        layers.append(replace(layer, feed_forward=after[:, 0] - x[:, 0] - attended))
        rows += [x[:, 0], after[:, 0]]
    return rows[0], layers, rows[-1]


def _last_only(
    pooling: Pooling, images: Tensor, stream: Sequence[Tensor] | None
) -> tuple[Tensor | None, list[RowLayer], Tensor]:
    inputs = pooling.inputs(images) if stream is None else stream[pooling.depth]
    weights, values = pooling.weights(inputs), pooling.values(inputs)
    row = pooling.row(torch.einsum("bhl,blhc->bhc", weights, values), inputs)
    fed = row if pooling.feed_forward is None else pooling.feed_forward(row)
    added = None if pooling.feed_forward is None else fed - row
    return None, [_row_layer(pooling.attention, weights, values, added)], fed


def _row_layer(parts: AttentionParts | None, weights: Tensor, values: Tensor, feed_forward: Tensor | None) -> RowLayer:
    mixed = torch.einsum("bhl,blhc->bhc", weights, values)
    if parts is None:
        eye = torch.eye(values.shape[-1], dtype=values.dtype, device=values.device)
        out = FrozenMap(eye, values.new_ones(len(values)))
        return RowLayer(weights, values, out, torch.zeros_like(mixed[:, 0]), feed_forward)
    heads = mixed if parts.head_gain is None else mixed * parts.head_gain[:, None]
    side = heads.flatten(1)
    inner, inner_scale = _frozen_norm(parts.inner, side)
    merged = parts.out(parts.inner(side))
    after, after_scale = _frozen_norm(parts.after, merged)
    matrix = parts.out.weight if inner is None else parts.out.weight @ inner
    matrix = matrix if after is None else after @ matrix
    if parts.head_gain is not None:
        matrix = matrix * parts.head_gain.repeat_interleave(values.shape[-1])
    if parts.gain is not None:
        matrix = parts.gain[:, None] * matrix
    out = FrozenMap(matrix, inner_scale * after_scale)
    return RowLayer(weights, values, out, parts.merge(mixed) - out(mixed.flatten(1)), feed_forward)


def _frozen_tail(pooling: Pooling, row: Tensor) -> tuple[FrozenMap, Tensor, Tensor]:
    weight = pooling.affine(row).weight
    tail_norm = unchanged if pooling.norm is None else pooling.norm
    norm, scale = _frozen_norm(tail_norm, row)
    into = FrozenMap(weight if norm is None else weight @ norm, scale)
    level = torch.zeros_like(row[:, :1] * weight[:, 0])
    if norm is not None:
        # The centred columns sum to zero; the gain that they carry is on the diagonal.
        gain = norm.diagonal() * row.shape[-1] / (row.shape[-1] - 1)
        level = scale[:, None] * (weight @ gain)
    return into, pooling.projection(tail_norm(row)) - into(row), level


def _frozen_norm(norm: Any, x: Tensor) -> tuple[Tensor | None, Tensor]:
    """Matrix [D, D] (None: identity) and scale [B] of a norm at x [B, D]: scale * matrix @ x, but for an offset."""
    if isinstance(norm, nn.LayerNorm):
        centred = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device) - 1 / x.shape[-1]
        matrix = centred if norm.weight is None else norm.weight[:, None] * centred
        return matrix, (x.var(-1, correction=0) + norm.eps).rsqrt()
    found = norm(x)
    if found is x or torch.equal(found, x):
        return None, x.new_ones(len(x))
    raise CaptError(f"direct effects: a {type(norm).__name__} cannot be frozen here; layer norms can")


def mean_ablated(effects: DirectEffects, ablated: Tensor, means: Tensor) -> Tensor:
    """Features [B, E] with the direct effects of some heads replaced by their means over a data set.

    Args:
        ablated: bool [layers, H].
        means: [layers, H, E], mean of :meth:`DirectEffects.heads` over images.
    """
    return heads_replaced(effects.total(), effects.heads(), ablated, means)


def heads_replaced(features: Tensor, heads: Tensor, ablated: Tensor, means: Tensor) -> Tensor:
    """The same from features [..., E] and direct effects [..., layers, H, E] that were kept."""
    return features + ((means - heads) * ablated[..., None]).sum((-3, -2))


def first_order_shares(pooling: Pooling, images: Tensor) -> Tensor:
    """What each key does to the feature to first order, through everything behind the pooled row: [B, L, E].

    For attention pooling with a feed-forward part, which no exact sum gets through: the derivative of the tail at the
    actual row, applied to each key's contribution to it.

    Source: ours.
    """
    inputs = pooling.inputs(images)
    weights, values = pooling.weights(inputs), pooling.values(inputs)
    row = pooling.row(torch.einsum("bhl,blhc->bhc", weights, values), inputs)
    out = _row_layer(pooling.attention, weights, values, None).out
    parts = out((weights.movedim(1, 2)[..., None] * values).flatten(2))  # [B, L, D]

    def moved(part: Tensor) -> Tensor:
        derivative: Tensor = torch.func.jvp(pooling.tail, (row,), (part,))[1]
        return derivative

    return torch.stack([moved(part) for part in parts.unbind(1)], dim=1)


def object_share(scores: Tensor, objects: Tensor) -> Tensor:
    """Part of a concept's direct effect that comes from its object's patches, [B, C], in [-1, 1].

    The sum over the object's patches over the sum of magnitudes over all patches, layers and heads added up first.

    Args:
        scores: [B, layers, H, L, C] of :meth:`DirectEffects.concept_scores`.
        objects: bool [B, N] or [N].
    """
    patches = scores.sum((1, 2))[:, -objects.shape[-1] :]
    member = objects.to(patches)[..., None]
    return (patches * member).sum(1) / patches.abs().sum(1).clamp_min(1e-30)
