"""A bias on the patch keys of whole blocks, without an attention mask for every image and head."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.backbones.backbone import Backbone
from capt.backbones.base import TokenBlock, WrappedBlock
from capt.errors import CaptError
from capt.modules.redistribution import Redistribution

Rows = Literal["pooling", "all"]
Via = Literal["mask", "channel"]


class KeyBias(NamedTuple):
    """bias: [H or 1, L], or [B, H or 1, L], added to the scores of the rows; ``rows``: token 0 alone, or all."""

    bias: Tensor
    rows: Rows


def biased_attention(
    query: Tensor, key: Tensor, value: Tensor, biases: list[KeyBias], scale: float, via: Via = "mask"
) -> Tensor:
    """Attention [B, H, L, dh] with biases on its keys.

    Args:
        query, key, value: [B, H, L, dh].
        via: ``"mask"``: an additive mask that is broadcast over images (and over heads and rows where they agree).
            ``"channel"``: one more channel a bias, ``[q, 1/scale] . [k, bias]``, for kernels that take no mask; finite
            biases only.

    Source: the extra channel is ours.
    """
    if via == "mask":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=_mask(biases, query), scale=scale)
    channels = [query], [key]
    for term in biases:
        bias = _four(term.bias.to(query))[:, :, 0, :, None]  # [B or 1, H or 1, L, 1]
        if not bool(torch.isfinite(bias).all()):
            raise CaptError("key bias: a channel carries finite biases only; use via='mask' for forbidden keys")
        asked = torch.full_like(query[..., :1], 1 / scale)
        if term.rows == "pooling":
            asked[:, :, 1:] = 0
        channels[0].append(asked)
        channels[1].append(bias.expand(*key.shape[:3], 1))
    width = query.shape[-1]
    pad = -(width + len(biases)) % 8
    wide_query, wide_key = (F.pad(torch.cat(parts, dim=-1), (0, pad)) for parts in channels)
    wide_value = F.pad(value, (0, wide_key.shape[-1] - width))
    return F.scaled_dot_product_attention(wide_query, wide_key, wide_value, scale=scale)[..., :width]


class BiasedBlock(WrappedBlock):
    """A block whose attention has biases on its keys.

    Attributes:
        biases: on the block's patches, [H or 1, N] or [B, H or 1, N] each; the other keys have none.
        via: see :func:`biased_attention`.
    """

    def __init__(self, block: TokenBlock, biases: list[KeyBias], via: Via = "mask") -> None:
        super().__init__(block)
        self.biases, self.via = biases, via

    def attend(self, x: Tensor) -> Tensor:
        """``x + MHSA(LN1 x)`` with the biases, [B, L, D]."""
        parts = self.block.attention()
        y = parts.before(x)
        query, key, value = (t.transpose(1, 2) for t in (parts.queries(y), parts.keys(y), parts.values(y)))
        padded = [KeyBias(F.pad(b, (x.shape[1] - b.shape[-1], 0)), rows) for b, rows in self.biases]
        mixed = biased_attention(query, key, value, padded, parts.scale, self.via)
        return x + parts.merge(mixed.transpose(1, 2))


@contextmanager
def key_bias(
    backbone: Backbone,
    bias: Tensor | Redistribution,
    *,
    layers: int | None = 1,
    rows: Rows = "pooling",
    via: Via = "mask",
) -> Iterator[None]:
    """Within it, patch keys of the last blocks of a backbone's image tower are biased; after it nothing is left of it.

    Nested ones add up. Weights and modules are not touched: the tower's list of blocks is exchanged.

    Args:
        bias: [H or 1, N], or [B, H or 1, N] for one batch; or a rule that is a bias (radial bias, prior cancellation).
            A region's boost is ``strength * mask`` as [B, 1, N].
        layers: how many of the last blocks; None: all.
        rows: whose attention: token 0's, or all tokens'.
        via: see :func:`biased_attention`.

    Raises:
        CaptError: a tower without blocks or with fewer, rows of a class token that there is not, a bias of another
            shape, or one that forbids all patches.
    """
    tower = backbone.tower
    bias = _as_bias(bias, tower.grid).to(backbone.device)
    depth = len(tower.blocks)
    count = depth if layers is None else layers
    if not 1 <= count <= depth:
        raise CaptError(f"key bias: layers={layers}, but this image tower has {depth} blocks")
    if rows == "pooling" and not tower.pools_first:
        raise CaptError("key bias: this tower's feature is not its first token's; use rows='all'")
    before = tower.blocks
    tower.blocks = [*before[: depth - count], *(_biased(b, KeyBias(bias, rows), via) for b in before[depth - count :])]
    try:
        yield
    finally:
        tower.blocks = before


def _as_bias(bias: Tensor | Redistribution, grid: tuple[int, int]) -> Tensor:
    if isinstance(bias, Redistribution):
        found = bias.bias(grid)
        if found is None:
            raise CaptError(f"key bias: {type(bias).__name__} is no fixed bias; use redistributed(...) instead")
        bias = found
    n = grid[0] * grid[1]
    if bias.ndim not in (2, 3) or bias.shape[-1] != n:
        raise CaptError(f"key bias: expected [heads or 1, {n}] or [B, heads or 1, {n}], found {list(bias.shape)}")
    if bool((bias == -torch.inf).all(-1).any()):
        raise CaptError("key bias: -inf for every patch leaves nothing to attend to; keep at least one")
    return bias


def _biased(block: TokenBlock, bias: KeyBias, via: Via) -> BiasedBlock:
    if isinstance(block, BiasedBlock):
        return BiasedBlock(block.block, [*block.biases, bias], via)
    return BiasedBlock(block, [bias], via)


def _four(bias: Tensor) -> Tensor:
    """[H or 1, L] or [B, H or 1, L] as [1 or B, H or 1, 1, L]."""
    return (bias if bias.ndim == 3 else bias[None])[:, :, None]


def _mask(biases: list[KeyBias], query: Tensor) -> Tensor:
    """Sum of biases, broadcast over whatever they do not depend on."""
    first = torch.arange(query.shape[2], device=query.device)[:, None] == 0
    zero = query.new_zeros(())
    terms = [
        _four(term.bias.to(query)) if term.rows == "all" else torch.where(first, _four(term.bias.to(query)), zero)
        for term in biases
    ]
    mask: Tensor = sum(terms[1:], start=terms[0])
    return mask
