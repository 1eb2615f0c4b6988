"""Image and text towers of transformers: ``CLIPModel`` and ``SiglipModel``."""

# The wrapped libraries are untyped, so everything called in them returns Any.
# mypy: no-warn-return-any

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from capt.backbones.attention import AttentionParts, separate_attention, torch_attention
from capt.backbones.base import (
    BlockParts,
    FeedForward,
    TextTower,
    TokenBlock,
    TokenTower,
    activation_name,
    embedding_replaced,
    last_position,
    pair,
)
from capt.backbones.pooling import Pooling
from capt.errors import CaptError


def features_of(output: Any) -> Tensor:
    """The feature tensor out of ``get_image_features`` or ``get_text_features``.

    Since transformers 5 these return an output object whose ``pooler_output`` is the projected feature;
    before, they returned the tensor itself.
    """
    return output if isinstance(output, Tensor) else output.pooler_output


class EncoderLayer(TokenBlock):
    """A ``CLIPEncoderLayer`` or ``SiglipEncoderLayer``."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def attend(self, x: Tensor) -> Tensor:
        """``x + MHSA(LN1 x)``, [B, L, D]."""
        return x + self.layer.self_attn(hidden_states=self.layer.layer_norm1(x), attention_mask=None)[0]

    def feed_forward(self, x: Tensor) -> Tensor:
        """``x + MLP(LN2 x)``, [B, L, D]."""
        return x + self.layer.mlp(self.layer.layer_norm2(x))

    def feed_forward_weights(self) -> FeedForward:
        """The MLP's two linear layers."""
        mlp = self.layer.mlp
        name = activation_name(mlp.activation_fn)
        return FeedForward(mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, name)

    def inner(self) -> BlockParts:
        """First norm and first linear layer."""
        return BlockParts(self.layer.layer_norm1, self.layer.mlp.fc1)

    def attention(self) -> AttentionParts:
        """The attention taken apart."""
        return separate_attention(self.layer.self_attn, before=self.layer.layer_norm1)


class TransformersViT(TokenTower):
    """The vision tower of a ``CLIPModel`` (class token) or ``SiglipModel`` (attention-pooling head)."""

    def __init__(self, model: Any) -> None:
        config = model.config.vision_config
        self.model = model
        self.vision = model.vision_model
        self.siglip = not hasattr(model, "visual_projection")
        if self.siglip and getattr(self.vision, "head", None) is None:
            raise CaptError("model: this SigLIP vision tower has no pooling head, so it has no image feature.")
        self.image_hw = pair(config.image_size)
        patch = pair(config.patch_size)
        self.grid = (self.image_hw[0] // patch[0], self.image_hw[1] // patch[1])
        self.n_prefix = 0 if self.siglip else 1
        self.pools_first = not self.siglip
        self.width = config.hidden_size
        self.dim = self.width if self.siglip else model.visual_projection.out_features
        self.blocks = [EncoderLayer(layer) for layer in self.vision.encoder.layers]
        self.activation = activation_name(self.vision.encoder.layers[0].mlp.activation_fn)

    def _embed(self, images: Tensor) -> Tensor:
        tokens = self.vision.embeddings(images)
        return tokens if self.siglip else self.vision.pre_layrnorm(tokens)

    def project(self, tokens: Tensor) -> Tensor:
        """Final norm, pooling and projection: [B, n_prefix+H*W, D] to [B, d]."""
        if self.siglip:
            return self.vision.head(self.vision.post_layernorm(tokens))
        return self.model.visual_projection(self.vision.post_layernorm(tokens[:, 0, :]))

    def pooling(self) -> Pooling:
        """CLIP's class token or the attention-pooling head of SigLIP."""
        if not self.siglip:
            return self.class_token_pooling(self.vision.post_layernorm, self.model.visual_projection)
        head = self.vision.head
        parts = torch_attention(head.attention)

        def feed_forward(row: Tensor) -> Tensor:
            return row + head.mlp(head.layernorm(row))

        return Pooling(
            "attention", self, len(self.blocks), self.vision.post_layernorm, parts,
            learned_query=parts.queries(head.probe[0, 0]), feed_forward=feed_forward,
        )  # fmt: skip


class TransformersText(TextTower):
    """The text tower of a ``CLIPModel`` (causal, end token) or ``SiglipModel`` (last position)."""

    def __init__(self, model: Any) -> None:
        config = model.config.text_config
        self.model = model
        self.text = model.text_model
        self.causal = hasattr(model, "text_projection")  # SigLIP has no projection and attends both ways
        self.table = self.text.embeddings.token_embedding
        self.context_length = config.max_position_embeddings
        self.vocab_size = self.table.num_embeddings
        self.width = config.hidden_size
        self.blocks = list(self.text.encoder.layers)
        self.activation = activation_name(self.text.encoder.layers[0].mlp.activation_fn)
        # Configurations written before 2023 say 2 and mean "the highest id in the text".
        self.eos = int(config.eos_token_id) if self.causal and config.eos_token_id not in (None, 2) else None
        self.pad = config.pad_token_id

    def encode(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [N, L] to un-normalised features [N, d]."""
        return features_of(self.model.get_text_features(input_ids=tokens))

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids int64 [N, L] to embeddings [N, L, W], without positions."""
        return self.table(tokens)

    def eot_index(self, tokens: Tensor) -> Tensor:
        """Position of the end token, int64 [N]; for SigLIP the last token that is not padding."""
        if not self.causal:
            return last_position(tokens != self.pad)
        if self.eos is None:
            return tokens.argmax(dim=-1)
        return (tokens == self.eos).int().argmax(dim=-1)

    def encode_embedded(self, embeddings: Tensor, eot_index: Tensor) -> Tensor:
        """Token embeddings [N, L, W] and end positions int64 [N] to un-normalised features [N, d].

        The model is given ids that put the end token where ``eot_index`` says, as it accepts ids only.
        """
        self.check_length(embeddings.shape[1])
        end = self.vocab_size - 1 if self.eos is None else self.eos
        filler = 0 if end else 1
        tokens = torch.full(embeddings.shape[:2], filler, dtype=torch.long, device=embeddings.device)
        tokens[torch.arange(len(tokens), device=tokens.device), eot_index.to(tokens.device)] = end
        with embedding_replaced(self.table, embeddings):
            return self.encode(tokens)
