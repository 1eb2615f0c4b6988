"""CAPT: the model. Confusion mining, retrieval, adapter and experts over one frozen base model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from capt.bank import ConfusionBank, ConfusionStatistics
from capt.errors import CaptError, DataError
from capt.methods.base.model import BaseModel, ZeroShot
from capt.methods.capt_classes import expert_prompts, prompt_texts, restricted_statistics, usable_prompts
from capt.methods.capt_config import CAPTConfig
from capt.methods.capt_records import CAPTOutput, ClassSet, Prediction, predictions
from capt.methods.capt_storage import load_capt, save_capt
from capt.modules import (
    ConfusionLoss,
    DiffMannerAdapter,
    MultiGranularityDifferenceExpert,
    PairPrompts,
    SampleConfusion,
    SampleConfusionMiner,
    SampleEvidence,
    SemanticConfusionMiner,
    SemanticEvidence,
)
from capt.modules.kmeans import spherical_kmeans

if TYPE_CHECKING:
    from PIL.Image import Image

    from capt.backbones import Backbone


class CAPT(nn.Module):
    """Confusion-aware adaptation of a frozen CLIP, tuned before or not.

    Only the Diff-Manner Adapter and MGDE have parameters that learn. At the start both are neutral and the model
    gives the base model's logits bit for bit.

    Source: CAPT (confusion-aware prompt tuning), whole method; open choices: docs/fidelity.md.
    """

    text_features: Tensor

    def __init__(
        self, base: BaseModel | Backbone, class_names: Sequence[str], *, config: CAPTConfig | None = None,
        bank: ConfusionBank | None = None, text_features: Tensor | None = None, pair_prompts: PairPrompts | None = None,
    ) -> None:  # fmt: skip
        """Compose the method.

        Args:
            base: the model f0 that is corrected, trained and then frozen; a wrapped CLIP counts as zero-shot.
            class_names: the classes it is trained on (the base classes).
            bank: mistakes of the base model on the training images; None: an empty bank.
            text_features: float [C, d], unit norm; default: the base model's texts of ``class_names``.
            pair_prompts: :class:`capt.modules.PairPrompts` of ``class_names``; None: prompts of class texts.

        Raises:
            CaptError: the bank belongs to other classes or another model, or the pair prompts to other classes.
        """
        super().__init__()
        self.config = config = config or CAPTConfig()
        self.class_names = tuple(class_names)
        self.base: BaseModel = base if isinstance(base, BaseModel) else ZeroShot(base, self.class_names)
        self.base.requires_grad_(False).eval()
        with torch.no_grad():
            text = self.base.class_text_features(self.class_names) if text_features is None else text_features
        self.register_buffer("text_features", text.detach().clone(), persistent=False)
        self.pair_prompts = usable_prompts(pair_prompts, self.class_names, config)
        self._other_prompts: PairPrompts | None = None
        self.bank: ConfusionBank | None = None
        self._statistics: ConfusionStatistics | None = None
        self._shown: ConfusionBank | None = None
        if bank is not None:
            self.use_bank(bank)
        tower, dim = self.base.tower, self.base.dim
        self.semantic = SemanticConfusionMiner(config.k)
        self.sample = SampleConfusionMiner(
            DiffMannerAdapter.for_tower(
                tower, layers=config.adapter_layers, mlp=config.adapter_mlp, alpha=config.alpha,
                dynamic=config.dynamic_alpha, placement=config.placement, manner=config.adapter,
            ),
            config.m, config.temperature, config.retrieval,
        )  # fmt: skip
        self.mgde = MultiGranularityDifferenceExpert(
            dim, width=config.width, n_heads=config.heads, n_experts=config.experts, top_k=config.top_k,
            hidden=config.hidden, dropout=config.dropout, shared_expert=config.shared_expert,
        )  # fmt: skip
        self.evidence = SampleEvidence(len(self.class_names), dim, config.evidence)
        self.semantic_evidence = SemanticEvidence(config.semantic_evidence, config.k)
        self.loss = ConfusionLoss(
            config.confusion_weight, image_to_text=config.image_to_text_weight,
            text_to_image=config.text_to_image_weight, representatives=config.representative_weight,
        )  # fmt: skip
        self._initialise_experts()
        self.adapter.requires_grad_(config.sample and config.adapter in ("both", "local"))
        if not config.mgde:
            for name, parameter in self.mgde.named_parameters():
                parameter.requires_grad_(name == "beta" or name.startswith("shared."))
        self.to(self.text_features.device)

    @property
    def backbone(self) -> Backbone:
        """The wrapped CLIP of the base model."""
        return self.base.backbone

    @property
    def adapter(self) -> DiffMannerAdapter:
        """The trained part of the image tower."""
        return self.sample.adapter

    def trainable(self) -> dict[str, nn.Parameter]:
        """Parameters that learn, by name: the adapter's and MGDE's, as far as the configuration uses them."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def learning_rates(self) -> dict[float, list[nn.Parameter]]:
        """The same parameters by the factor on their learning rate: routed experts learn more slowly."""
        routed = {n for n in self.trainable() if n.startswith("mgde.") and not n.startswith("mgde.shared.")}
        fast = [p for name, p in self.trainable().items() if name not in routed]
        slow = [p for name, p in self.trainable().items() if name in routed]
        return {1.0: fast + slow} if self.config.expert_lr == 1.0 else {1.0: fast, self.config.expert_lr: slow}

    def train(self, mode: bool = True) -> CAPT:
        """Training mode of the trained parts; the frozen base model always stays in evaluation mode."""
        super().train(mode)
        self.base.eval()
        return self

    def _initialise_experts(self) -> None:
        weights = self.base.tower.feed_forward_weights() if self.config.sample_expert_init else None
        rows = expert_prompts(prompt_texts(self.text_features, self.config), self.bank, self.pair_prompts)
        commonality, difference = (spherical_kmeans(kind, self.config.centres) for kind in rows)
        self.mgde.initialise_experts(commonality, difference, None if weights is None else weights[:4])

    # ---- bank ---------------------------------------------------------------------------------------

    def use_bank(self, bank: ConfusionBank) -> None:
        """Consult this bank from now on.

        Raises:
            CaptError: it belongs to other classes, or holds the mistakes of another model although ``bank_source`` of
                the configuration is ``own``.
        """
        n_classes = len(self.class_names)
        if bank.class_names != self.class_names:
            raise CaptError(
                f"CAPT: the bank was built for {bank.n_classes} other classes; build one for these {n_classes}"
            )
        if self.config.bank_source == "own" and bank.backbone and bank.backbone != self.base.fingerprint():
            raise CaptError(
                "CAPT: the bank holds the mistakes of another backbone or base model (fingerprints differ); build it "
                "again, or name its source in bank_source"
            )
        self.bank = bank
        self._shown = bank.shuffled(self.config.control_seed) if self.config.bank_shuffle else bank
        self._statistics = bank.statistics(self.config.orientation).to(self.text_features.device)

    @torch.no_grad()
    def refresh_bank(
        self, inputs: Callable[[Tensor], Tensor], labels: Tensor, ids: Tensor, names: Sequence[str] | None = None
    ) -> ConfusionBank:
        """Collect the mistakes that the model makes now, without evidence and stored mistakes, into a new bank.

        To be called after every ``bank_refresh`` epochs; ``bank_tokens`` must follow the rows of the bank returned.

        Args:
            inputs: positions int64 [n] -> :meth:`tokens` of those training images, evaluation transform.
            labels, ids: int64 [N], of all training images, on the CPU.
            names: N image names.
        """
        mode = self.training
        classes = replace(self.eval().class_set(), evidence=None, semantic_evidence=False)
        features, logits = [], []
        for positions in torch.arange(len(labels)).split(256):
            tokens = inputs(positions)
            raw = self.base_features(tokens)
            features.append(F.normalize(raw, dim=-1).cpu())
            logits.append(self(tokens, classes, base_features=raw).logits.cpu())
        self.train(mode)
        bank = ConfusionBank.from_logits(
            torch.cat(features), torch.cat(logits), labels, ids, self.class_names, names=names,
            backbone=self.base.fingerprint(),
        )  # fmt: skip
        self.use_bank(bank)
        return bank

    # ---- forward ------------------------------------------------------------------------------------

    def class_set(
        self, class_names: Sequence[str] | None = None, *, text_features: Tensor | None = None,
        pair_prompts: PairPrompts | None = None,
    ) -> ClassSet:  # fmt: skip
        """Candidate classes for :meth:`forward`.

        Training classes come with the bank, its statistics, the evidence and their pair prompts. A selection of them
        keeps statistics and evidence; a list with any new class keeps the statistics of the pairs that the bank knows.
        Wholly new classes have none, and no text of a training class is used.

        Args:
            text_features: float [n, d], unit norm, of other classes than the training classes; default: encoded here.
            pair_prompts: of other classes than the training classes; default: those of the training classes' pair texts
                that are about pairs of these classes, and prompts of class texts.
        """
        if class_names is None or tuple(class_names) == self.class_names:
            text = self.text_features
            rows = torch.arange(len(self.class_names), device=text.device)
            # A training image would be its own evidence.
            evidence = None if self.training else self.evidence.change_map(text, rows)
            return ClassSet(
                self.class_names, text, self._statistics, self._shown, evidence, known=True,
                pair_prompts=self.pair_prompts, prompt_texts=prompt_texts(text, self.config),
            )  # fmt: skip
        names = tuple(class_names)
        if not names:
            raise DataError("CAPT: the list of class names is empty")
        with torch.no_grad():
            text = self.base.class_text_features(names) if text_features is None else text_features
        row = {name: index for index, name in enumerate(self.class_names)}
        known = all(name in row for name in names)
        statistics = evidence = None
        if self._statistics is not None:
            statistics = restricted_statistics(self._statistics, self.class_names, names)
        if known and not self.training:
            evidence = self.evidence.change_map(text, torch.tensor([row[name] for name in names], device=text.device))
        prompts = self._prompts_of(names) if pair_prompts is None else pair_prompts
        return ClassSet(
            names, text, statistics, evidence=evidence, known=known,
            pair_prompts=usable_prompts(prompts, names, self.config), prompt_texts=prompt_texts(text, self.config),
        )  # fmt: skip

    def _prompts_of(self, names: tuple[str, ...]) -> PairPrompts | None:
        """Prompts of other candidates, from the pair texts of the training classes; None if none is about them."""
        if self.pair_prompts is None:
            return None
        if self._other_prompts is None or self._other_prompts.class_names != names:
            with torch.inference_mode(False), torch.no_grad():  # it may be used in training later on
                self._other_prompts = PairPrompts(self.pair_prompts.texts, self.base.text_backbone, names)
        return self._other_prompts if len(self._other_prompts) else None

    def tokens(self, images: Tensor) -> Tensor:
        """Frozen tokens [B, L, D] of transformed images float [B, 3, H, W], the input of :meth:`forward`."""
        with torch.no_grad():
            return self.adapter.frozen_tokens(self.base.tower, images.to(self.text_features.device))

    def base_features(self, tokens: Tensor) -> Tensor:
        """Un-normalised features [B, d] of the base model, of frozen tokens; they never change and may be kept."""
        with torch.no_grad():
            return self.adapter.encode_frozen(self.base.tower, tokens)

    def forward(
        self, tokens: Tensor, classes: ClassSet | None = None, *, base_features: Tensor | None = None,
        bank_tokens: Callable[[Tensor], Tensor] | None = None, sample_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> CAPTOutput:  # fmt: skip
        """Classify images given as frozen tokens.

        Args:
            tokens: float [B, L, D] from :meth:`tokens`.
            classes: candidates; default: the training classes.
            base_features: float [B, d], :meth:`base_features` of these tokens, where they were kept.
            bank_tokens: bank rows int64 [n] -> frozen tokens; None: no stored mistakes are consulted.
            sample_ids: int64 [B], ids of training images, whose own records are not retrieved.
            labels: int64 [B], in training the keys of the lookup if the configuration says so.
        """
        classes = classes or self.class_set()
        base, config = self.base, self.config
        with torch.no_grad():
            raw = self.base_features(tokens) if base_features is None else base_features
            features = F.normalize(raw, dim=-1)
            base_logits = keyed = base.logits(raw, classes.names, classes.text_features)
            extra_logits = base.extra_logits(raw, classes.names)
            if config.key == "label" and labels is not None and self.training:
                # The class that leads is the key; the others keep their order and proportions.
                keyed = base_logits.scatter(1, labels.unsqueeze(1), base_logits.amax(1, keepdim=True) + 1)
        texts = classes.text_features if classes.prompt_texts is None else classes.prompt_texts
        semantic = self.semantic(features, keyed, texts, classes.statistics, classes.pair_prompts)
        if config.sample:
            sample = self.sample(
                features, tokens, base.tower, semantic, bank=classes.bank, bank_tokens=bank_tokens,
                sample_ids=sample_ids,
            )  # fmt: skip
        else:
            sample = SampleConfusion.absent(features)
        guidance = (
            semantic.commonality if config.semantic in ("both", "commonality") else None,
            semantic.difference if config.semantic in ("both", "difference") else None,
            self._sample_guidance(sample) if config.sample else None,
        )
        expert = self.mgde(features, *guidance) if config.mgde else self.mgde.without_experts(*guidance)
        strength = 1.0 if classes.known else config.unseen_strength
        extra: Tensor | float = 0.0
        if classes.evidence is not None:
            matrix, offset = classes.evidence
            extra = features @ matrix + offset
        kept = self.adapter.rests_frozen
        corrected = self.mgde.correct(raw, expert.correction, sample.own, strength, extra, own_change=kept)
        logits = base.logit_scale * corrected @ classes.text_features.T
        logits = logits if extra_logits is None else logits + extra_logits
        evident = classes.semantic_evidence and not classes.known and not self.training
        if classes.pair_prompts is not None and evident:
            logits = self.semantic_evidence(features, logits, classes.pair_prompts, base.logit_scale)
        return CAPTOutput(corrected, logits, base_logits, semantic, sample, expert)

    def _sample_guidance(self, sample: SampleConfusion) -> Tensor:
        if not self.training or not self.config.bank_dropout or sample.mask.shape[1] == 0:
            return sample.guidance
        dropped = torch.rand(len(sample.own), 1, device=sample.own.device) < self.config.bank_dropout
        return torch.where(dropped, sample.own, sample.guidance)

    def losses(
        self, tokens: Tensor, labels: Tensor, *, bank_tokens: Callable[[Tensor], Tensor] | None, sample_ids: Tensor,
        base_features: Tensor | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Losses of a training batch: ``loss`` is the sum that is minimised, the others are its parts."""
        classes = self.class_set()
        output = self(
            tokens, classes, base_features=base_features, bank_tokens=bank_tokens, sample_ids=sample_ids, labels=labels
        )
        semantic, sample = output.semantic, output.sample
        stored: dict[str, Tensor] = {}
        if self.bank is not None and sample.mask.shape[1]:
            records, rows = self.bank.on(labels.device), sample.rows.clamp_min(0)
            # What a stored mistake looks like after correction: it must no longer be one.
            stored = {
                "representatives": self.mgde.share(sample.representatives),
                "representative_labels": records.labels[rows],
                "representative_predictions": records.predictions[rows],
                "mask": sample.mask,
            }
        parts = self.loss(
            output.features, classes.text_features, labels,
            torch.cat([semantic.pseudo.unsqueeze(1), semantic.confusing], 1), self.base.logit_scale, **stored,
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
        return self._run(images, self.eval().class_set(class_names)).logits

    @torch.inference_mode()
    def encode_image(self, images: Tensor, class_names: Sequence[str] | None = None) -> Tensor:
        """Corrected unit-norm features float [B, d]; they depend on the candidate classes, since confusions do."""
        return self._run(images, self.eval().class_set(class_names)).features

    @torch.inference_mode()
    def predict(
        self, images: Sequence[Image] | Tensor, class_names: Sequence[str] | None = None, *, top: int = 5
    ) -> list[Prediction]:
        """Classify PIL images (or already transformed pixels [B, 3, H, W]).

        Args:
            class_names: candidates; default: the training classes.
            top: classes to report.
        """
        if not isinstance(images, Tensor):
            images = torch.stack([self.backbone.preprocess(image) for image in images])
        classes = self.eval().class_set(class_names)
        return predictions(self._run(images, classes), classes.names, top)

    def _run(self, images: Tensor, classes: ClassSet) -> CAPTOutput:
        output: CAPTOutput = self(self.tokens(images), classes)
        return output

    # ---- storage ------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``adapter.safetensors`` and ``state.json``, and what there is of ``bank/``, ``pair_texts.json`` and
        ``base/`` (what a base model other than zero-shot has learned).
        """
        save_capt(self, folder)

    @classmethod
    def load(cls, folder: str | Path, base: BaseModel | Backbone) -> CAPT:
        """Read a model written by :meth:`save`.

        Args:
            base: its base model, or the backbone alone: the base model is then read from the folder too.

        Raises:
            DataError: the folder holds no model.
            DamagedFileError: a file was changed.
            CaptError: ``base`` is not the one it was trained on.
        """
        return load_capt(cls, folder, base)
