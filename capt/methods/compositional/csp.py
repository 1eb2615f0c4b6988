"""CSP: one learned embedding for each state and each object, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from capt.errors import CaptError
from capt.methods.compositional.model import CompositionalConfig, CompositionalModel, PairTexts
from capt.modules.composition_prompts import CompositionPrompts
from capt.training.loop import TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone


@dataclass(frozen=True)
class CSPConfig(CompositionalConfig):
    """Settings of :class:`CSP`; published: dropout 0.3, Adam, rate 5e-5, 20 epochs, batch 128.

    Attributes:
        prompt_dropout: of the primitives' embeddings.
    """

    prompt_dropout: float = 0.3
    training: TrainingOptions = field(
        default_factory=lambda: TrainingOptions(
            epochs=20, batch_size=64, optimizer="adam", lr=1e-3, weight_decay=1e-5, schedule="halving",
            warmup_epochs=0.0, clip_norm=0.0,
        )
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_weights[0] == 0:
            raise CaptError(
                f"score_weights: CSP scores pairs alone, so the first weight must be above 0, "
                f"found {list(self.score_weights)}"
            )


class CSP(CompositionalModel):
    """``a photo of [state] [object]`` with learned primitives and a frozen image tower.

    Source: CSP, arXiv 2204.03574; compositional soft prompting, written from its description.
    """

    kind = "csp"
    config_type = CSPConfig
    config: CSPConfig

    def __init__(
        self,
        backbone: Backbone,
        states: Sequence[str],
        objects: Sequence[str],
        train_pairs: Tensor,
        config: CSPConfig | None = None,
    ) -> None:
        super().__init__(backbone, states, objects, train_pairs, config)
        self.prompts = CompositionPrompts(
            backbone, states, objects, primitives=False, learn_context=False, dropout=self.config.prompt_dropout,
            chunk=self.config.text_chunk,
        )  # fmt: skip

    def texts(self, pairs: Tensor) -> PairTexts:
        """Prompts of pairs int64 [K, 2], with gradients to the primitives."""
        return PairTexts(self.prompts.pairs(self.backbone, pairs.to(self.train_pairs.device)))
