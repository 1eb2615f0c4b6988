"""Features of scenes and texts from whatever encodes images and texts, with what that cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.data.position_grid import PositionGrid, Scene
from capt.errors import CaptError, NumericError


class Encoder(Protocol):
    """What is measured: a :class:`capt.backbones.Backbone`, or anything with these two."""

    @property
    def image_features(self) -> Callable[[Tensor], Tensor]:
        """Images float [B, 3, height, width] to features [B, E] of any length."""

    @property
    def text_features(self) -> Callable[[Sequence[str]], Tensor]:
        """Texts to unit-norm features [N, E]."""


class Functions(NamedTuple):
    """Two functions as an :class:`Encoder`."""

    image_features: Callable[[Tensor], Tensor]
    text_features: Callable[[Sequence[str]], Tensor]


class SceneEncoder:
    """Encodes scenes and texts, and counts what that takes."""

    def __init__(self, model: Encoder, grid: PositionGrid, batch_size: int) -> None:
        if batch_size < 1:
            raise CaptError(f"batch_size: found {batch_size}, expected at least 1")
        self.model, self.grid, self.batch_size = model, grid, batch_size
        self.images = self.texts = 0
        self.drawing = 0.0

    def encode_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit-norm features float32 [N, E] on the CPU."""
        self.texts += len(texts)
        with torch.inference_mode():
            return F.normalize(self.model.text_features(list(texts)).float(), dim=-1).cpu()

    def encode(self, scenes: Sequence[Scene], grid: PositionGrid | None = None) -> Tensor:
        """Unit-norm features float32 [N, E] on the CPU."""
        grid = grid or self.grid
        found = []
        for start in range(0, len(scenes), self.batch_size):
            before = time.perf_counter()
            images = grid.tensor(scenes[start : start + self.batch_size])
            self.drawing += time.perf_counter() - before
            with torch.inference_mode():
                features = self.model.image_features(images).float()
            found.append(F.normalize(features, dim=-1).cpu())
        self.images += len(scenes)
        features = torch.cat(found)
        if not features.isfinite().all():
            raise NumericError("image_features: NaN or Inf came back for pictures of the grid; check the model")
        return features
