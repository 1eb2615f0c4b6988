"""Visual-semantic interaction: category prompts and the patches of an image in one encoder, prompts read out."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.errors import CaptError
from capt.modules.split_attention import split_attention


class InteractionLayer(nn.Module):
    """One pre-norm encoder layer: attention of ``n_heads`` heads, each ``head_dim`` wide, and a feed-forward part.

    Without ``residual`` neither part has a skip connection, as in the published code.
    """

    def __init__(
        self, dim: int, *, n_heads: int = 8, head_dim: int | None = None, hidden: int | None = None,
        residual: bool = False, dropout: float = 0.1,
    ) -> None:  # fmt: skip
        """``head_dim``: default ``2 * dim / n_heads``, ``hidden``: default ``dim``, the published ratios."""
        super().__init__()
        head_dim = head_dim or max(1, 2 * dim // n_heads)
        if n_heads < 1:
            raise CaptError(f"visual-semantic interaction: n_heads must be at least 1, found {n_heads}")
        inner = n_heads * head_dim
        self.n_heads, self.residual, self.dropout = n_heads, residual, dropout
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.query, self.key, self.value = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.out = nn.Linear(inner, dim)
        self.w_in, self.w_out = nn.Linear(dim, hidden or dim), nn.Linear(hidden or dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """All tokens [B, N, d] attend to all: the layer by its definition, against which the others are tested."""
        normed = self.norm_in(tokens)
        parts = (self.query, self.key, self.value)
        query, key, value = (part(normed).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return self.feed_forward(self.mixed(tokens, attended))

    def prompts_only(self, patches: Tensor, prompts: Tensor) -> Tensor:
        """The prompts' rows alone, of patches [B, W, d] and prompts [C, d] (the same for every image) or [B, C, d].

        Exact: only the prompts' queries are formed. With prompts [C, d] all of the prompts' side is computed once for
        the batch, so that work of order C^2 does not grow with it.
        """
        return self.mixed(prompts, self.attended(patches, prompts))

    def attended(self, patches: Tensor, prompts: Tensor) -> Tensor:
        """What the prompts attend to among patches and prompts, [B, C, inner], before the output projection."""
        seen, own = self.norm_in(patches), self.norm_in(prompts)
        query, own_keys, own_values = (part(own) for part in (self.query, self.key, self.value))
        keys, values = self.key(seen), self.value(seen)
        if query.dim() == 2:
            return split_attention(query, own_keys, own_values, keys, values, n_heads=self.n_heads)
        keys, values = torch.cat([own_keys, keys], 1), torch.cat([own_values, values], 1)
        by_head = (x.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for x in (query, keys, values))
        return F.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2)

    def mixed(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """Output projection of the attention, [B, n, d]."""
        out = F.dropout(self.out(attended), self.dropout, self.training)
        return tokens + out if self.residual else out

    def feed_forward(self, x: Tensor) -> Tensor:
        """The feed-forward part, [B, n, d]."""
        hidden = F.dropout(F.gelu(self.w_in(self.norm_out(x))), self.dropout, self.training)
        out = F.dropout(self.w_out(hidden), self.dropout, self.training)
        return x + out if self.residual else out

    @property
    def drops(self) -> bool:
        """Whether dropout acts: in training, unless it is 0."""
        return self.training and self.dropout > 0

    def folded_scores(self, x: Tensor, prompts: Tensor) -> Tensor:
        """``<feed_forward(x)_c, p_c>`` [B, C] of x [B, C, d] without forming the layer's output; no dropout acts.

        ``<W_out g + b, p> = <g, W_out^T p> + <b, p>``, and W_out^T p_c is the same for every image.

        Raises:
            CaptError: the layer is in training mode with dropout, which stands between.
        """
        if self.drops:
            raise CaptError("visual-semantic interaction: folded scores need evaluation mode; call .eval() first")
        hidden = F.gelu(self.w_in(self.norm_out(x)))
        scores = torch.einsum("bch,ch->bc", hidden, prompts @ self.w_out.weight) + prompts @ self.w_out.bias
        return scores + torch.einsum("bcd,cd->bc", x, prompts) if self.residual else scores


class VisualSemanticInteraction(nn.Module):
    """Patches [B, W, d] and category prompts [C, d] to category-specific features [B, C, d].

    ``depth`` layers over the patches followed by the prompts; no positions, no mask: permuting patches changes
    nothing, permuting classes permutes the result. Only the last layer's prompt rows are ever formed, and the prompts'
    side of the first layer once a batch.

    Source: CPRFL, visual-semantic interaction network (one layer, 8 heads, without skip connections as released, with
    them as an option); split softmax: ours.
    """

    def __init__(
        self, dim: int, *, depth: int = 1, n_heads: int = 8, head_dim: int | None = None, hidden: int | None = None,
        residual: bool = False, dropout: float = 0.1,
    ) -> None:  # fmt: skip
        """See :class:`InteractionLayer`."""
        super().__init__()
        if depth < 1:
            raise CaptError(f"visual-semantic interaction: depth must be at least 1, found {depth}")
        self.layers = nn.ModuleList(
            InteractionLayer(dim, n_heads=n_heads, head_dim=head_dim, hidden=hidden, residual=residual, dropout=dropout)
            for _ in range(depth)
        )

    def forward(self, patches: Tensor, prompts: Tensor) -> Tensor:
        """Category-specific features [B, C, d]."""
        last, patches, rows = self._before_last(patches, prompts)
        features: Tensor = last.feed_forward(last.prompts_only(patches, rows))
        return features

    def full(self, patches: Tensor, prompts: Tensor) -> Tensor:
        """The same by the definition: every token through every layer, the prompts' rows read out at the end."""
        tokens = torch.cat([patches, prompts.expand(len(patches), -1, -1)], dim=1)
        for layer in self.layers:
            tokens = layer(tokens)
        return tokens[:, patches.shape[1] :]

    def scores(self, patches: Tensor, prompts: Tensor) -> Tensor:
        """``<p'_c, p_c>`` [B, C]; without forming the features p' where no dropout acts on them."""
        last, patches, rows = self._before_last(patches, prompts)
        x = last.prompts_only(patches, rows)
        if last.drops:
            return torch.einsum("bcd,cd->bc", last.feed_forward(x), prompts)
        return last.folded_scores(x, prompts)

    def _before_last(self, patches: Tensor, prompts: Tensor) -> tuple[InteractionLayer, Tensor, Tensor]:
        """The last layer, and the patches and prompts that enter it."""
        *earlier, last = (layer for layer in self.layers if isinstance(layer, InteractionLayer))
        rows = prompts
        if earlier:
            n = patches.shape[1]
            tokens = torch.cat([patches, prompts.expand(len(patches), -1, -1)], dim=1)
            for layer in earlier:
                tokens = layer(tokens)
            patches, rows = tokens[:, :n], tokens[:, n:]
        return last, patches, rows
