"""Tiny random towers of every pooling kind, in double precision, for identities that hold to rounding."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

import capt
from capt.backbones import Backbone
from tests.backbone_models import TOWERS, clip, timm_convnext, timm_model, timm_vit


def at_128(model: Any) -> Any:
    """For larger pictures, so that the final map has a middle."""
    model.visual.image_size = (128, 128)
    return model


EXTRA = {
    "open_clip ResNet, 4 x 4": lambda: clip({"layers": (1, 1, 1, 1), "width": 8, "head_width": 16, "image_size": 128}),
    "timm ResNet, 4 x 4": lambda: timm_model(image_size=128),
    "timm EfficientNet-Lite, 4 x 4": lambda: timm_model(name="tf_efficientnet_lite0", timm_pool="", image_size=128),
    "timm ConvNeXt, 4 x 4": lambda: at_128(timm_convnext()),
    "open_clip ViT, average, norm before pooling": lambda: clip({"pool_type": "avg"}),
    "timm ViT, norm before averaging": lambda: timm_vit(global_pool="avg", fc_norm=False),
    "timm ViT, norms of queries, keys and heads": lambda: timm_vit(qk_norm=True, scale_attn_norm=True),
    "timm ViT, registers, class token": lambda: timm_vit(reg_tokens=2),
}
CLASS_TOKEN = (
    "open_clip ViT, class token", "open_clip ViT, layer scale, QuickGELU", "open_clip ViT, custom blocks",
    "timm ViT, class token", "timm ViT, post-norm blocks", "timm ViT, norms of queries, keys and heads",
    "timm ViT, registers, class token", "transformers CLIP",
)  # fmt: skip
ATTENTION = (
    "open_clip ViT, attention pooling", "open_clip CoCa", "open_clip ResNet, 4 x 4", "timm ViT, SigLIP map pooling",
    "transformers SigLIP",
)  # fmt: skip
AVERAGE = (
    "open_clip ViT, average, norm after pooling", "open_clip ViT, average, norm before pooling", "timm ResNet, 4 x 4",
    "timm EfficientNet-Lite, 4 x 4", "timm ConvNeXt, 4 x 4", "timm ViT, registers, average",
    "timm ViT, norm before averaging", "timm Swin", "timm EVA",
)  # fmt: skip
KINDS = dict.fromkeys(CLASS_TOKEN, "class token") | dict.fromkeys(ATTENTION, "attention")
KINDS |= dict.fromkeys(AVERAGE, "average")
#: One of each kind, and the one with keys before the patches that are no class token.
SOME = (
    "open_clip ViT, class token", "timm ViT, registers, class token", "timm ViT, SigLIP map pooling",
    "open_clip ResNet, 4 x 4", "timm ResNet, 4 x 4",
)  # fmt: skip


@functools.cache
def wrapped(name: str, dtype: torch.dtype = torch.float64) -> Backbone:
    """The tower in a backbone; shared, so leave it as it is."""
    torch.manual_seed(0)
    return capt.wrap((TOWERS | EXTRA)[name]().to(dtype))


def pictures(backbone: Backbone, n: int = 3) -> Tensor:
    """Random images [n, 3, height, width]."""
    images = torch.randn(n, 3, *backbone.image_hw, generator=torch.Generator().manual_seed(1))
    return images.to(backbone.dtype)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over largest value."""
    return float((found - expected).abs().max() / expected.abs().max())
