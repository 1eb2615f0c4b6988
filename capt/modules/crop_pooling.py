"""A backbone whose feature is that of the whole picture and of overlapping crops: small objects are seen larger."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.backbones.backbone import Backbone
from capt.backbones.base import BlockHook, TokenTower
from capt.backbones.pooling import plain_pooling, with_feature
from capt.errors import CaptError
from capt.modules.pooling_replacements import blended, overlapping_crops


@dataclass(frozen=True)
class CropPooling:
    """What is added to the feature of the whole picture.

    Attributes:
        count: 1 crop, the middle, 5, the corners and the middle, or 9, three by three; ``count + 1`` passes through
            the tower.
        size: side of a crop over side of the picture.
        part: of the crops' mean in the feature, the rest is the whole picture's; all at unit norm.

    Source: ours.
    """

    count: Literal[1, 5, 9] = 5
    size: float = 0.6
    part: float = 0.5

    def __post_init__(self) -> None:
        if self.count not in (1, 5, 9) or not 0 < self.size <= 1 or not 0 < self.part <= 1:
            raise CaptError(
                f"crops: expected 1, 5 or 9 of a size in (0, 1] and a part in (0, 1], found {self.count}, {self.size}, "
                f"{self.part}"
            )

    def crops(self, images: Tensor) -> Tensor:
        """Crops [B, count, 3, height, width] of transformed images, each as large as they."""
        return overlapping_crops(images, self.count, self.size)

    def features(self, whole: Tensor, crops: Tensor) -> Tensor:
        """Features [B, d] of the whole and [B, count, d] of its crops to unit-norm features [B, d]."""
        return blended(whole, F.normalize(crops, dim=-1).mean(1), self.part)

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {"rule": type(self).__name__, **asdict(self)}


def cropped(backbone: Backbone, pooling: CropPooling) -> Backbone:
    """The same model, its feature made by ``pooling``; weights and text features are shared.

    ``tower.run`` gives the tokens of the whole picture, then those of each crop, to ``tower.project``; patches are the
    whole picture's. Whoever makes tokens of their own out of ``tower.embed`` gets the plain model's feature.
    """
    plain = plain_pooling(backbone.tower).tower
    run, project = partial(_run, plain, pooling), partial(_project, plain, pooling)
    tower = with_feature(plain, run=run, project=project, pools_first=False)
    return backbone.with_tower(tower, {"pooling": pooling.record()})


def _run(plain: TokenTower, pooling: CropPooling, images: Tensor, block_hook: BlockHook | None = None) -> Tensor:
    pictures = torch.cat([images[:, None], pooling.crops(images)], dim=1)
    tokens = plain.run(pictures.flatten(0, 1), block_hook)
    return tokens.reshape(len(images), -1, tokens.shape[2])


def _project(plain: TokenTower, pooling: CropPooling, tokens: Tensor) -> Tensor:
    n = pooling.count + 1
    if tokens.shape[1] <= plain.n_prefix + plain.grid[0] * plain.grid[1]:  # of one picture
        return plain.project(tokens)
    features = plain.project(tokens.reshape(len(tokens) * n, -1, tokens.shape[2])).view(len(tokens), n, -1)
    return pooling.features(features[:, 0], features[:, 1:])
