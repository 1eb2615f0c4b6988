"""A backbone whose feature is made of its final patch tokens in another way: for everything that takes one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Literal, get_args

from torch import Tensor

from capt.backbones.backbone import Backbone
from capt.backbones.base import TokenTower
from capt.backbones.pooling import plain_pooling, with_feature
from capt.errors import CaptError
from capt.modules.pooling_replacements import blended, generalised_mean

PatchMean = Literal["mean token", "mean of tokens", "generalised mean"]


@dataclass(frozen=True)
class PatchPooling:
    """What takes the place of the last aggregation.

    Attributes:
        kind: "mean token": the mean of the final patch tokens, pooled as one token; "mean of tokens": every patch
            token pooled alone, their mean; "generalised mean": the same with exponent 3.
        part: of it in the feature, the rest is the model's own, both at unit norm; 1: it alone.

    Source: ours, but for the generalised mean (arXiv 1711.02512).
    """

    kind: PatchMean = "mean token"
    part: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(PatchMean):
            raise CaptError(f"kind: found {self.kind!r}, expected one of {', '.join(get_args(PatchMean))}")
        if not 0 < self.part <= 1:
            raise CaptError(f"part: found {self.part}, expected a part of 1 above 0")

    def features(self, tower: TokenTower, tokens: Tensor) -> Tensor:
        """Tokens after all blocks of ``tower`` [B, n_prefix+H*W, D] to features [B, d]."""
        patches = tower.patches(tokens)
        if self.kind == "mean token":
            found = tower.project_tokens(patches.mean(1, keepdim=True))[:, 0]
        else:
            alone = tower.project_tokens(patches)
            found = alone.mean(1) if self.kind == "mean of tokens" else generalised_mean(alone)
        return found if self.part == 1 else blended(tower.project(tokens), found, self.part)

    def record(self) -> dict[str, Any]:
        """JSON-able."""
        return {"rule": type(self).__name__, **asdict(self)}


def repooled(backbone: Backbone, pooling: PatchPooling) -> Backbone:
    """The same model, its feature made by ``pooling``; weights and text features are shared."""
    plain = plain_pooling(backbone.tower).tower
    tower = with_feature(plain, project=partial(pooling.features, plain), pools_first=False)
    return backbone.with_tower(tower, {"pooling": pooling.record()})
