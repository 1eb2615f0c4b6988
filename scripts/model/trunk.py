"""The image trunk: EfficientNet-Lite2 with batch-norm statistics moved part of the way from photos to drawings."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .encoders import load_lite2

SHARE = 0.6  # weight of the statistics measured on drawings, chosen on emoji concepts outside the evaluation set


def normalise(batch: Sequence[np.ndarray]) -> torch.Tensor:
    """Pixels uint8 [B, H, W, 3] to the trunk's input, float32 [B, 3, H, W], channels last in memory."""
    pixels = torch.from_numpy(np.stack(batch)).permute(0, 3, 1, 2)
    return ((pixels.float() / 255 - 0.5) / 0.5).contiguous(memory_format=torch.channels_last)


def drawn_statistics(sample: Sequence[np.ndarray]) -> dict[str, torch.Tensor]:
    """Mean and variance at every batch norm over a sample of drawings, each layer seeing its predecessors' output."""
    model = load_lite2().to(memory_format=torch.channels_last)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain average over the batches
            module.reset_running_stats()
            module.train()
    with torch.inference_mode():
        for start in range(0, len(sample), 64):
            model.forward_features(normalise(sample[start : start + 64]))
    return {name: value.clone() for name, value in model.named_buffers() if value.is_floating_point()}


def load_trunk(statistics: dict[str, torch.Tensor], share: float = SHARE) -> torch.nn.Module:
    """EfficientNet-Lite2 in eval mode whose batch norms use (1 - share) photo and share drawing statistics."""
    model = load_lite2()
    for name, value in model.named_buffers():
        if name in statistics:
            value.lerp_(statistics[name], share)
    return model.to(memory_format=torch.channels_last)
