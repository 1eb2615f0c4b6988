"""Settings of MSCI."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from capt.errors import CaptError
from capt.methods.compositional.model import CompositionalConfig
from capt.modules.stage_interaction import Fusion
from capt.training.loop import TrainingOptions

Stages = Literal["serial", "parallel", "low", "high", "none"]


@dataclass(frozen=True)
class MSCIConfig(CompositionalConfig):
    """Settings of :class:`capt.methods.msci.MSCI`.

    Attributes:
        n_low: layers of the low-level map; default: 3, at most half of the tower.
        n_high: layers of the high-level map; default: 3, at most half of the tower.
        stages: ``serial``: the high-level stage reads what the low-level stage gave; ``parallel``: both read the
            prompts; ``low`` and ``high``: one stage alone; ``none``: no interaction.
        fusion: ``static`` lambdas as released, or the ``dynamic`` gate that the paper describes.
        fusion_init: lambdas at the start.
        n_heads: of the stages; default: 64 numbers a head.
        stage_layers: cross-attention layers a stage.
        stage_mlp: hidden width of their feed-forward part over the joint width.
        stage_dropout: of the stages.
        adapter_width: of the bottleneck adapters in the image tower; 0: none.
        adapter_dropout: of these adapters.
        prompt_dropout: of the primitives' embeddings.
        aggregator_dropout: of the aggregated maps.
        disentangler_dropout: of the state and object vectors of an image.
        loss_weights: of the pair, state and object cross-entropies.
        pairs_per_step: training pairs that a step compares with: those of its images and others at random; 0: all.
    """

    n_low: int | None = None
    n_high: int | None = None
    stages: Stages = "serial"
    fusion: Fusion = "static"
    fusion_init: float = 0.1
    n_heads: int | None = None
    stage_layers: int = 1
    stage_mlp: float = 4.0
    stage_dropout: float = 0.1
    adapter_width: int = 64
    adapter_dropout: float = 0.1
    prompt_dropout: float = 0.3
    aggregator_dropout: float = 0.1
    disentangler_dropout: float = 0.5
    loss_weights: tuple[float, float, float] = (1.0, 1.0, 1.0)
    pairs_per_step: int = 0
    training: TrainingOptions = field(
        default_factory=lambda: TrainingOptions(
            epochs=20, batch_size=64, optimizer="adam", lr=1e-4, weight_decay=1e-5, schedule="halving",
            warmup_epochs=0.0, clip_norm=0.0, decay_all=True,
        )
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, allowed in (("stages", get_args(Stages)), ("fusion", get_args(Fusion))):
            if (found := getattr(self, name)) not in allowed:
                raise CaptError(f"{name}: expected one of {', '.join(allowed)}, found {found!r}")
        if self.fusion == "dynamic" and not all(self.uses):
            raise CaptError(f"fusion: 'dynamic' weighs two stages, but stages is {self.stages!r}; use 'static'")
        for name, least in (("stage_layers", 1), ("adapter_width", 0), ("n_heads", 1)):
            if (found := getattr(self, name)) is not None and found < least:
                raise CaptError(f"{name}: expected at least {least}, found {found}")
        if not 0 < self.stage_mlp < math.inf:
            raise CaptError(f"stage_mlp: expected a finite number above 0, found {self.stage_mlp}")
        if not math.isfinite(self.fusion_init):
            raise CaptError(f"fusion_init: expected a finite number, found {self.fusion_init}")
        for name in ("n_low", "n_high"):
            if (n := getattr(self, name)) is not None and n < 1:
                raise CaptError(f"{name}: expected at least 1, found {n}; leave a stage out with 'stages'")
        if self.pairs_per_step < 0:
            raise CaptError(f"pairs_per_step: expected 0 (all) or more, found {self.pairs_per_step}")
        weights = self.loss_weights
        if len(weights) != 3 or not any(weights) or not all(0 <= weight < math.inf for weight in weights):
            raise CaptError(
                f"loss_weights: expected three finite weights >= 0, not all of them 0, found {list(weights)}"
            )

    @property
    def uses(self) -> tuple[bool, bool]:
        """Whether there is a low-level and a high-level stage."""
        return self.stages not in ("high", "none"), self.stages not in ("low", "none")
