"""Prompt initialisation: category prompts out of the text embeddings of class names."""

from __future__ import annotations

import itertools

from torch import Tensor, nn
from torch.nn import functional as F

from capt.errors import CaptError


class PromptInitialiser(nn.Module):
    """``P = W_2 GELU(W_1 T + b_1) + b_2``: text embeddings [C, d_t] to category prompts [C, d].

    Nearness of class names carries over, so that rare classes start near frequent ones.

    Source: CPRFL, prompt initialisation network (hidden width d / 2, exact GELU, no dropout; linear for its ablation).
    """

    def __init__(
        self, text_dim: int, dim: int, *, hidden_ratio: float = 0.5, linear: bool = False, dropout: float = 0.0
    ) -> None:
        """``linear``: one linear map instead of two layers; ``dropout``: after each layer."""
        super().__init__()
        hidden = max(1, round(hidden_ratio * dim))
        widths = [text_dim, dim] if linear else [text_dim, hidden, dim]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))
        self.text_dim, self.dropout = text_dim, dropout

    def forward(self, text: Tensor) -> Tensor:
        """Un-normalised text embeddings float [C, d_t] to prompts [C, d].

        Raises:
            CaptError: they have another width.
        """
        if text.shape[-1] != self.text_dim:
            raise CaptError(
                f"prompt initialiser: text embeddings must have shape [C, {self.text_dim}], found {list(text.shape)}; "
                "take those of the text tower that it was made for"
            )
        for index, layer in enumerate(self.layers):
            text = F.dropout(layer(F.gelu(text) if index else text), self.dropout, self.training)
        return text
