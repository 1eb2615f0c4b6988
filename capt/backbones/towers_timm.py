"""Image towers of open_clip that are timm models: ViT with blocks, and everything else by its final map."""

# The wrapped libraries are untyped, so everything called in them returns Any.
# mypy: no-warn-return-any

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from capt.backbones._optional import import_optional
from capt.backbones.attention import Affine, AttentionParts, Map, stacked, unsupported
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
from capt.backbones.towers_open_clip import CPU_BATCH, FeatureMapTower


class TimmBlock(TokenBlock):
    """timm's pre-norm ``Block`` or post-norm ``ResPostBlock``."""

    def __init__(self, block: Any, post_norm: bool) -> None:
        self.block = block
        self.post_norm = post_norm

    def attend(self, x: Tensor) -> Tensor:
        """``x + MHSA(LN1 x)``, [B, L, D]."""
        b = self.block
        return x + b.drop_path1(b.norm1(b.attn(x)) if self.post_norm else b.ls1(b.attn(b.norm1(x))))

    def feed_forward(self, x: Tensor) -> Tensor:
        """``x + MLP(LN2 x)``, [B, L, D]."""
        b = self.block
        return x + b.drop_path2(b.norm2(b.mlp(x)) if self.post_norm else b.ls2(b.mlp(b.norm2(x))))

    def feed_forward_weights(self) -> FeedForward | None:
        """The MLP's two linear layers; None for gated or normalised MLPs."""
        mlp = self.block.mlp
        if type(mlp).__name__ != "Mlp" or not isinstance(mlp.norm, nn.Identity):
            return None
        return FeedForward(mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias, activation_name(mlp.act))

    def inner(self) -> BlockParts:
        """First norm (of pre-norm blocks) and first linear layer (of plain MLPs)."""
        plain = type(self.block.mlp).__name__ == "Mlp"
        return BlockParts(None if self.post_norm else self.block.norm1, self.block.mlp.fc1 if plain else None)

    def attention(self) -> AttentionParts:
        """The attention taken apart."""
        block, attn = self.block, self.block.attn
        if type(attn).__name__ != "Attention" or getattr(attn, "gate", None) is not None:
            raise unsupported(f"its blocks have a gated or unusual attention ({type(attn).__name__})")
        around: dict[str, Any] = {"after": block.norm1} if self.post_norm else {"before": block.norm1}
        query, key, value = stacked(attn.qkv.weight.chunk(3), attn.qkv.bias)
        return AttentionParts(
            attn.num_heads, query, key, value, Affine.of(attn.proj), attn.scale, query_norm=attn.q_norm,
            key_norm=attn.k_norm, inner=getattr(attn, "norm", nn.Identity()),
            gain=None if self.post_norm else getattr(block.ls1, "gamma", None), **around,
        )  # fmt: skip


