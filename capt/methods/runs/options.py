"""What a run does beside the method itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from capt.errors import CaptError
from capt.training.loop import TrainingOptions

RIVALS = ("linear_adapter", "tip_adapter", "plain_adapter")
"""What CAPT can be compared with on the same base model: a linear residual adapter, a cache of the training features,
and a two-layer residual adapter with as many parameters as CAPT and the same training."""

Progress = Callable[[str, int, int], None]
"""Called with (what is being done, done, total)."""


@dataclass(frozen=True)
class RunOptions:
    """What a run does beside the method itself.

    Attributes:
        shots: training images a class.
        seeds: one model each; 0 is a seed like any other.
        base: base model f0 whose mistakes are corrected: a name (see ``capt fit``), trained here with its default
            settings, or the folder of a finished ``capt fit NAME`` run with the same seeds.
        rivals: compared with CAPT on the same base model: linear_adapter, tip_adapter, plain_adapter.
        linear: training of the linear adapter.
        pair_text_files: files of written pair texts for the training and the new classes; default: the shipped ones for
            the shipped images, texts derived from class names otherwise.
        few_shot_lists: files that list the training images, with ``{shots}`` and ``{seed}`` in the name, instead of
            a choice made here.
        transductive: base models that learn without labels also see training images of the classes they are not
            trained on; recorded, and not comparable with other rows.
        token_memory: bytes of frozen tokens to keep, of the base model and of CAPT each; above it they are computed again when needed.
    """

    shots: int = 4
    seeds: tuple[int, ...] = (1, 2, 3)
    base: str = "zero-shot"
    rivals: tuple[str, ...] = ("linear_adapter", "tip_adapter")
    linear: TrainingOptions = field(default_factory=TrainingOptions)
    pair_text_files: tuple[str, ...] = ()
    few_shot_lists: str = ""
    transductive: bool = False
    token_memory: int = 2 << 30

    def __post_init__(self) -> None:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise CaptError(f"seeds must be distinct and at least one, found {list(self.seeds)}")
        if unknown := set(self.rivals) - set(RIVALS):
            raise CaptError(f"rivals: found {sorted(unknown)}, expected some of {', '.join(RIVALS)}")
