"""Image towers of open_clip: its own ViT and its ResNet with attention pooling."""

# The wrapped libraries are untyped, so everything called in them returns Any.
# mypy: no-warn-return-any

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capt.backbones._optional import import_optional
from capt.backbones.attention import Affine, AttentionParts, stacked, torch_attention, unchanged, unsupported
from capt.backbones.base import (
    BlockParts,
    FeedForward,
    TokenBlock,
    TokenGrid,
    TokenTower,
    activation_name,
    check_images,
    pair,
)
from capt.backbones.pooling import Pooling
from capt.errors import CaptError

CPU_BATCH = 8


class ResidualBlock(TokenBlock):
    """A ``ResidualAttentionBlock`` or ``CustomResidualAttentionBlock`` of open_clip."""

    def __init__(self, block: Any, batch_first: bool) -> None:
        self.block = block
        self.batch_first = batch_first
        self.custom = hasattr(block, "ln_attn")

    def attend(self, x: Tensor) -> Tensor:
        """``x + MHSA(LN1 x)``, [B, L, D]."""
        # Old models keep tokens as [L, B, D] inside the transformer.
        h = self.block.ln_1(x if self.batch_first else x.transpose(0, 1))
        h = self.block.ln_attn(self.block.attn(h)) if self.custom else self.block.attention(q_x=h)
        h = self.block.ls_1(h)
        return x + (h if self.batch_first else h.transpose(0, 1))

    def feed_forward(self, x: Tensor) -> Tensor:
        """``x + MLP(LN2 x)``, [B, L, D]."""
        return x + self.block.ls_2(self.block.mlp(self.block.ln_2(x)))

    def feed_forward_weights(self) -> FeedForward | None:
        """The MLP's two linear layers; None when it normalises in between."""
        mlp = self.block.mlp
        if not isinstance(getattr(mlp, "ln", None), nn.Identity | None):
            return None
        return FeedForward(
            mlp.c_fc.weight, mlp.c_fc.bias, mlp.c_proj.weight, mlp.c_proj.bias, activation_name(mlp.gelu)
        )

    def inner(self) -> BlockParts:
        """First norm and first linear layer."""
        return BlockParts(self.block.ln_1, self.block.mlp.c_fc, not self.batch_first)

    def attention(self) -> AttentionParts:
        """The attention taken apart."""
        block, attn = self.block, self.block.attn
        around: dict[str, Any] = {"before": block.ln_1, "gain": getattr(block.ls_1, "gamma", None)}
        if not self.custom:
            return torch_attention(attn, **around)
        if attn.scaled_cosine:
            raise unsupported("its blocks have scaled cosine attention")
        query, key, value = stacked(attn.in_proj_weight.chunk(3), attn.in_proj_bias)
        return AttentionParts(
            attn.num_heads, query, key, value, Affine.of(attn.out_proj), attn.scale, query_norm=attn.ln_q,
            key_norm=attn.ln_k, inner=attn.ln_inner, after=block.ln_attn,
            head_gain=None if attn.head_scale is None else attn.head_scale.flatten(), **around,
        )  # fmt: skip


class OpenClipViT(TokenTower):
    """open_clip's ``VisionTransformer``: class token, average or attentional pooling."""

    def __init__(self, visual: Any, dim: int) -> None:
        transformer = visual.transformer
        open_clip = import_optional("open_clip", "an open_clip model")
        known = (open_clip.transformer.ResidualAttentionBlock, open_clip.transformer.CustomResidualAttentionBlock)
        for block in transformer.resblocks:
            if not isinstance(block, known):
                raise CaptError(
                    f"model: transformer block {type(block).__name__} is not one that can be cut between attention "
                    f"and feed-forward; expected {' or '.join(k.__name__ for k in known)}."
                )
        self.visual = visual
        self.image_hw = pair(visual.image_size)
        self.grid = pair(visual.grid_size)
        self.n_prefix = 1
        self.pools_first = visual.attn_pool is None and visual.pool_type == "tok"
        self.width = transformer.width
        self.dim = dim
        self.blocks = [ResidualBlock(block, transformer.batch_first) for block in transformer.resblocks]
        self.activation = activation_name(transformer.resblocks[0].mlp.gelu)

    def _embed(self, images: Tensor) -> Tensor:
        return self.visual._embeds(images)

    def project(self, tokens: Tensor) -> Tensor:
        """Final norm, pooling and projection: [B, 1+H*W, D] to [B, d]."""
        pooled, _ = self.visual._pool(tokens)
        return self._projected(pooled)

    def _projected(self, row: Tensor) -> Tensor:
        return row if self.visual.proj is None else row @ self.visual.proj

    def pooling(self) -> Pooling:
        """Class token, average, or one query of an attentional pooler."""
        visual, norm = self.visual, self.visual.ln_post
        if visual.attn_pool is not None:
            return self._attention_pooling()
        if visual.pool_type == "tok":
            return self.class_token_pooling(norm, self._projected)
        if visual.pool_type != "avg":
            raise unsupported(f"its tokens are pooled by {visual.pool_type!r}")
        after, normed = (norm, unchanged) if visual.final_ln_after_pool else (None, norm)
        return Pooling(
            "average", self, len(self.blocks), lambda x: normed(self.patches(x)), norm=after, projection=self._projected
        )

    def _attention_pooling(self) -> Pooling:
        visual, pool = self.visual, self.visual.attn_pool
        if visual.attn_pool_contrastive is not None or visual.pool_type != "tok":
            raise unsupported("its feature is made of several queries of an attentional pooler")
        parts = torch_attention(pool.attn)
        return Pooling(
            "attention", self, len(self.blocks), pool.ln_k, parts,
            learned_query=parts.queries(pool.ln_q(pool.query[0])), norm=visual.ln_post, projection=self._projected,
        )  # fmt: skip


