"""A backbone whose center bias, and the stage at which it arises, are known by construction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from capt.backbones import Backbone
from capt.backbones.attention import Affine, AttentionParts
from capt.backbones.base import TextTower, TokenTower
from capt.backbones.pooling import Pooling
from capt.backbones.transforms import EvalTransform
from capt.evaluation.planted_bias import PlantedBias


class _Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.logit_scale = nn.Parameter(torch.zeros((), dtype=torch.float64))


class _NoTokens(TextTower):
    context_length, vocab_size, width, causal = 8, 8, 1, True

    def encode(self, tokens: Tensor) -> Tensor:
        raise AssertionError("texts are encoded by PlantedBackbone.text_features")

    embed = eot_index = encode
    encode_embedded = encode  # type: ignore[assignment]


class PlantedTower(TokenTower):
    """Tokens [B, N, n + 3]: objects, ground, "none of them", and rho^2 of the patch, which the query looks at.

    Args:
        plan: attention ``softmax(-beta * rho^2)``, tokens and texts.
        fade: before the pooling, an object's token turns into ground by the part ``1 - exp(-fade * rho^2)``; below 0
            towards the middle.
        noise: standard deviation of what is added to each number of a token.
    """

    def __init__(self, plan: PlantedBias, fade: float = 0.0, noise: float = 0.0, seed: int = 0) -> None:
        self.plan, self.fade, self.noise = plan, fade, noise
        self.image_hw, self.grid, self.n_prefix = plan.image_hw, (plan.patches, plan.patches), 0
        self.dim, self.width = plan.n + 2, plan.n + 3
        self.beta = -float((plan.attention.log() - plan.attention.log()[0])[-2] / (plan.rho2 - plan.rho2[0])[-2])
        self._generator = torch.Generator().manual_seed(seed)

    def _embed(self, images: Tensor) -> Tensor:
        tokens = self.plan.tokens(images)
        away = self.plan.rho2 if self.fade > 0 else self.plan.rho2.max() - self.plan.rho2
        left = torch.exp(-abs(self.fade) * away)[:, None]
        ground = torch.zeros(self.dim, dtype=torch.float64)
        ground[self.plan.n] = 1
        shows = tokens[..., : self.plan.n].sum(-1, keepdim=True) > 0
        tokens = torch.where(shows, left * tokens + (1 - left) * ground, tokens)
        if self.noise:
            tokens = tokens + self.noise * torch.randn(tokens.shape, generator=self._generator, dtype=torch.float64)
        return torch.cat([tokens, self.plan.rho2[:, None].expand(len(tokens), -1, 1)], -1)

    def project(self, tokens: Tensor) -> Tensor:
        pooling = self.pooling()
        return pooling.pool(pooling.weights(tokens), tokens)

    def pooling(self) -> Pooling:
        eye = torch.eye(self.width, dtype=torch.float64)
        values, query = eye.clone(), -self.beta * eye[-1:]
        values[-1] = 0
        parts = AttentionParts(1, None, Affine(eye, None), Affine(values, None), Affine(eye[:-1], None), 1.0)
        return Pooling("attention", self, 0, lambda x: x, parts, learned_query=query)


class PlantedBackbone(Backbone):
    """Reads texts as the plan does."""

    def __init__(self, tower: PlantedTower) -> None:
        half = (0.5, 0.5, 0.5)
        transform = EvalTransform(tower.image_hw, half, half, resize_mode="squash")
        super().__init__(_Model(), tower, _NoTokens(), name="planted", tokenizer=None, preprocess=transform)
        self.plan = tower.plan

    def text_features(self, texts: Any) -> Tensor:
        return self.plan.text_features([texts] if isinstance(texts, str) else list(texts))


def planted(n: int = 20, *, fade: float = 0.0, token_noise: float = 0.0, seed: int = 0, **plan: Any) -> PlantedBackbone:
    """A backbone with the biases of ``PlantedBias(n, **plan)`` in its pooling, and ``fade`` before it."""
    return PlantedBackbone(PlantedTower(PlantedBias(n, **{"patches": 5, **plan}), fade, token_noise, seed))
