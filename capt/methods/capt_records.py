"""What goes into a CAPT forward pass beside images, and what comes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from capt.bank import ConfusionBank, ConfusionStatistics
from capt.modules import PairPrompts, SampleConfusion, SemanticConfusion
from capt.modules.mgde import ExpertOutput


@dataclass(frozen=True)
class ClassSet:
    """Candidate classes: names, their text features [C, d], and what is known of them.

    ``known``: every candidate is a class of the bank; only then evidence counts and the correction is at full strength,
    because both would favour known classes over new ones. ``pair_prompts``: prompts of pairs of these very classes;
    ``prompt_texts`` [C, d]: class texts that stand in where a pair has none, default the text features.
    ``semantic_evidence``: the written differences of leading classes count at prediction.
    """

    names: tuple[str, ...]
    text_features: Tensor
    statistics: ConfusionStatistics | None = None
    bank: ConfusionBank | None = None
    evidence: tuple[Tensor, Tensor] | None = None
    known: bool = False
    pair_prompts: PairPrompts | None = None
    prompt_texts: Tensor | None = None
    semantic_evidence: bool = True


@dataclass(frozen=True)
class CAPTOutput:
    """Result of a forward pass.

    Attributes:
        features: float [B, d], unit norm, corrected image features.
        logits: float [B, C].
        base_logits: float [B, C] of the base model.
        semantic, sample, expert: what each part found.
    """

    features: Tensor
    logits: Tensor
    base_logits: Tensor
    semantic: SemanticConfusion
    sample: SampleConfusion
    expert: ExpertOutput


@dataclass(frozen=True)
class Prediction:
    """One image: classes with probabilities, best first, and the classes it is easily confused with."""

    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    base_class: str
    confusable_with: tuple[str, ...]


def predictions(output: CAPTOutput, names: Sequence[str], top: int) -> list[Prediction]:
    """The ``top`` best classes of every image of a batch."""
    probabilities, best = output.logits.float().softmax(-1).topk(min(top, len(names)), dim=-1)
    base = output.base_logits.argmax(-1)
    return [
        Prediction(
            tuple(names[int(c)] for c in best[i]),
            tuple(float(p) for p in probabilities[i]),
            names[int(base[i])],
            tuple(names[int(c)] for c in output.semantic.confusing[i]),
        )
        for i in range(len(best))
    ]
