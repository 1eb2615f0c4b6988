"""Configuration of CAPT."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from capt.errors import CaptError, DamagedFileError
from capt.training.loop import TrainingOptions


@dataclass(frozen=True)
class CAPTConfig:
    """Every choice of the method. Defaults follow the paper where it is known; docs/fidelity.md says where it is not.

    Attributes:
        k: confusing classes an image.
        m: stored mistakes retrieved for each pair.
        orientation: which confusion counts enter the score, see :meth:`ConfusionBank.statistics`.
        adapter_layers: adapted blocks of a vision transformer: ``all``, ``last`` or a number of last blocks.
        dynamic_alpha: mix the adapter in by similarity to the best stored mistake instead of by a constant.
        temperature: of the softmax over retrieved mistakes.
        width: width of attention and experts; None: the joint width.
        heads: attention heads of MGDE.
        experts, top_k: experts and how many each image uses.
        hidden: hidden width of an expert; None: 4 * width.
        dropout: inside the experts.
        centres: K-means centres that initialise the semantic experts.
        confusion_weight, balance_weight: weights of the contrastive and the load-balance loss.
        bank_at_inference: consult stored mistakes when predicting, too.
        bank_dropout: share of training images that see no stored mistake, as at inference without the bank.
        views: augmented views a training image, beside the plain one; all are encoded once and kept.
        alpha: constant mixing weight of the adapter. Kernels start at zero, so it also scales how fast they act.
        shared_expert: a linear expert on the adapted feature that every image uses, beside the routed ones.
        expert_lr: factor on the learning rate of attention, router and routed experts.
        evidence: strength of the class means of the training images at prediction; 0 switches them off.
        unseen_strength: share of the correction that is applied among classes of which the bank holds no evidence.
        training: optimiser, schedule, batch size.
    """

    k: int = 3
    m: int = 1
    orientation: Literal["column", "row", "sum"] = "column"
    adapter_layers: Literal["all", "last"] | int = "all"
    dynamic_alpha: bool = False
    temperature: float = 10.0
    width: int | None = None
    heads: int = 8
    experts: int = 3
    top_k: int = 2
    hidden: int | None = None
    dropout: float = 0.3
    centres: int = 5
    confusion_weight: float = 1.0
    balance_weight: float = 0.01
    bank_at_inference: bool = False
    bank_dropout: float = 0.5
    views: int = 2
    alpha: float = 1.0
    shared_expert: bool = True
    expert_lr: float = 0.1
    evidence: float = 3.0
    unseen_strength: float = 0.5
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        if self.k < 1 or self.m < 1 or self.views < 0 or not 0 <= self.dropout <= 1 or not 0 <= self.bank_dropout <= 1:
            raise CaptError(
                "CAPT settings: k and m must be at least 1, views at least 0, dropout and bank_dropout in [0, 1]; "
                f"found k={self.k}, m={self.m}, views={self.views}, dropout={self.dropout}, "
                f"bank_dropout={self.bank_dropout}"
            )

    def as_published(self) -> CAPTConfig:
        """The same without what is ours: shared expert, sample evidence, slower experts, weaker unseen classes."""
        return replace(self, shared_expert=False, evidence=0.0, expert_lr=1.0, unseen_strength=1.0)


def config_from_dict(values: dict[str, Any]) -> CAPTConfig:
    """The configuration that ``dataclasses.asdict`` turned into a dictionary."""
    try:
        return CAPTConfig(**{**values, "training": TrainingOptions(**values["training"])})
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"the stored configuration does not fit this version: {error}") from error