class FeatureMapTower(TokenTower):
    """A tower whose tokens are its final feature map, flattened row by row."""

    visual: Any
    channels_last = False

    @abstractmethod
    def _features(self, images: Tensor) -> Tensor:
        """Images to tokens [B, H*W, C]."""

    def _embed(self, images: Tensor) -> Tensor:
        # Early maps of large batches fall out of the CPU's caches; a few images at a time are much faster.
        if images.device.type == "cpu" and not images.requires_grad and len(images) > CPU_BATCH:
            return torch.cat([self._features(part) for part in images.split(CPU_BATCH)])
        return self._features(images)

    def run_stages(self, images: Tensor) -> tuple[Tensor, list[TokenGrid]]:
        """Tokens of :meth:`run` and the maps of :meth:`stages`, shallow to deep, in one pass where the trunk can."""
        return self.run(images), self.stages(images)

    def _tokens(self, feature_map: Tensor) -> Tensor:
        return feature_map.flatten(2).transpose(1, 2).contiguous()  # [B, C, H, W] -> [B, H*W, C]

    def _map(self, tokens: Tensor) -> Tensor:
        """[B, H*W, C] to [B, C, H, W] in the memory layout of the tower's convolutions.

        Pooling adds in memory order, so one fixed layout is what makes results equal bit for bit.
        """
        feature_map = tokens.transpose(1, 2).reshape(tokens.shape[0], tokens.shape[2], *self.grid)
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return feature_map.contiguous(memory_format=layout)


class OpenClipResNet(FeatureMapTower):
    """open_clip's ``ModifiedResNet``: tokens are the map that enters the attention pool."""

    def __init__(self, visual: Any) -> None:
        self.visual = visual
        self.image_hw = pair(visual.image_size)
        self.grid = (self.image_hw[0] // 32, self.image_hw[1] // 32)
        self.n_prefix = 0
        self.width = visual.attnpool.c_proj.in_features
        self.dim = visual.output_dim
        self.activation = "relu"

    def _maps(self, images: Tensor) -> list[tuple[str, Tensor]]:
        x, found = self.visual.stem(images), []
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = getattr(self.visual, name)(x)
            found.append((name, x))
        return found

    def _features(self, images: Tensor) -> Tensor:
        return self._tokens(self._maps(images)[-1][1])

    def project(self, tokens: Tensor) -> Tensor:
        """Attention pooling: [B, H*W, D] to [B, d]."""
        return self.visual.attnpool(self._map(tokens))

    def pooling(self) -> Pooling:
        """The attention pool, whose query is the mean token in front of the patches."""
        pool = self.visual.attnpool

        def prepare(tokens: Tensor) -> Tensor:
            return torch.cat([tokens.mean(1, keepdim=True), tokens], dim=1) + pool.positional_embedding.to(tokens.dtype)

        width = pool.q_proj.out_features // pool.num_heads
        query, key, value, out = (Affine.of(m) for m in (pool.q_proj, pool.k_proj, pool.v_proj, pool.c_proj))
        parts = AttentionParts(pool.num_heads, query, key, value, out, width**-0.5)
        return Pooling("attention", self, 0, prepare, parts)

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """Values of the attention pool, projected: what it gives if all weight lies on one token. [B, L, d]."""
        pool = self.visual.attnpool
        return pool.c_proj(pool.v_proj(tokens))

    def run_stages(self, images: Tensor) -> tuple[Tensor, list[TokenGrid]]:
        """Tokens of :meth:`run` and the maps of :meth:`stages` in one pass: the deepest map is the tokens."""
        maps = self.stages(images)
        return maps[-1].tokens, maps

    def stages(self, images: Tensor, depths: Sequence[int] | None = None) -> list[TokenGrid]:
        """Maps after ``layer1`` to ``layer4``; ``depths`` picks some of 1 to 4."""
        check_images(images, self.image_hw)
        maps = self._maps(images)
        wanted = range(1, 5) if depths is None else depths
        return [TokenGrid(name, self._tokens(x), (x.shape[2], x.shape[3])) for name, x in (maps[d - 1] for d in wanted)]