class TimmViT(TokenTower):
    """A timm ``VisionTransformer`` trunk, including SigLIP's map pooling."""

    def __init__(self, visual: Any, dim: int) -> None:
        trunk = visual.trunk
        self.visual = visual
        self.image_hw = pair(trunk.patch_embed.img_size or visual.image_size)
        self.grid = pair(trunk.patch_embed.grid_size)
        self.n_prefix = trunk.num_prefix_tokens
        self.pools_first = trunk.attn_pool is None and trunk.global_pool == "token"
        self.width = trunk.embed_dim
        self.dim = dim
        self.blocks = [TimmBlock(b, type(b).__name__ == "ResPostBlock") for b in trunk.blocks]
        self.activation = activation_name(getattr(trunk.blocks[0].mlp, "act", nn.Identity()))

    @staticmethod
    def fits(trunk: nn.Module) -> bool:
        """Whether the trunk is a plain ViT, block after block."""
        vit = import_optional("timm", "a timm image tower").models.vision_transformer
        return (
            isinstance(trunk, vit.VisionTransformer)
            and type(trunk).forward_features is vit.VisionTransformer.forward_features
            and all(type(block) in (vit.Block, vit.ResPostBlock) for block in trunk.blocks)
        )

    def _embed(self, images: Tensor) -> Tensor:
        trunk = self.visual.trunk
        return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(images))))

    def project(self, tokens: Tensor) -> Tensor:
        """Final norm, pooling and projection: [B, n_prefix+H*W, D] to [B, d]."""
        trunk = self.visual.trunk
        return self.visual.head(trunk.forward_head(trunk.norm(tokens)))

    def _projected(self, row: Tensor) -> Tensor:
        return self.visual.head(self.visual.trunk.head(row))

    def pooling(self) -> Pooling:
        """Class token, average, or SigLIP's map pooling."""
        trunk = self.visual.trunk
        if self.pools_first:
            norms = [norm for norm in (trunk.norm, trunk.fc_norm) if not isinstance(norm, nn.Identity)]
            return self.class_token_pooling(norms[0] if len(norms) == 1 else nn.Sequential(*norms), self._projected)
        start = 0 if trunk.pool_include_prefix else self.n_prefix

        def normed(tokens: Tensor) -> Tensor:
            return trunk.norm(tokens)[:, start:]

        if trunk.attn_pool is not None:
            return self._map_pooling(normed)
        if trunk.global_pool != "avg":
            raise unsupported(f"its tokens are pooled by {trunk.global_pool!r}")
        return Pooling("average", self, len(self.blocks), normed, norm=trunk.fc_norm, projection=self._projected)

    def _map_pooling(self, normed: Map) -> Pooling:
        trunk, pool = self.visual.trunk, self.visual.trunk.attn_pool
        if type(pool).__name__ != "AttentionPoolLatent" or (pool.latent_len > 1 and pool.pool != "token"):
            raise unsupported(f"its tokens are pooled by {type(pool).__name__} with several queries")
        query = Affine.of(pool.q) if isinstance(pool.q, nn.Linear) else None
        key, value = stacked(pool.kv.weight.chunk(2), pool.kv.bias)
        parts = AttentionParts(
            pool.num_heads, query, key, value, Affine.of(pool.proj), pool.scale, query_norm=pool.q_norm,
            key_norm=pool.k_norm,
        )  # fmt: skip

        def prepare(tokens: Tensor) -> Tensor:
            y = normed(tokens)
            return y if pool.pos_embed is None else y + pool.pos_embed.to(y.dtype)

        def feed_forward(row: Tensor) -> Tensor:
            return row + pool.mlp(pool.norm(row))

        return Pooling(
            "attention", self, len(self.blocks), prepare, parts, learned_query=parts.queries(pool.latent[0, 0]),
            feed_forward=feed_forward, norm=trunk.fc_norm, projection=self._projected,
        )  # fmt: skip


