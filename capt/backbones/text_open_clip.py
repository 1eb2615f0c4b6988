"""Text towers of open_clip: built in, ``TextTransformer`` and transformers-based."""

# The wrapped libraries are untyped, so everything called in them returns Any.
# mypy: no-warn-return-any

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from capt.backbones.base import TextTower, activation_name, embedding_replaced, last_position
from capt.errors import CaptError


class OpenClipText(TextTower):
    """The text side of ``open_clip.CLIP``, ``CustomTextCLIP`` and ``CoCa``."""

    def __init__(self, model: Any) -> None:
        # `CLIP` keeps the text tower's parts as its own attributes, the others keep a module.
        self.model = model
        self.source = model if hasattr(model, "token_embedding") else model.text
        source = self.source
        self.pool = getattr(source, "text_pool_type", None) or source.pool_type
        self.eos = getattr(source, "text_eos_id", None) or getattr(source, "eos_id", None)
        self.pad = getattr(source, "pad_id", 0)
        self.cls_emb = getattr(source, "cls_emb", None)
        self.pad_mask = getattr(source, "use_pad_mask", False) or self.cls_emb is not None
        self.context_length = int(source.context_length)
        self.vocab_size = source.token_embedding.num_embeddings
        self.width = source.token_embedding.embedding_dim
        self.causal = source.attn_mask is not None and not self.pad_mask and self.pool in ("argmax", "eos", "first")
        self.blocks = list(source.transformer.resblocks)
        self.batch_first = source.transformer.batch_first
        self.activation = activation_name(source.transformer.resblocks[0].mlp.gelu)

    def encode(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [N, context_length] to un-normalised features [N, d]."""
        return self.model.encode_text(tokens, normalize=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [N, L] to embeddings [N, L, W], without positions."""
        return self.source.token_embedding(tokens)

    def eot_index(self, tokens: Tensor) -> Tensor:
        """Position of the end token, int64 [N]."""
        if self.pool == "argmax" or (self.cls_emb is not None and self.pool != "eos"):
            return tokens.argmax(dim=-1)
        if self.pool == "eos":
            return tokens.eq(self.eos or 0).int().argmax(dim=-1)
        return last_position(tokens != self.pad)

    def _mask(self, length: int, eot_index: Tensor, dtype: torch.dtype) -> Tensor | None:
        causal = self.source.attn_mask
        causal = None if causal is None else causal[:length, :length]
        if not self.pad_mask:
            return causal
        # The padding mask is built from ids: any id but padding up to the end token.
        n_tokens = length - (self.cls_emb is not None)
        real = torch.arange(n_tokens, device=eot_index.device) <= eot_index[:, None]
        padding = self.source._build_additive_mask(torch.where(real, self.pad + 1, self.pad), length, dtype)
        return padding if causal is None else causal.unsqueeze(0) + padding

    def encode_embedded(self, embeddings: Tensor, eot_index: Tensor) -> Tensor:
        """Token embeddings [N, L, W] and end positions int64 [N] to un-normalised features [N, d]."""
        self.check_length(embeddings.shape[1])
        source = self.source
        x = embeddings.to(source.transformer.get_cast_dtype())
        eot_index = eot_index.to(x.device)
        if self.cls_emb is not None:
            x = torch.cat([x, self.cls_emb.expand(x.shape[0], 1, -1)], dim=1)
        x = x + source.positional_embedding[: x.shape[1]].to(x.dtype)
        x = source.transformer(x, attn_mask=self._mask(x.shape[1], eot_index, x.dtype))
        # With CoCa's appended class token that one is the feature, and the norm comes after pooling.
        pooled = self._pooled(source.ln_final(x), eot_index) if self.cls_emb is None else source.ln_final(x[:, -1])
        projection = source.text_projection
        if projection is None:
            return pooled
        return projection(pooled) if isinstance(projection, nn.Linear) else pooled @ projection

    def _pooled(self, x: Tensor, eot_index: Tensor) -> Tensor:
        if self.pool in ("argmax", "eos"):
            return x[torch.arange(x.shape[0], device=x.device), eot_index]
        if self.pool in ("first", "last"):
            return x[:, 0 if self.pool == "first" else -1]
        raise CaptError(f"model: text pooling '{self.pool}' gives no single feature per text.")


class OpenClipTransformersText(TextTower):
    """open_clip's ``HFTextEncoder``: a transformers language model as the text side."""

    causal = False
    fixed_length = False

    def __init__(self, model: Any) -> None:
        self.model = model
        self.text = model.text
        self.table = self.text.transformer.get_input_embeddings()
        # RoBERTa's first positions are taken by the padding id, so the table is longer than any text.
        positions = getattr(self.text.transformer.embeddings, "position_embeddings", None)
        skipped = getattr(positions, "padding_idx", None)
        self.context_length = int(self.text.context_length) - (0 if skipped is None else skipped + 1)
        self.vocab_size = self.table.num_embeddings
        self.width = self.table.embedding_dim
        self.pad = self.text.config.pad_token_id
        self.activation = str(getattr(self.text.config, "hidden_act", ""))

    def encode(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [N, L] to un-normalised features [N, d]."""
        return self.model.encode_text(tokens, normalize=False)

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [N, L] to embeddings [N, L, W], without positions."""
        return self.table(tokens)

    def eot_index(self, tokens: Tensor) -> Tensor:
        """Position of the last token that is not padding, int64 [N]."""
        return last_position(tokens != self.pad)

    def encode_embedded(self, embeddings: Tensor, eot_index: Tensor) -> Tensor:
        """Token embeddings [N, L, W] and end positions int64 [N] to un-normalised features [N, d]."""
        self.check_length(embeddings.shape[1])
        positions = torch.arange(embeddings.shape[1], device=embeddings.device)
        real = positions <= eot_index.to(embeddings.device)[:, None]
        with embedding_replaced(self.table, embeddings):
            return self.encode(torch.where(real, self.pad + 1, self.pad))
