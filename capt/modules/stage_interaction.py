"""Stage-by-stage interaction: text prompts attend to the token map of an image, and what comes out is fused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.errors import CaptError
from capt.ops import prompt_attention_shared

Fusion = Literal["static", "dynamic"]


class Keys(NamedTuple):
    """Keys and values [B, L, d] of one layer, which all prompts of an image share."""

    keys: Tensor
    values: Tensor


class CrossAttentionLayer(nn.Module):
    """``y = q + W_o attention(q, G); y + W_2 QuickGELU(W_1 LN(y))``: a query that is not normalised first."""

    def __init__(self, dim: int, n_heads: int, mlp_ratio: float = 4.0, dropout: float = 0.1) -> None:
        super().__init__()
        if dim % n_heads:
            raise CaptError(f"cross-attention: n_heads must divide the width, found {n_heads} heads for width {dim}")
        hidden = max(1, round(mlp_ratio * dim))
        self.n_heads, self.dropout = n_heads, dropout
        self.query, self.key, self.value = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        self.out = nn.Linear(dim, dim)
        self.norm = nn.LayerNorm(dim)
        self.w_in, self.w_out = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def keys(self, tokens: Tensor) -> Keys:
        """Keys and values of normalised tokens [B, L, d]."""
        return Keys(self.key(tokens), self.value(tokens))

    def forward(self, query: Tensor, keys: Keys) -> Tensor:
        """Prompts [R, d], the same for every image, or [B, R, d] -> [B, R, d]."""
        asked = self.query(query)
        # The op takes two streams of prompts; these are one.
        attended, *_ = prompt_attention_shared(
            asked, asked.narrow(-2, 0, 0), keys.keys, keys.values, n_heads=self.n_heads
        )
        y = query + self._drop(self.out(attended))
        # QuickGELU(h) = silu(1.702 h) / 1.702. Both factors go into the weights: the hidden layer is by far the largest
        # tensor here, and every pass over it counts.
        hidden = F.silu(F.linear(self.norm(y), 1.702 * self.w_in.weight, 1.702 * self.w_in.bias))
        return y + self._drop(F.linear(self._drop(hidden), self.w_out.weight / 1.702, self.w_out.bias))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class StageInteraction(nn.Module):
    """One stage: aggregation of layer maps, and cross-attention layers from prompts to the normalised result.

    Source: MSCI, local (low-level map) and global (high-level map) feature interaction; one layer a stage as published.
    """

    def __init__(
        self, dim: int, *, aggregator: nn.Module | None = None, n_heads: int = 8, n_layers: int = 1,
        mlp_ratio: float = 4.0, dropout: float = 0.1,
    ) -> None:  # fmt: skip
        """Create the stage.

        Args:
            aggregator: makes one map [B, L, d] of what :meth:`keys` is given; None takes it as it is.
            mlp_ratio: hidden width of the feed-forward part over ``dim``.
        """
        super().__init__()
        self.aggregator = aggregator or nn.Identity()
        self.norm = nn.LayerNorm(dim)
        self.layers = nn.ModuleList(CrossAttentionLayer(dim, n_heads, mlp_ratio, dropout) for _ in range(n_layers))

    def keys(self, maps: Tensor) -> list[Keys]:
        """Keys and values of every layer for the maps [B, L, W] of each image: once for any number of prompts."""
        normed = self.norm(self.aggregator(maps))
        return [self._layer(index).keys(normed) for index in range(len(self.layers))]

    def _layer(self, index: int) -> CrossAttentionLayer:
        layer = self.layers[index]
        assert isinstance(layer, CrossAttentionLayer)
        return layer

    def forward(self, query: Tensor, keys: Sequence[Keys]) -> Tensor:
        """Prompts [R, d] or [B, R, d] and :meth:`keys` -> [B, R, d]."""
        for layer, own in zip(self.layers, keys, strict=True):
            query = layer(query, own)
        return query


class StageFusion(nn.Module):
    """``u = t + lambda_1 * q_1 + lambda_2 * q_2`` of a prompt t and what the stages made of it.

    ``static``: lambda_1 and lambda_2 are learned vectors, the same for every prompt and image. ``dynamic``: with
    g = sigmoid(W [q_1; q_2] + b), one gate per prompt, image and element, lambda_1 and lambda_2 are multiplied by
    2 g and 2 (1 - g); W and b start at zero, where both forms agree. Leaving out a stage leaves out its term.

    Source: MSCI; static as its code computes, dynamic after the paper's words (weights that adapt to each combination),
    with a gate of ours.
    """

    def __init__(
        self, dim: int, *, fusion: Fusion = "static", init: float = 0.1, low: bool = True, high: bool = True
    ) -> None:
        """``low``, ``high``: the stages that there are; ``init``: of the lambdas.

        Raises:
            CaptError: a dynamic gate without two stages to weigh.
        """
        super().__init__()
        if fusion == "dynamic" and not (low and high):
            raise CaptError("fusion: 'dynamic' weighs two stages against each other; use 'static' without one of them")
        self.low, self.high = (nn.Parameter(torch.full((dim,), init)) if used else None for used in (low, high))
        self.gate: nn.Linear | None = None
        if fusion == "dynamic":
            self.gate = nn.Linear(2 * dim, dim)
            nn.init.zeros_(self.gate.weight), nn.init.zeros_(self.gate.bias)

    def forward(self, text: Tensor, low: Tensor | None, high: Tensor | None) -> Tensor:
        """Prompts [R, d] and stage outputs [B, R, d] or None -> [B, R, d]."""
        shares: tuple[Tensor | float, Tensor | float] = 1.0, 1.0
        if self.gate is not None and low is not None and high is not None:
            share = 2 * torch.sigmoid(self.gate(torch.cat([low, high], dim=-1)))
            shares = share, 2 - share
        fused = text
        for weight, portion, stage in zip((self.low, self.high), shares, (low, high), strict=True):
            if weight is not None and stage is not None:
                fused = fused + portion * weight * stage
        return fused
