"""Tip-Adapter: the few-shot images themselves as a cache that votes beside zero-shot CLIP."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.errors import DamagedFileError, DataError
from capt.files import load_tensors
from capt.methods.base.model import BaseConfig, BaseModel
from capt.training.loop import TrainingOptions

if TYPE_CHECKING:
    from capt.backbones import Backbone

_SAME = 1e-5  # two features whose cosine is closer to 1 are those of one image


@dataclass(frozen=True)
class TipAdapterConfig(BaseConfig):
    """Settings of Tip-Adapter.

    Attributes:
        views: only fine-tuning needs them: without, every key meets its own image at a cosine of exactly 1.
        alpha: weight of the cache against the scaled cosines of the class texts.
        beta: sharpness of a vote, ``exp(-beta (1 - cosine))``.
        finetune: train the keys (Tip-Adapter-F); otherwise nothing learns.
        own_votes: an image that is in the cache votes for itself. Training images are then mistaken for other classes
            less often than new ones, so by default it stays silent; trained keys are no images any more and vote.
    """

    views: int = 0
    alpha: float = 1.0
    beta: float = 5.5
    finetune: bool = False
    own_votes: bool = False
    training: TrainingOptions = field(
        default_factory=lambda: TrainingOptions(lr=1e-3, weight_decay=0.01, warmup_epochs=0.0, clip_norm=0.0)
    )


class TipAdapter(BaseModel):
    """Zero-shot logits plus ``alpha * exp(-beta (1 - v K^T)) @ onehot(labels)``; v unit-norm, K the cached features.

    In lists with other classes only the training classes get votes, in wholly new lists nobody does. alpha and beta
    are constants unless :meth:`tune` is called with a validation split.

    Attributes:
        keys: float32 [N, d], unit norm until they are trained, never normalised again; N = 0 before :meth:`prepare`.
        key_labels: int64 [N], rows of ``class_names``.

    Source: Tip-Adapter and Tip-Adapter-F.
    """

    kind = "tip-adapter"
    class_bound = True
    config_type = TipAdapterConfig
    config: TipAdapterConfig
    key_labels: Tensor

    ALPHAS: ClassVar[tuple[float, ...]] = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    BETAS: ClassVar[tuple[float, ...]] = (1.0, 2.0, 4.0, 5.5, 8.0, 12.0, 20.0)

    def __init__(self, backbone: Backbone, class_names: Sequence[str], config: TipAdapterConfig | None = None) -> None:
        super().__init__(backbone, class_names, config)
        self._fill(torch.empty(0, self.dim), torch.empty(0, dtype=torch.int64))

    def _fill(self, keys: Tensor, labels: Tensor) -> None:
        device = self.backbone.device
        self.keys = nn.Parameter(keys.to(device), requires_grad=self.config.finetune)
        self.register_buffer("key_labels", labels.to(device))

    def prepare(self, inputs: Callable[[Tensor], Tensor], labels: Tensor) -> None:
        """Fill the cache with all training images; their features are those of the evaluation transform.

        Makes a new :attr:`keys`, so it comes before an optimiser asks for :meth:`trainable`.
        """
        with torch.no_grad():
            chunks = [self.features(inputs(rows)) for rows in torch.arange(len(labels)).split(256)]
            keys = F.normalize(torch.cat(chunks).float(), dim=-1) if chunks else torch.empty(0, self.dim)
        self._fill(keys.clone(), labels.clone())

    # ---- votes --------------------------------------------------------------------------------------

    def _votes(self, features: Tensor, beta: float) -> Tensor:
        """What each cached image says of each feature, float32 [B, N]."""
        cosines = F.normalize(features.float(), dim=-1) @ self.keys.T
        votes = torch.exp(-beta * (1 - cosines))
        if self.config.own_votes or self.config.finetune:
            return votes
        return votes.masked_fill(cosines > 1 - _SAME, 0.0)

    def _counted(self, votes: Tensor, class_names: Sequence[str] | None = None) -> Tensor | None:
        """Votes [B, N] added up by class [B, C], without a one-hot matrix; None where no class is in the cache."""
        columns = self.key_labels
        names = self.class_names if class_names is None else tuple(class_names)
        if names != self.class_names:
            column = {name: index for index, name in enumerate(names)}
            if not len(columns) or column.keys().isdisjoint(self.class_names):
                return None
            # Classes that are no candidates share a column behind the others, which is cut off.
            moved = [column.get(name, len(names)) for name in self.class_names]
            columns = torch.tensor(moved, device=columns.device)[columns]
        sums = votes.new_zeros(len(votes), len(names) + 1).index_add(1, columns, votes)
        return sums[:, :-1]

    def extra_logits(self, features: Tensor, class_names: Sequence[str]) -> Tensor | None:
        """The cache's logits [B, C] of un-normalised features [B, d]; None if no class is a training class."""
        sums = self._counted(self._votes(features, self.config.beta), class_names)
        return None if sums is None else self.config.alpha * sums

    def _cosines(self, features: Tensor) -> Tensor:
        text = self.class_text_features(self.class_names)
        return self.logit_scale * F.normalize(features, dim=-1) @ text.T

    # ---- choosing alpha and beta --------------------------------------------------------------------

    @torch.no_grad()
    def tune(
        self, features: Tensor, labels: Tensor, alphas: Sequence[float] = ALPHAS, betas: Sequence[float] = BETAS
    ) -> dict[str, float]:
        """Take the alpha and beta with the best accuracy on held-out images; ties go to the lower cross-entropy.

        Args:
            features: un-normalised [n, d], of a validation split that is neither in the cache nor tested on.
            labels: int64 [n], rows of ``class_names``.

        Returns:
            ``alpha``, ``beta``, ``accuracy``; alpha and beta are in :attr:`config` too, and stored with it.

        Raises:
            DataError: no images, or labels that are no training classes.
        """
        n_classes = len(self.class_names)
        if not len(labels) or len(features) != len(labels) or int(labels.min()) < 0 or int(labels.max()) >= n_classes:
            raise DataError(
                f"tune: expected features and labels in 0..{n_classes - 1} of the same validation images, at least "
                f"one, found {len(features)} features and {len(labels)} labels {sorted(set(labels.tolist()))[:5]}"
            )
        labels = labels.to(features.device)
        cosines = self._cosines(features)
        best = (-1.0, 0.0, self.config.alpha, self.config.beta)
        for beta in betas:
            sums = self._counted(self._votes(features, beta))
            assert sums is not None
            for alpha in alphas:
                logits = cosines + alpha * sums
                accuracy = float((logits.argmax(-1) == labels).double().mean())
                best = max(best, (accuracy, -float(F.cross_entropy(logits, labels)), alpha, beta))
        accuracy, _, alpha, beta = best
        self.config = replace(self.config, alpha=alpha, beta=beta)
        return {"alpha": alpha, "beta": beta, "accuracy": accuracy}

    # ---- storage ------------------------------------------------------------------------------------

    def fingerprint(self) -> str:
        """Hexadecimal digest of backbone, cache, alpha and beta."""
        settings = f"{super().fingerprint()}|{self.config.alpha}|{self.config.beta}"
        return hashlib.blake2b(settings.encode(), digest_size=32).hexdigest()

    def restore(self, folder: Path, record: dict[str, Any]) -> None:
        """Read keys and labels; the number of cached images is known only from the file."""
        path = folder / "base.safetensors"
        found = load_tensors(path, record["sha256"])
        labels, keys = found.get("key_labels", torch.empty(0)), found.get("keys", torch.empty(0, self.dim))
        if labels.dtype != torch.int64 or labels.ndim != 1:
            raise DamagedFileError(f"'{path}': expected key_labels, int64 [N]; fit the model again")
        if keys.ndim != 2:
            raise DamagedFileError(
                f"'{path}': expected keys, float [N, d], found {list(keys.shape)}; fit the model again"
            )
        # As wide as the features that were cached: those of a student live in its teacher's space.
        self._fill(torch.empty(len(labels), *keys.shape[1:]), torch.empty_like(labels))
        super().restore(folder, record)
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(self.class_names):
            raise DamagedFileError(f"'{path}': key_labels go beyond the {len(self.class_names)} recorded classes")
