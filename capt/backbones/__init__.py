"""Frozen image-text models behind one interface: see ``docs/backbones.md``."""

from __future__ import annotations

from capt.backbones._torchvision import import_torchvision
from capt.backbones.attention import AttentionParts
from capt.backbones.backbone import Backbone
from capt.backbones.base import (
    BlockHook,
    FeedForward,
    PromptEmbeddings,
    TextTower,
    TokenBlock,
    TokenGrid,
    TokenTower,
)
from capt.backbones.loading import load, wrap
from capt.backbones.pooling import Pooling, PoolingHeads
from capt.backbones.text_cache import TextCache
from capt.backbones.transforms import EvalTransform, TrainTransform, describe_transform

__all__ = [
    "AttentionParts",
    "Backbone",
    "BlockHook",
    "EvalTransform",
    "FeedForward",
    "Pooling",
    "PoolingHeads",
    "PromptEmbeddings",
    "TextCache",
    "TextTower",
    "TokenBlock",
    "TokenGrid",
    "TokenTower",
    "TrainTransform",
    "describe_transform",
    "import_torchvision",
    "load",
    "wrap",
]
