"""Linear probe on frozen features, its rows started from the class texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from capt.errors import CaptError
from capt.methods.base.model import BaseConfig, BaseModel
from capt.training.loop import TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone


@dataclass(frozen=True)
class LinearProbeConfig(BaseConfig):
    """Settings of the linear probe.

    Attributes:
        initial: ``text`` starts as zero-shot CLIP, ``zero`` knows nothing of the class names.
        bias: one number a class; new classes have 0.
    """

    initial: Literal["text", "zero"] = "text"
    bias: bool = False
    training: TrainingOptions = field(default_factory=lambda: TrainingOptions(lr=1e-3, weight_decay=0.0))

    def __post_init__(self) -> None:
        if self.initial not in ("text", "zero"):
            raise CaptError(f"initial: expected 'text' or 'zero', found {self.initial!r}")


class LinearProbe(BaseModel):
    """``logits = scale * normalize(v) @ W.T + b``: one trained row a training class.

    The rows of W take the place of class texts wherever those are asked for, so other methods can build on it. They
    are not normalised again: their lengths are part of what was learned. New classes have their zero-shot texts.

    Attributes:
        weight: W, float32 [C, d].
        bias: b, float32 [C], or None.

    Source: linear classifier on CLIP features; scale and text start: ours.
    """

    kind = "linear-probe"
    class_bound = True
    config_type = LinearProbeConfig
    config: LinearProbeConfig

    def __init__(self, backbone: Backbone, class_names: Sequence[str], config: LinearProbeConfig | None = None) -> None:
        super().__init__(backbone, class_names, config)
        with torch.no_grad():
            text = backbone.class_text_features(self.class_names).float().clone()
        self.weight = nn.Parameter(text if self.config.initial == "text" else torch.zeros_like(text))
        self.bias = nn.Parameter(text.new_zeros(len(text))) if self.config.bias else None
        self._row = {name: row for row, name in enumerate(self.class_names)}

    def class_text_features(self, class_names: Sequence[str]) -> Tensor:
        """Rows of W for training classes, zero-shot texts (unit norm) for new ones: float [C, d]."""
        names = tuple(class_names)
        if names == self.class_names:
            return self.weight
        new = [name for name in names if name not in self._row]
        fresh = iter(range(len(self._row), len(self._row) + len(new)))
        rows = [self._row[name] if name in self._row else next(fresh) for name in names]
        table = torch.cat([self.weight, self.backbone.class_text_features(new)]) if new else self.weight
        return table[torch.tensor(rows, dtype=torch.int64, device=table.device)]

    def extra_logits(self, features: Tensor, class_names: Sequence[str]) -> Tensor | None:
        """The bias as [B, C], 0 for new classes; None without a bias or without a training class."""
        if self.bias is None or self._row.keys().isdisjoint(class_names):
            return None
        rows = torch.tensor([self._row.get(name, -1) for name in class_names], device=self.bias.device)
        return torch.where(rows < 0, 0.0, self.bias[rows]).expand(len(features), -1)
