"""How much memory a run will take: announced before it starts, so that nobody finds out after an hour."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from capt.methods.base.model import BaseConfig
from capt.methods.base.registry import BASES, base_type
from capt.methods.capt_config import CAPTConfig
from capt.methods.runs.options import RunOptions
from capt.methods.runs.protocol import Protocol
from capt.modules import DiffMannerAdapter, MultiGranularityDifferenceExpert
from capt.modules.prompts import text_memory

if TYPE_CHECKING:
    from capt.backbones import Backbone

FLOAT = 4
# Copies of a [batch, tokens, width] tensor that one adapted block or the pooling keeps for its gradient.
_KEPT_IN_A_BLOCK = 24
# Copies of the [C, d] class texts: cache, base model, CAPT, and what the pseudo-inverse of the evidence works with.
_TEXT_COPIES = 16
# Copies of the [batch, C] logits: loss parts, their masks and gradients.
_LOGIT_COPIES = 24
# Images that an evaluation holds at a time.
_EVALUATED = 64
_SLACK = 96 << 20  # the allocator, the decoder, the libraries that are loaded late


def announced_memory(
    protocol: Protocol, backbone: Backbone, options: RunOptions, variants: Mapping[str, CAPTConfig], n_images: int,
    base_config: BaseConfig | None = None,
) -> dict[str, int]:  # fmt: skip
    """Upper estimate in bytes, by what takes it, beside the process with its model loaded.

    Args:
        n_images: distinct training images of all seeds.
        base_config: settings of the base model; default: its own.
    """
    tower, n_classes = backbone.tower, len(protocol.classes)
    length = tower.n_prefix + tower.grid[0] * tower.grid[1]
    per_image = FLOAT * length * tower.width
    found = {"class texts": FLOAT * _TEXT_COPIES * n_classes * max(tower.dim, n_classes // 8)}
    most = max([len(target.images) for target in protocol.targets], default=0)
    found["evaluation"] = _EVALUATED * per_image * (2 + len(variants))
    found["predictions"] = 16 * len(options.seeds) * most * (4 + len(variants))
    kind = options.base
    if kind in BASES and kind != "zero-shot":
        config = base_config or base_type(kind).config_type()
        seen = n_images
        if not base_type(kind).uses_labels:  # all training images, whatever the shots
            seen = len(protocol.data.train if options.transductive else protocol.train)
        found["inputs of the base model"] = min(seen * (1 + config.views) * per_image, options.token_memory)
        found["training of the base model"] = (
            FLOAT
            * config.training.batch_size
            * (_KEPT_IN_A_BLOCK * max(len(tower.blocks), 1) * length * tower.width + _LOGIT_COPIES * n_classes)
        )
        found["prompted texts"] = text_memory(backbone, n_classes)
    if variants:
        views = max(config.views for config in variants.values())
        found["tokens"] = min(n_images * (1 + views) * per_image, options.token_memory)
        found["parameters"] = max(_parameters(backbone, config) for config in variants.values()) * FLOAT * 4
        found["models"] = sum(_parameters(backbone, c) for c in variants.values()) * FLOAT * len(options.seeds)
        found["training step"] = max(_step(backbone, config, n_classes) for config in variants.values())
        if "plain_adapter" in options.rivals:
            found["parameters"] *= 2
    return {**found, "slack": _SLACK}


def _parameters(backbone: Backbone, config: CAPTConfig) -> int:
    """Parameters of CAPT beside its base model; nothing is allocated for the count."""
    with torch.device("meta"):
        parts: list[nn.Module] = [
            DiffMannerAdapter.for_tower(backbone.tower, layers=config.adapter_layers, mlp=config.adapter_mlp),
            MultiGranularityDifferenceExpert(
                backbone.dim, width=config.width, n_heads=config.heads, n_experts=config.experts, top_k=config.top_k,
                hidden=config.hidden, shared_expert=config.shared_expert,
            ),
        ]  # fmt: skip
    return sum(parameter.numel() for part in parts for parameter in part.parameters())


def _step(backbone: Backbone, config: CAPTConfig, n_classes: int) -> int:
    tower, batch = backbone.tower, config.training.batch_size
    length = tower.n_prefix + tower.grid[0] * tower.grid[1]
    places = max(len(tower.blocks), 1)
    layers = config.adapter_layers if isinstance(config.adapter_layers, int) else places
    images = batch * (1 + config.k * config.m)
    tokens = FLOAT * images * length * tower.width * _KEPT_IN_A_BLOCK * layers
    return tokens + FLOAT * batch * n_classes * _LOGIT_COPIES