class TimmFeatures(FeatureMapTower):
    """Any other timm trunk: tokens are what its ``forward_features`` returns.

    The result may be a map [B, C, H, W], a map [B, H, W, C] or tokens [B, L, D]; which one is found by
    running one blank image when the tower is built.
    """

    def __init__(self, visual: Any, dim: int) -> None:
        trunk = visual.trunk
        self.visual = visual
        self.image_hw = pair(visual.image_size)
        self.dim = dim
        self._averages: bool | None = None
        with torch.no_grad():
            features = trunk.forward_features(next(trunk.parameters()).new_zeros(1, 3, *self.image_hw))
        self.channels_last = not features.is_contiguous()
        self.n_prefix = 0
        if features.ndim == 4:
            self.layout = getattr(trunk, "output_fmt", "NCHW")
            channels_first = self.layout != "NHWC"
            self.grid = pair(features.shape[2:] if channels_first else features.shape[1:3])
            self.width = features.shape[1 if channels_first else 3]
        else:
            self.layout = "NLC"
            self.n_prefix = getattr(trunk, "num_prefix_tokens", 0)
            count, self.width = features.shape[1] - self.n_prefix, features.shape[2]
            side = int(count**0.5)
            self.grid = (side, side) if side * side == count else (1, count)
        activations = [m for m in trunk.modules() if "activation" in type(m).__module__]
        self.activation = activation_name(activations[0]) if activations else ""

    def _features(self, images: Tensor) -> Tensor:
        features = self.visual.trunk.forward_features(images)
        if self.layout == "NLC":
            return features
        return features.flatten(1, 2) if self.layout == "NHWC" else self._tokens(features)

    def project(self, tokens: Tensor) -> Tensor:
        """Global pooling and projection: [B, n_prefix+H*W, D] to [B, d]."""
        features = tokens
        if self.layout == "NHWC":
            features = tokens.unflatten(1, self.grid)
        elif self.layout == "NCHW":
            features = self._map(tokens)
        return self.visual.head(self.visual.trunk.forward_head(features))

    def pooling(self) -> Pooling:
        """Average pooling, found by asking whether tokens are pooled like their mean.

        Raises:
            CaptError: they are not.
        """
        if self._averages is None:
            weight = next(self.visual.trunk.parameters())
            shape, seed = (1, self.n_prefix + self.grid[0] * self.grid[1], self.width), torch.Generator().manual_seed(0)
            tokens = torch.randn(shape, generator=seed).to(weight)
            with torch.no_grad():
                found, expected = self.project(tokens), self._pooled_alone(self.patches(tokens).mean(1))
            self._averages = bool((found - expected).norm() <= 0.01 * expected.norm())
        if not self._averages:
            raise unsupported("its tokens are not pooled by averaging")
        return Pooling("average", self, 0, self.patches, projection=self._pooled_alone)

    def _pooled_alone(self, row: Tensor) -> Tensor:
        return self.project_tokens(row[:, None])[:, 0]

    def project_tokens(self, tokens: Tensor) -> Tensor:
        """Every token pooled as a map of its own: [B, L, C] to [B, L, d]."""
        if self.layout == "NLC":
            return super().project_tokens(tokens)
        alone = tokens.flatten(0, 1)
        alone = alone[:, None, None] if self.layout == "NHWC" else alone[:, :, None, None]
        return self.visual.head(self.visual.trunk.forward_head(alone)).unflatten(0, tokens.shape[:2])

    def run_stages(self, images: Tensor) -> tuple[Tensor, list[TokenGrid]]:
        """Tokens of :meth:`run` and the maps of :meth:`stages`; one pass for trunks that work on [B, C, H, W]."""
        check_images(images, self.image_hw)
        trunk = self.visual.trunk
        if self.layout != "NCHW" or not hasattr(trunk, "forward_intermediates"):
            return super().run_stages(images)
        if images.device.type == "cpu" and len(images) > CPU_BATCH:
            parts = [self.run_stages(part) for part in images.split(CPU_BATCH)]
            joined = [
                TokenGrid(level[0].name, torch.cat([one.tokens for one in level]), level[0].grid)
                for level in zip(*(maps for _, maps in parts), strict=True)
            ]
            return torch.cat([tokens for tokens, _ in parts]), joined
        final, maps = trunk.forward_intermediates(images, output_fmt="NCHW")
        found = [TokenGrid(f"stage{i + 1}", self._tokens(x), pair(x.shape[2:])) for i, x in enumerate(maps)]
        return self._tokens(final), found

    def stages(self, images: Tensor, depths: Sequence[int] | None = None) -> list[TokenGrid]:
        """Maps of the trunk's stages, shallow to deep; ``depths`` counts stages from 1."""
        check_images(images, self.image_hw)
        trunk = self.visual.trunk
        if not hasattr(trunk, "forward_intermediates"):
            return [TokenGrid("final", self.patches(self.embed(images)), self.grid)]
        maps = trunk.forward_intermediates(images, intermediates_only=True, output_fmt="NCHW")
        wanted = range(1, len(maps) + 1) if depths is None else depths
        return [TokenGrid(f"stage{d}", self._tokens(maps[d - 1]), pair(maps[d - 1].shape[2:])) for d in wanted]
