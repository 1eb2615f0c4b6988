"""Configuration of CAPT."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, get_args

from capt.errors import CaptError, DamagedFileError
from capt.training.loop import TrainingOptions

# Choices by name, for checking: annotations are strings at run time.
_CHOICES = {
    "orientation": Literal["column", "row", "sum"],
    "key": Literal["pseudo", "label"],
    "retrieval": Literal["similar", "random"],
    "pair_texts": Literal["written", "derived", "random"],
    "semantic": Literal["both", "commonality", "difference", "none"],
    "adapter": Literal["both", "local", "global", "none"],
    "placement": Literal["after", "before"],
}
_RANGES = {
    "k": (1, math.inf), "m": (1, math.inf), "views": (0, math.inf), "bank_refresh": (0, math.inf),
    "experts": (1, math.inf), "centres": (0, math.inf), "dropout": (0, 1), "bank_dropout": (0, 1),
    "confusion_weight": (0, math.inf), "image_to_text_weight": (0, math.inf), "text_to_image_weight": (0, math.inf),
    "representative_weight": (0, math.inf), "balance_weight": (0, math.inf), "expert_lr": (0, math.inf),
    "evidence": (0, math.inf), "semantic_evidence": (0, math.inf), "unseen_strength": (0, math.inf),
}  # fmt: skip


@dataclass(frozen=True)
class CAPTConfig:
    """Every choice of the method. Defaults follow the paper where it is known; docs/fidelity.md says where it is not.

    Attributes:
        k: confusing classes an image.
        orientation: which confusion counts enter the score, see :meth:`ConfusionBank.statistics`.
        key: class whose confusions are looked up in training: the most confident one (as at test) or the label.
        semantic: prompts that guide the experts; ``none`` switches semantic guidance off.
        pair_texts: ``written`` texts where a pair has them, ``derived`` from class texts, or, as a control, ``random``
            ones: written texts of another pair, random directions where there are none.
        m: stored mistakes retrieved for each pair.
        retrieval: the most similar ones, or, as a control, ``random`` ones of the same candidates.
        sample: mine stored mistakes and adapt image features; without it neither is done.
        temperature: of the softmax over retrieved mistakes.
        bank_source: whose mistakes the bank holds: ``own``, those of the base model, or a name of your choice for those
            of others, which is recorded and lifts the check that they are its own.
        bank_refresh: collect the mistakes anew every so many epochs, with the current model; 0: once, before training.
        bank_shuffle: a control: every pair is shown the mistakes of another pair.
        bank_at_inference: consult stored mistakes when predicting, too.
        bank_dropout: share of training images that see no stored mistake, as at inference without the bank.
        control_seed: of the controls that are drawn once.
        adapter: manners of the adapted blocks, see :class:`capt.modules.DiffMannerAdapter`.
        adapter_layers: adapted blocks of a vision transformer: ``all``, ``last`` or a number of last blocks.
        placement: convolution after the attention, or before it as in LwEIB.
        adapter_mlp: a second convolution on the hidden layer of each adapted block.
        alpha: constant mixing weight of the adapter. Kernels start at zero, so it also scales how fast they act.
        dynamic_alpha: mix the adapter in by similarity to the best stored mistake instead of by a constant.
        mgde: experts; without them the mean of the guidance takes the place of their answer.
        width: width of attention and experts; None: the joint width.
        heads: attention heads of MGDE.
        experts, top_k: experts and how many each image uses.
        hidden: hidden width of an expert; None: 4 * width.
        dropout: inside the experts.
        centres: K-means centres that initialise the semantic experts; 0: none do.
        sample_expert_init: start the sample expert from the tower's last feed-forward part.
        shared_expert: a linear expert on the adapted feature that every image uses, beside the routed ones.
        expert_lr: factor on the learning rate of attention, router and routed experts.
        confusion_weight: weight of the contrastive loss as a whole.
        image_to_text_weight, text_to_image_weight, representative_weight: weights of its parts.
        balance_weight: weight of the load-balance loss.
        semantic_evidence: strength of the written differences of leading classes at prediction, among classes without
            sample evidence; 0 switches them off.
        evidence: strength of the class means of the training images at prediction; 0 switches them off.
        unseen_strength: share of the correction that is applied among classes of which the bank holds no evidence.
        views: augmented views a training image, beside the plain one; all are encoded once and kept.
        training: optimiser, schedule, batch size.
    """

    # Semantic Confusion Miner
    k: int = 3
    orientation: Literal["column", "row", "sum"] = "column"
    key: Literal["pseudo", "label"] = "pseudo"
    semantic: Literal["both", "commonality", "difference", "none"] = "both"
    pair_texts: Literal["written", "derived", "random"] = "written"
    # Sample Confusion Miner and Confusion Bank
    m: int = 1
    retrieval: Literal["similar", "random"] = "similar"
    sample: bool = True
    temperature: float = 10.0
    bank_source: str = "own"
    bank_refresh: int = 0
    bank_shuffle: bool = False
    bank_at_inference: bool = False
    bank_dropout: float = 0.5
    control_seed: int = 0
    # Diff-Manner Adapter
    adapter: Literal["both", "local", "global", "none"] = "both"
    adapter_layers: Literal["all", "last"] | int = "all"
    placement: Literal["after", "before"] = "after"
    adapter_mlp: bool = False
    alpha: float = 1.0
    dynamic_alpha: bool = False
    # Experts
    mgde: bool = True
    width: int | None = None
    heads: int = 8
    experts: int = 3
    top_k: int = 2
    hidden: int | None = None
    dropout: float = 0.3
    centres: int = 5
    sample_expert_init: bool = True
    shared_expert: bool = True
    expert_lr: float = 0.1
    # Losses
    confusion_weight: float = 1.0
    image_to_text_weight: float = 0.5
    text_to_image_weight: float = 0.5
    representative_weight: float = 0.5
    balance_weight: float = 0.01
    # Prediction and training
    semantic_evidence: float = 1.0
    evidence: float = 3.0
    unseen_strength: float = 0.5
    views: int = 2
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        for name, choice in _CHOICES.items():
            if (found := getattr(self, name)) not in get_args(choice):
                raise CaptError(f"CAPT settings: {name} is one of {', '.join(get_args(choice))}; found {found!r}")
        for name, (low, high) in _RANGES.items():
            if not low <= (found := getattr(self, name)) <= high:
                bounds = f"at least {low}" if high == math.inf else f"in [{low}, {high}]"
                raise CaptError(f"CAPT settings: {name} must be {bounds}; found {found!r}")
        if not 1 <= self.top_k <= self.experts:
            raise CaptError(f"CAPT settings: top_k must be in [1, experts={self.experts}]; found {self.top_k}")
        if self.adapter == "local" and self.placement == "before":
            raise CaptError(
                "CAPT settings: adapter 'local' has no attention to stand before; found placement 'before', use 'after'"
            )
        if not self.bank_source:
            raise CaptError("CAPT settings: bank_source must name whose mistakes the bank holds; found ''")

    def as_published(self) -> CAPTConfig:
        """The same without what is ours: shared expert, evidence, slower experts, weaker unseen classes."""
        return replace(
            self, shared_expert=False, evidence=0.0, semantic_evidence=0.0, expert_lr=1.0, unseen_strength=1.0
        )


def config_from_dict(values: dict[str, Any]) -> CAPTConfig:
    """The configuration that ``dataclasses.asdict`` turned into a dictionary."""
    known = {setting.name for setting in fields(CAPTConfig)}
    try:
        if unknown := set(values) - known:
            raise TypeError(f"unknown settings {sorted(unknown)}")
        return CAPTConfig(**{**values, "training": TrainingOptions(**values["training"])})
    except (KeyError, TypeError) as error:
        raise DamagedFileError(f"the stored configuration does not fit this version: {error}") from error
