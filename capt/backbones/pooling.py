"""The last aggregation of an image tower: how its grid of tokens becomes one vector."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from capt.backbones.attention import Affine, AttentionParts, Map, unchanged
from capt.errors import CaptError

if TYPE_CHECKING:
    from capt.backbones.base import TokenTower

PoolingKind = Literal["class token", "attention", "average"]


def plain_pooling(tower: TokenTower) -> Pooling:
    """The pooling of a tower that is as the model made it.

    Raises:
        CaptError: its feature is made in another way already, or the pooling cannot be taken apart.
    """
    pooling = tower.pooling()
    if pooling.tower is not tower:
        raise CaptError("backbone: its pooling is changed already; start from the plain model")
    return pooling


def with_feature(tower: TokenTower, **methods: Any) -> TokenTower:
    """A tower over the same weights whose feature is made in another way; ``methods`` stand in front of its own.

    It stays one of its kind for everything else; its pooling and its tokens pooled alone are those of ``tower``.
    """
    other = copy.copy(tower)
    vars(other).update({"project_tokens": tower.project_tokens, "pooling": tower.pooling, **methods})
    return other


class PoolingHeads(NamedTuple):
    """What the pooling row sees: query [B, H, dh] or [H, dh] (learned), keys and values [B, L, H, dh]."""

    query: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class Pooling:
    """How tokens become the feature, in parts; refers to the weights as they are when it is made.

    The feature is ``tail(row(mix), inputs)``: one attention row mixes the values of the keys, head by head. Average
    pooling is the case without an attention: one head, values that are the tokens, the same weight for all.

    Attributes:
        kind: whose row it is: that of the class token in the last block, that of a query in a pooling layer of its
            own, or none.
        tower: whose pooling it is.
        depth: blocks passed before; ``tower.advance(tower.embed(images), stop=depth)`` is what enters.
        prepare: tokens that enter [B, L', D] to what keys and values are made of [B, L, D]. The patches are the last
            H*W of the L keys; what is before them (class token, registers, ResNet's mean) is the prefix.
        attention: None for average pooling.
        learned_query: [H, dh], where the query is the same for all images; else token 0 of the keys asks.
        residual: token 0 is added to the row.
        feed_forward: of the row, residual included.
        norm: of the row, behind the feed-forward part.
        projection: into the joint space.
    """

    kind: PoolingKind
    tower: TokenTower
    depth: int
    prepare: Map
    attention: AttentionParts | None = None
    learned_query: Tensor | None = None
    residual: bool = False
    feed_forward: Map | None = None
    norm: Any = None
    projection: Map = unchanged

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W) of the patches."""
        return self.tower.grid

    @property
    def n_patches(self) -> int:
        """H * W."""
        return self.grid[0] * self.grid[1]

    @property
    def n_heads(self) -> int:
        """Heads of the pooling row; 1 for average pooling."""
        return 1 if self.attention is None else self.attention.n_heads

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return 1.0 if self.attention is None else self.attention.scale

    def inputs(self, images: Tensor) -> Tensor:
        """Images float [B, 3, height, width] to the tokens that enter, [B, L', D]: all that a re-weighting needs."""
        return self.tower.advance(self.tower.embed(images), stop=self.depth)

    def heads(self, inputs: Tensor) -> PoolingHeads:
        """Query, keys and values of inputs [B, L', D].

        Raises:
            CaptError: average pooling, which has none.
        """
        if self.attention is None:
            raise CaptError("pooling: average pooling has no query; weigh its tokens instead")
        y = self.prepare(inputs)
        query = self.attention.queries(y[:, 0]) if self.learned_query is None else self.learned_query
        return PoolingHeads(query, self.attention.keys(y), self.attention.values(y))

    def values(self, inputs: Tensor) -> Tensor:
        """Values of all keys, [B, L, H, dh]; for average pooling the tokens, [B, L, 1, D]."""
        y = self.prepare(inputs)
        return y[:, :, None] if self.attention is None else self.attention.values(y)

    def scores(self, inputs: Tensor) -> Tensor:
        """Scaled scores of the pooling row before the softmax, [B, H, L]; zeros for average pooling."""
        if self.attention is None:
            y = self.prepare(inputs)
            return y.new_zeros(len(y), 1, y.shape[1])
        query, keys, _ = self.heads(inputs)
        return torch.einsum("bhc,blhc->bhl", query.expand(len(keys), -1, -1), keys) * self.scale

    def weights(self, inputs: Tensor) -> Tensor:
        """Attention weights of the pooling row, [B, H, L]."""
        return self.scores(inputs).softmax(-1)

    def merge(self, mixed: Tensor) -> Tensor:
        """Mixed values [..., H, dh] to what the row gets from the tokens, [..., D]."""
        return mixed.squeeze(-2) if self.attention is None else self.attention.merge(mixed)

    def row(self, mixed: Tensor, inputs: Tensor) -> Tensor:
        """Mixed values [..., B, H, dh] and inputs [B, L', D] to the pooled row [..., B, D]."""
        merged = self.merge(mixed.to(inputs.dtype))
        return inputs[:, 0] + merged if self.residual else merged

    def tail(self, row: Tensor) -> Tensor:
        """Pooled rows [..., D] to un-normalised features [..., d]."""
        return self.head(row if self.feed_forward is None else self.feed_forward(row.flatten(0, -2)).reshape(row.shape))

    def head(self, row: Tensor) -> Tensor:
        """Final norm and projection of rows [..., D], [..., d]."""
        flat = row.flatten(0, -2)
        features: Tensor = self.projection(flat if self.norm is None else self.norm(flat))
        return features.reshape(*row.shape[:-1], -1)

    def features(self, mixed: Tensor, inputs: Tensor) -> Tensor:
        """Mixed values [..., B, H, dh] and inputs [B, L', D] to un-normalised features [..., B, d]."""
        return self.tail(self.row(mixed, inputs))

    def pool(self, weights: Tensor, inputs: Tensor) -> Tensor:
        """Features [..., B, d] under any weights [..., B, H, L] of the pooling row (B may be 1: for all images)."""
        values = self.values(inputs)
        return self.features(torch.einsum("...bhl,blhc->...bhc", weights.to(values.dtype), values), inputs)

    def affine(self, row: Tensor) -> Affine:
        """The projection as one affine map, weight [d, D] and bias [d]; ``row`` [..., D] says width and type.

        Raises:
            CaptError: it is not one.
        """
        basis = torch.eye(row.shape[-1], dtype=row.dtype, device=row.device)
        bias = self.projection(torch.zeros_like(basis[:1]))[0]
        weight = (self.projection(basis) - bias).T
        probe = torch.linspace(-1, 1, row.shape[-1], dtype=row.dtype, device=row.device)
        expected, found = self.projection(probe[None])[0], weight @ probe + bias
        close = max(1e-3, 8 * torch.finfo(row.dtype).eps)
        if not torch.allclose(expected, found, rtol=close, atol=close * float(expected.abs().max())):
            raise CaptError("pooling: the projection of this tower is not linear, so no sum of parts is its feature")
        return Affine(weight, bias)
