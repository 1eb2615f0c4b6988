"""CAPT: the model. Confusion mining, retrieval, adapter and experts over one frozen backbone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.bank import ConfusionBank, ConfusionStatistics
from capt.errors import CaptError, DamagedFileError, DataError
from capt.files import load_tensors, read_json, save_tensors, write_json
from capt.methods.baselines import zero_shot_logits
from capt.methods.capt_config import CAPTConfig, config_from_dict
from capt.methods.capt_records import CAPTOutput, ClassSet, Prediction
from capt.modules import (
    ConfusionLoss,
    DiffMannerAdapter,
    MultiGranularityDifferenceExpert,
    SampleConfusion,
    SampleConfusionMiner,
    SampleEvidence,
    SemanticConfusionMiner,
)
from capt.modules.kmeans import spherical_kmeans

if TYPE_CHECKING:
    from PIL.Image import Image

    from capt.backbones import Backbone

_SCHEMA = 1


class CAPT(nn.Module):
    """Confusion-aware adaptation of a frozen CLIP.

    Only the Diff-Manner Adapter and MGDE have parameters that learn. At the start both are neutral and the model
    gives the base model's logits bit for bit.

    Source: CAPT (confusion-aware prompt tuning), whole method; open choices: docs/fidelity.md.
    """

    _text_features: Tensor

    def __init__(
        self, backbone: Backbone, class_names: Sequence[str], *, config: CAPTConfig | None = None,
        bank: ConfusionBank | None = None, text_features: Tensor | None = None,
    ) -> None:  # fmt: skip
        """Compose the method.

        Args:
            backbone: wrapped, frozen CLIP.
            class_names: the classes it is trained on (the base classes).
            bank: mistakes of the base model on the training images; None: an empty bank.
            text_features: float [C, d], unit norm; default: the backbone's prompt ensemble.

        Raises:
            CaptError: the bank belongs to other classes or to another backbone.
        """
        super().__init__()
        self.config = config = config or CAPTConfig()
        self.backbone = backbone
        self.class_names = tuple(class_names)
        if bank is not None and bank.class_names != self.class_names:
            raise CaptError(
                f"CAPT: the bank was built for {bank.n_classes} other classes; build one for these {len(class_names)}"
            )
        if bank is not None and bank.backbone and bank.backbone != backbone.fingerprint():
            raise CaptError(
                "CAPT: the bank holds the mistakes of another backbone (fingerprints differ); build it again"
            )
        self.bank = bank
        text = (backbone.class_text_features(self.class_names) if text_features is None else text_features).detach()
        self.register_buffer("_text_features", text.clone(), persistent=False)
        self.semantic = SemanticConfusionMiner(config.k)
        self.sample = SampleConfusionMiner(
            DiffMannerAdapter.for_tower(
                backbone.tower, layers=config.adapter_layers, alpha=config.alpha, dynamic=config.dynamic_alpha
            ),
            config.m,
            config.temperature,
        )
        self.mgde = MultiGranularityDifferenceExpert(
            backbone.dim, width=config.width, n_heads=config.heads, n_experts=config.experts, top_k=config.top_k,
            hidden=config.hidden, dropout=config.dropout, shared_expert=config.shared_expert,
        )  # fmt: skip
        self.evidence = SampleEvidence(len(self.class_names), backbone.dim, config.evidence)
        self.loss = ConfusionLoss(config.confusion_weight)
        self._initialise_experts()
        self.to(self._text_features.device)

    @property
    def adapter(self) -> DiffMannerAdapter:
        """The trained part of the image tower."""
        return self.sample.adapter

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that learn, by name: exactly the adapter's and MGDE's."""
        return {
            name: parameter
            for name, parameter in self.named_parameters()
            if name.startswith(("sample.adapter.", "mgde."))
        }

    def learning_rates(self) -> dict[float, list[nn.Parameter]]:
        """The same parameters by the factor on their learning rate: routed experts learn more slowly."""
        fast = [p for name, p in self.trainable().items() if not self._is_routed(name)]
        slow = [p for name, p in self.trainable().items() if self._is_routed(name)]
        return {1.0: fast + slow} if self.config.expert_lr == 1.0 else {1.0: fast, self.config.expert_lr: slow}

    def _is_routed(self, name: str) -> bool:
        return name.startswith("mgde.") and not (self.config.shared_expert and name.startswith("mgde.shared."))

    def train(self, mode: bool = True) -> CAPT:
        """Training mode of the trained parts; the frozen backbone always stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def _initialise_experts(self) -> None:
        text = self._text_features
        pairs = self.bank.cells()[:2] if self.bank is not None and len(self.bank) else None
        if pairs is None:  # nothing is confused yet: every class with its nearest neighbour
            similarity = (text @ text.T).fill_diagonal_(-2)
            pairs = (
                (torch.arange(len(text)), similarity.argmax(1).cpu()) if len(text) > 1 else (torch.zeros(0).long(),) * 2
            )
        first, second = (text[index.to(text.device)] for index in pairs)
        weights = self.backbone.tower.feed_forward_weights()
        self.mgde.initialise_experts(
            spherical_kmeans(F.normalize(first + second, dim=-1), self.config.centres),
            spherical_kmeans(F.normalize(first - second, dim=-1), self.config.centres),
            None if weights is None else weights[:4],
        )

    # ---- forward ------------------------------------------------------------------------------------

    def class_set(self, class_names: Sequence[str] | None = None) -> ClassSet:
        """Candidate classes for :meth:`forward`.

        Training classes come with the bank, its statistics and the evidence. A selection of them keeps statistics and
        evidence; a list with any new class keeps the statistics of the pairs that the bank knows. Wholly new classes
        have none, and no text of a training class is used.
        """
        if class_names is None or tuple(class_names) == self.class_names:
            statistics = self.bank.statistics(self.config.orientation) if self.bank is not None else None
            device = self._text_features.device
            rows = torch.arange(len(self.class_names), device=device)
            return ClassSet(
                self.class_names,
                self._text_features,
                None if statistics is None else statistics.to(device),
                self.bank,
                # A training image would be its own evidence.
                None if self.training else self.evidence.change_map(self._text_features, rows),
                known=True,
            )
        names = tuple(class_names)
        if not names:
            raise DataError("CAPT: the list of class names is empty")
        text = self.backbone.class_text_features(names)
        row = {name: index for index, name in enumerate(self.class_names)}
        if not all(name in row for name in names):
            return ClassSet(names, text, self._statistics_for(names))
        rows = torch.tensor([row[name] for name in names], device=text.device)
        evidence = None if self.training else self.evidence.change_map(text, rows)
        return ClassSet(names, text, self._statistics_for(names), evidence=evidence, known=True)

    def _statistics_for(self, names: tuple[str, ...]) -> ConfusionStatistics | None:
        position = {name: index for index, name in enumerate(names)}
        if self.bank is None or not position.keys() & set(self.class_names):
            return None
        moved = torch.tensor([position.get(name, -1) for name in self.class_names])
        known = self.bank.statistics(self.config.orientation)
        keys = moved[torch.repeat_interleave(torch.arange(len(self.class_names)), known.offsets.diff())]
        others = moved[known.classes]
        kept = (keys >= 0) & (others >= 0)
        statistics = ConfusionStatistics.from_pairs(keys[kept], others[kept], known.counts[kept], len(names))
        return statistics.to(self._text_features.device)

    def tokens(self, images: Tensor) -> Tensor:
        """Frozen tokens [B, L, D] of transformed images float [B, 3, H, W], the input of :meth:`forward`."""
        with torch.no_grad():
            return self.adapter.frozen_tokens(self.backbone.tower, images.to(self._text_features.device))

    def forward(
        self,
        tokens: Tensor,
        classes: ClassSet | None = None,
        *,
        bank_tokens: Callable[[Tensor], Tensor] | None = None,
        sample_ids: Tensor | None = None,
    ) -> CAPTOutput:
        """Classify images given as frozen tokens.

        Args:
            tokens: float [B, L, D] from :meth:`tokens`.
            classes: candidates; default: the training classes.
            bank_tokens: bank rows int64 [n] -> frozen tokens; None: no stored mistakes are consulted.
            sample_ids: int64 [B], ids of training images, whose own records are not retrieved.
        """
        classes = classes or self.class_set()
        tower, scale = self.backbone.tower, self.backbone.logit_scale
        with torch.no_grad():
            raw = self.adapter.encode_frozen(tower, tokens)
            features = F.normalize(raw, dim=-1)
            base_logits = zero_shot_logits(raw, classes.text_features, scale)
        semantic = self.semantic(features, base_logits, classes.text_features, classes.statistics)
        sample = self.sample(
            features, tokens, tower, semantic, bank=classes.bank, bank_tokens=bank_tokens, sample_ids=sample_ids
        )
        expert = self.mgde(features, semantic.commonality, semantic.difference, self._sample_guidance(sample))
        strength = 1.0 if classes.known else self.config.unseen_strength
        extra: Tensor | float = 0.0
        if classes.evidence is not None:
            matrix, offset = classes.evidence
            extra = features @ matrix + offset
        corrected = self.mgde.correct(raw, expert.correction, sample.own, strength, extra)
        return CAPTOutput(corrected, scale * corrected @ classes.text_features.T, base_logits, semantic, sample, expert)

    def _sample_guidance(self, sample: SampleConfusion) -> Tensor:
        if not self.training or not self.config.bank_dropout or sample.mask.shape[1] == 0:
            return sample.guidance
        dropped = torch.rand(len(sample.own), 1, device=sample.own.device) < self.config.bank_dropout
        return torch.where(dropped, sample.own, sample.guidance)

    def losses(
        self, tokens: Tensor, labels: Tensor, *, bank_tokens: Callable[[Tensor], Tensor] | None, sample_ids: Tensor
    ) -> dict[str, Tensor]:
        """Losses of a training batch: ``loss`` is the sum that is minimised, the others are its parts."""
        classes = self.class_set()
        output = self(tokens, classes, bank_tokens=bank_tokens, sample_ids=sample_ids)
        semantic, sample = output.semantic, output.sample
        stored: dict[str, Tensor] = {}
        if self.bank is not None and sample.mask.shape[1]:
            rows = sample.rows.clamp_min(0).cpu()
            # What a stored mistake looks like after correction: it must no longer be one.
            stored = {
                "representatives": self.mgde.share(sample.representatives),
                "representative_labels": self.bank.labels[rows].to(labels.device),
                "representative_predictions": self.bank.predictions[rows].to(labels.device),
                "mask": sample.mask,
            }
        parts = self.loss(
            output.features, classes.text_features, labels,
            torch.cat([semantic.pseudo.unsqueeze(1), semantic.confusing], 1), self.backbone.logit_scale, **stored,
        )  # fmt: skip
        return {
            "loss": parts.total + self.config.balance_weight * output.expert.balance,
            "cross_entropy": parts.cross_entropy,
            "image_to_text": parts.image_to_text,
            "text_to_image": parts.text_to_image,
            "representatives": parts.representatives,
            "balance": output.expert.balance,
        }

    # ---- use ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def logits(self, images: Tensor, class_names: Sequence[str] | None = None) -> Tensor:
        """Logits float [B, C] of transformed images [B, 3, H, W] over ``class_names`` (default: training classes)."""
        self.eval()
        output: CAPTOutput = self(self.tokens(images), self.class_set(class_names))
        return output.logits

    @torch.inference_mode()
    def encode_image(self, images: Tensor, class_names: Sequence[str] | None = None) -> Tensor:
        """Corrected unit-norm features float [B, d]; they depend on the candidate classes, since confusions do."""
        self.eval()
        output: CAPTOutput = self(self.tokens(images), self.class_set(class_names))
        return output.features

    @torch.inference_mode()
    def predict(
        self, images: Sequence[Image] | Tensor, class_names: Sequence[str] | None = None, *, top: int = 5
    ) -> list[Prediction]:
        """Classify PIL images (or already transformed pixels [B, 3, H, W]).

        Args:
            class_names: candidates; default: the training classes.
            top: classes to report.
        """
        self.eval()
        if not isinstance(images, Tensor):
            images = torch.stack([self.backbone.preprocess(image) for image in images])
        classes = self.class_set(class_names)
        output = self(self.tokens(images), classes)
        probabilities, best = output.logits.float().softmax(-1).topk(min(top, len(classes.names)), dim=-1)
        base = output.base_logits.argmax(-1)
        return [
            Prediction(
                tuple(classes.names[c] for c in best[i]),
                tuple(float(p) for p in probabilities[i]),
                classes.names[base[i]],
                tuple(classes.names[c] for c in output.semantic.confusing[i]),
            )
            for i in range(len(images))
        ]

    # ---- storage ------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``adapter.safetensors``, ``state.json`` and, if there is one, ``bank/`` into ``folder``."""
        folder = Path(folder)
        tensors = {**self.trainable(), "evidence.means": self.evidence.means, "text_features": self._text_features}
        digest = save_tensors(folder / "adapter.safetensors", tensors)
        if self.bank is not None:
            self.bank.save(folder / "bank")
        write_json(
            folder / "state.json",
            {
                "schema": _SCHEMA,
                "method": "capt",
                "config": asdict(self.config),
                "class_names": list(self.class_names),
                "backbone": self.backbone.fingerprint(),
                "adapter_sha256": digest,
                "has_bank": self.bank is not None,
            },
        )

    @classmethod
    def load(cls, folder: str | Path, backbone: Backbone) -> CAPT:
        """Read a model written by :meth:`save`.

        Raises:
            DataError: the folder holds no model.
            DamagedFileError: a file was changed.
            CaptError: ``backbone`` is not the one it was trained on.
        """
        folder = Path(folder)
        state = read_json(folder / "state.json")
        if not isinstance(state, dict) or state.get("schema") != _SCHEMA or state.get("method") != "capt":
            raise DamagedFileError(f"'{folder / 'state.json'}': not a CAPT model of schema {_SCHEMA}")
        if state["backbone"] != backbone.fingerprint():
            raise CaptError(
                f"'{folder}': trained on another backbone (fingerprint {state['backbone'][:16]}..., "
                f"this one has {backbone.fingerprint()[:16]}...); give the same --model and --pretrained as in run.json"
            )
        bank = ConfusionBank.load(folder / "bank") if state["has_bank"] else None
        tensors = load_tensors(folder / "adapter.safetensors", state["adapter_sha256"])
        # The class texts it was trained with, whatever templates the backbone has now.
        text = tensors.pop("text_features", None)
        if text is None:
            raise DamagedFileError(
                f"'{folder / 'adapter.safetensors'}': the class texts are missing; fit the model again"
            )
        config = config_from_dict(state["config"])
        model = cls(
            backbone, state["class_names"], config=config, bank=bank, text_features=text.to(backbone.logit_scale.device)
        )
        expected: dict[str, Tensor] = {**model.trainable(), "evidence.means": model.evidence.means}
        if tensors.keys() != expected.keys() or any(tensors[n].shape != p.shape for n, p in expected.items()):
            raise DamagedFileError(
                f"'{folder / 'adapter.safetensors'}': its tensors do not fit the recorded configuration"
            )
        with torch.no_grad():
            for name, parameter in expected.items():
                parameter.copy_(tensors[name])
        return model.eval()
