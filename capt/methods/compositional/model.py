"""What every compositional model offers, and the simplest of them: zero-shot CLIP."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from capt.errors import CaptError
from capt.evaluation import PrimitiveFactors, primitive_factors, released_copies
from capt.methods.tuned_model import TunedModel
from capt.training.loop import TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone

Profile = Literal["clean", "released"]
Weights = tuple[float, float, float]


@dataclass(frozen=True)
class CompositionalConfig:
    """Settings that all compositional models have.

    Attributes:
        profile: ``released`` repeats what the published code does where it is odd (docs/fidelity.md): dropout and batch
            statistics stay off after the first validation, the best epoch is chosen with weights of 1 whatever
            ``score_weights`` are, primitive probabilities are divided by the number of text chunks, infeasible pairs
            score 0.
        views: augmented views a training image, beside the plain one; all are encoded once and kept.
        text_chunk: prompts encoded together; bounds the memory of the text side.
        pair_chunk: pairs that meet a batch of images at a time; bounds the memory of scoring.
        score_weights: of the pair logits, the state probabilities and the object probabilities in the score.
        training: optimiser, schedule, batch size.
    """

    profile: Profile = "clean"
    views: int = 0
    text_chunk: int = 256
    pair_chunk: int = 512
    score_weights: Weights = (1.0, 1.0, 1.0)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def __post_init__(self) -> None:
        if self.profile not in get_args(Profile):
            raise CaptError(f"profile: expected one of {', '.join(get_args(Profile))}, found {self.profile!r}")
        for name, least in (("text_chunk", 1), ("pair_chunk", 1), ("views", 0)):
            if getattr(self, name) < least:
                raise CaptError(f"{name}: expected at least {least}, found {getattr(self, name)}")
        weights = self.score_weights
        if len(weights) != 3 or not any(weights) or not all(0 <= weight < math.inf for weight in weights):
            raise CaptError(
                f"score_weights: expected three finite numbers >= 0, not all of them 0, found {list(weights)}"
            )
        for name in (one.name for one in fields(self) if one.name.endswith("dropout")):
            if not 0 <= getattr(self, name) < 1:
                raise CaptError(f"{name}: expected at least 0 and less than 1, found {getattr(self, name)}")


class PairTexts(NamedTuple):
    """Unit-norm prompts: pairs [K, d]; states [n_states, d] and objects [n_objects, d], None without such branches.

    ``world``: pairs of the world that these were cut from; 0: as many as they are.
    """

    pair: Tensor
    state: Tensor | None = None
    object: Tensor | None = None
    world: int = 0


class View(NamedTuple):
    """What a model keeps of a batch of images while pairs are scored.

    Attributes:
        pair, state, object: unit-norm image vectors [B, d], one a branch; None without that branch.
        keys: whatever further prompts are compared with.
    """

    pair: Tensor
    state: Tensor | None = None
    object: Tensor | None = None
    keys: Any = None


class CompositionalModel(TunedModel):
    """A CLIP model, tuned or not, seen as: texts of pairs, a view of images, logits of each against each.

    Attributes:
        kind: name of the model in commands and records.
        backbone: the wrapped, frozen CLIP.
        states, objects: names of the primitives.
        train_pairs: int64 [K, 2] (state, object), the pairs that training sees, in label order.
        config: its settings.
    """

    config_type: ClassVar[type[CompositionalConfig]] = CompositionalConfig
    train_pairs: Tensor

    def __init__(
        self,
        backbone: Backbone,
        states: Sequence[str],
        objects: Sequence[str],
        train_pairs: Tensor,
        config: CompositionalConfig | None = None,
    ) -> None:
        super().__init__(backbone)
        self.states, self.objects = tuple(states), tuple(objects)
        self.register_buffer("train_pairs", train_pairs.to(backbone.device), persistent=False)
        self.config = config or self.config_type()

    # ---- the model -----------------------------------------------------------------------------------

    @property
    def input_kind(self) -> Hashable:
        """Models of one backbone with equal kinds have equal :meth:`inputs`, and may share a cache of them."""
        return "feature"

    def inputs(self, images: Tensor) -> Tensor:
        """What :meth:`look` takes, of transformed images float [B, 3, H, W]: frozen, so it may be cached."""
        with torch.no_grad():
            return self.backbone.image_features(images)

    def look(self, inputs: Tensor) -> View:
        """The image side of :meth:`inputs`, with gradients to what is trained."""
        return View(F.normalize(inputs.float(), dim=-1))

    @abstractmethod
    def texts(self, pairs: Tensor) -> PairTexts:
        """Prompts of pairs int64 [K, 2] and of all primitives, with gradients to what is trained."""

    def branch_logits(self, view: View, vector: Tensor, texts: Tensor) -> Tensor:
        """Scaled cosines float32 [B, K] between image vectors [B, d] of ``view`` and unit-norm prompts [K, d]."""
        with torch.autocast(vector.device.type, enabled=False):  # half precision has a handful of values between pairs
            return self.backbone.logit_scale * vector.float() @ texts.float().T

    def losses(self, inputs: Tensor, labels: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses of a batch: ``loss`` is minimised, the others are its parts. Default: cross-entropy of training pairs.

        Args:
            labels: int64 [B], positions in ``train_pairs``.
            generator: CPU generator of whatever is drawn.
        """
        view = self.look(inputs)
        return {"loss": F.cross_entropy(self.branch_logits(view, view.pair, self.texts(self.train_pairs).pair), labels)}

    # ---- scores --------------------------------------------------------------------------------------

    def primitives(self, view: View, texts: PairTexts, weights: Weights | None = None) -> PrimitiveFactors | None:
        """Factors of the states and of the objects whose product is added to a pair's score; None: nothing is added.

        ``weights``: instead of the configured ``score_weights``.
        """
        _, state_weight, object_weight = weights or self.config.score_weights
        if view.state is None or view.object is None or texts.state is None or texts.object is None:
            return None
        return primitive_factors(
            self.branch_logits(view, view.state, texts.state),
            self.branch_logits(view, view.object, texts.object),
            state_weight=state_weight,
            object_weight=object_weight,
            copies=released_copies(texts.world or len(texts.pair)) if self.config.profile == "released" else 1,
        )

    def pair_scores(self, view: View, texts: PairTexts, weights: Weights | None = None) -> Iterator[tuple[int, Tensor]]:
        """(first pair, weighted pair logits float32 [B, k]) of ``pair_chunk`` pairs at a time; ``weights`` as above."""
        weight, *_ = weights or self.config.score_weights
        for start in range(0, len(texts.pair), self.config.pair_chunk):
            prompts = texts.pair[start : start + self.config.pair_chunk]
            yield start, weight * self.branch_logits(view, view.pair, prompts).float()

    # ---- storage -------------------------------------------------------------------------------------

    def record(self) -> dict[str, Any]:
        """Names and training pairs."""
        return {
            "states": list(self.states),
            "objects": list(self.objects),
            "train_pairs": self.train_pairs.tolist(),
        }


class ZeroShotPairs(CompositionalModel):
    """The backbone as it is, with a prompt ensemble of ``{state} {object}``. Nothing learns."""

    kind = "zero-shot"

    def texts(self, pairs: Tensor) -> PairTexts:
        """Class texts of pairs int64 [K, 2]."""
        states, objects = map(spoken, (self.states, self.objects))
        names = [f"{states[state]} {objects[object_]}" for state, object_ in pairs.tolist()]
        return PairTexts(self.backbone.class_text_features(names))


def spoken(names: Sequence[str]) -> list[str]:
    """Names of primitives as words of a sentence: ``_`` and ``.`` join words in the published data sets."""
    return [name.replace("_", " ").replace(".", " ") for name in names]
