"""Multi-head attention of a wrapped model taken apart: the linear maps around its softmax."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from capt.errors import CaptError

Map = Callable[[Tensor], Tensor]


def unchanged(x: Tensor) -> Tensor:
    """The map that does nothing."""
    return x


class Affine(NamedTuple):
    """``x @ weight.T + bias``."""

    weight: Tensor  # [out, in]
    bias: Tensor | None

    def __call__(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(x, self.weight, self.bias)

    @classmethod
    def of(cls, layer: Any) -> Affine:
        """A linear layer's."""
        return cls(layer.weight, layer.bias)


@dataclass(frozen=True)
class AttentionParts:
    """One attention layer, referring to the weights as they are when it is made.

    ``merge(softmax(queries(y) . keys(y) * scale) @ values(y))`` is the layer, of tokens y behind the norm in front.

    Attributes:
        n_heads: H.
        query, key, value: D to H * dh; no ``query`` where it is learned as it is.
        out: H * dh to D.
        scale: factor of the scores.
        before: norm in front of the layer.
        query_norm, key_norm: act on each head, [..., dh].
        head_gain: [H], factor of each head's mixed values.
        inner: norm of the heads side by side, in front of ``out``.
        after: norm behind ``out``.
        gain: layer scale [D].
    """

    n_heads: int
    query: Affine | None
    key: Affine
    value: Affine
    out: Affine
    scale: float
    before: Map = unchanged
    query_norm: Map = unchanged
    key_norm: Map = unchanged
    head_gain: Tensor | None = None
    inner: Map = unchanged
    after: Map = unchanged
    gain: Tensor | None = None

    def _heads(self, x: Tensor) -> Tensor:
        split: Tensor = x.unflatten(-1, (self.n_heads, -1))
        return split

    def queries(self, y: Tensor) -> Tensor:
        """[..., D] to [..., H, dh]."""
        return self.query_norm(self._heads(y if self.query is None else self.query(y)))

    def keys(self, y: Tensor) -> Tensor:
        """[..., D] to [..., H, dh]."""
        return self.key_norm(self._heads(self.key(y)))

    def values(self, y: Tensor) -> Tensor:
        """[..., D] to [..., H, dh]."""
        return self._heads(self.value(y))

    def merge(self, mixed: Tensor) -> Tensor:
        """Mixed values [..., H, dh] to what is added to the stream, [..., D]."""
        if self.head_gain is not None:
            mixed = mixed * self.head_gain[:, None]
        merged = self.after(self.out(self.inner(mixed.flatten(-2))))
        return merged if self.gain is None else merged * self.gain

    def head_maps(self) -> Tensor:
        """Output map of each head, [H, D, dh]: gains included, norms behind the heads left out."""
        maps = self.out.weight if self.gain is None else self.gain[:, None] * self.out.weight
        maps = maps.reshape(len(maps), self.n_heads, -1).movedim(1, 0)
        return maps if self.head_gain is None else self.head_gain[:, None, None] * maps

    def attend(self, y: Tensor, mask: Tensor | None = None) -> Tensor:
        """The layer on tokens y [B, L, D]; ``mask`` is added to the scores, broadcast to [B, H, L, L]."""
        query, key, value = (x.transpose(1, 2) for x in (self.queries(y), self.keys(y), self.values(y)))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.scale)
        return self.merge(mixed.transpose(1, 2))


def torch_attention(layer: Any, **parts: Any) -> AttentionParts:
    """An ``nn.MultiheadAttention``; ``parts``: further ones of :class:`AttentionParts`."""
    weights: tuple[Tensor, ...]
    if layer.in_proj_weight is None:
        weights = (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    else:
        weights = layer.in_proj_weight.chunk(3)
    query, key, value = stacked(weights, layer.in_proj_bias)
    out = Affine.of(layer.out_proj)
    return AttentionParts(layer.num_heads, query, key, value, out, layer.head_dim**-0.5, **parts)


def separate_attention(layer: Any, **parts: Any) -> AttentionParts:
    """An attention of transformers, with a linear layer each for queries, keys and values."""
    query, key, value, out = (Affine.of(m) for m in (layer.q_proj, layer.k_proj, layer.v_proj, layer.out_proj))
    return AttentionParts(layer.num_heads, query, key, value, out, layer.scale, **parts)


def stacked(weights: tuple[Tensor, ...], bias: Tensor | None) -> list[Affine]:
    """Affine maps of several weights and their biases in one vector."""
    biases = [None] * len(weights) if bias is None else bias.split([len(weight) for weight in weights])
    return [Affine(weight, b) for weight, b in zip(weights, biases, strict=True)]


def unsupported(what: str) -> CaptError:
    """The error for an attention or pooling whose parts are not known here."""
    return CaptError(
        f"model: {what}, which cannot be taken apart here; class-token, attention and average pooling with plain "
        "softmax attention can"
    )
